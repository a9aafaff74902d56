"""The GPU kernel compiles ahead of time, so it cannot break unnoticed on machines without a GPU."""

from __future__ import annotations

import itertools

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sculpt_dist.engine.optimizer.kernels import masked_adamw_triton  # noqa: E402
from sculpt_dist.engine.optimizer.kernels.gpu import BLOCK, STATISTICS  # noqa: E402

TYPES = {"opened": "*u8", "counts": "*i64", "begins": "*i64", "n": "i32"}
TYPES |= dict.fromkeys("gradient saliency momentum variance weights squares moves scale first second".split(), "*fp32")
TYPES |= dict.fromkeys("lr beta1 beta2 epsilon decay".split(), "fp32")
VARIANTS = {
    "count": [{}],
    "collect": [{"statistic": statistic} for statistic in STATISTICS.values()],
    "update": [
        {"statistic": statistic, "packed": packed}
        for statistic, packed in itertools.product(STATISTICS.values(), (False, True))
    ],
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_compiles_to_ptx_and_machine_code(monkeypatch, tmp_path, name, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(masked_adamw_triton, name)
    for variant in VARIANTS[name]:
        constants = variant | {"block": BLOCK}
        signature = {
            argument: "constexpr" if argument in constants else TYPES[argument] for argument in function.arg_names
        }
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
        assert f".target sm_{capability}" in code["ptx"], variant
        assert code["cubin"].startswith(b"\x7fELF"), variant
