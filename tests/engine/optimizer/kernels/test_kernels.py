"""Every form of the masked step against the plain one; moments of open weights alone against those of all."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.masking import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer import MaskedAdamW
from sculpt_dist.engine.optimizer.kernels import Rule, choose_kernel
from sculpt_dist.engine.optimizer.kernels.plain import Plain
from sculpt_dist.engine.sharding import Fragment, Shard

SIZES = {"plain": (300_007, 1, 15, 4_099)}  # more than a chunk, less than a vector, no multiples of 16
SIZES |= {
    "c": SIZES["plain"],
    "c, one by one": SIZES["plain"],
    "triton": (4_099, 1, 15, 700),
}  # an interpreter may run it


def c_routine(*flags: str):
    from sculpt_dist.engine.optimizer.kernels.cpu import FLAGS, BuildError, CompiledKernel, build_library

    try:
        return CompiledKernel(build_library((*FLAGS, *flags)))
    except BuildError as error:
        pytest.skip(str(error))


def triton_kernel():
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU triton's interpreter runs it, in a process of its own (see the last test)")
    from sculpt_dist.engine.optimizer.kernels.gpu import TritonKernel

    return TritonKernel()


KERNELS = {"plain": Plain, "c": c_routine, "c, one by one": lambda: c_routine("-mno-avx512f"), "triton": triton_kernel}


def train(
    name: str,
    packed: bool,
    statistic: str = "abs_sum",
    clip: float = 0.0,
    decay: float = 0.0,
    turnovers: int = 3,
    sizes=None,
):
    """A few steps on random gradients, with turnovers between; all that came of them."""
    sizes = sizes or SIZES[name]
    n, rng = sum(sizes) + 9, torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(n, generator=rng))
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    shard = Shard(
        weights, [Fragment(str(i), i, 0, at, size) for i, (at, size) in enumerate(zip(offsets, sizes))], packed
    )
    mask = DynamicMask(
        [shard], {str(i): size for i, size in enumerate(sizes)}, None, MaskSettings(0.4, "global", statistic, 0)
    )
    optimizer = MaskedAdamW([weights], (0.9, 0.999), decay, clip, KERNELS[name]())
    optimizer.attach([shard], mask, None)
    optimizer.statistic, optimizer.param_groups[0]["lr"] = statistic, 0.01
    mask.open_all()

    def step(phase: str) -> None:
        optimizer.phase = phase
        weights.grad = torch.randn(n, generator=rng)
        weights.grad[shard.padding] = 0
        given = weights.grad.clone()
        optimizer.step()
        assert torch.equal(weights.grad, given)

    step("collect")
    mask.build()
    norms = []
    for turnover in range(turnovers + 1):
        before, closed = weights.detach().clone(), shard.opened == 0
        for _ in range(2):
            step("train")
            norms.append([optimizer.grad_norm, optimizer.update_norm()])
        assert torch.equal(weights[closed], before[closed])
        assert float((weights != before)[~closed].float().mean()) > 0.999  # two moves may cancel
        if turnover < turnovers:
            mask.turn_over(0.3, optimizer.updates)
    momentum, variance = shard.moments.flat(shard.opened)
    kept = {
        "weights": weights.detach(),
        "saliency": shard.saliency,
        "opened": shard.opened,
        "momentum": momentum,
        "variance": variance,
    }
    return {name: tensor.clone() for name, tensor in kept.items()} | {"norms": torch.tensor(norms)}, shard


@pytest.mark.parametrize("packed", [False, True], ids=["all", "open"])
@pytest.mark.parametrize(
    ("statistic", "clip", "decay"),
    [("abs_sum", 0.0, 0.0), ("sum_abs", 0.0, 0.1), ("sum_sq", 5.0, 0.0), ("abs_sum", 5.0, 0.1)],
)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "plain"])
def test_every_kernel_does_what_the_plain_one_does(name, statistic, clip, decay, packed):
    found, _ = train(name, packed, statistic, clip, decay)
    reference, _ = train("plain", False, statistic, clip, decay, sizes=SIZES[name])
    assert torch.equal(found["opened"], reference["opened"]) and int(reference["opened"].max()) == 4
    roundings = {"weights": 8 * 2.4e-7}  # eight updates of weights up to 4
    for kind, tensor in reference.items():
        limit = roundings.get(kind, 1e-7)
        torch.testing.assert_close(
            found[kind].double(),
            tensor.double(),
            rtol=2e-5,
            atol=limit,
            msg=lambda text: f"{kind}: {text}",  # noqa: B023 (called within this turn)
        )


@pytest.mark.parametrize("name", KERNELS)
def test_moments_of_open_weights_alone_give_the_same_bits_in_less_memory(name):
    whole, _ = train(name, False)
    packed, held = train(name, True)
    assert all(
        torch.equal(whole[kind], packed[kind]) for kind in ("weights", "saliency", "opened", "momentum", "variance")
    )
    bytes_held = sum(tensor.nbytes for piece in held.moments.pieces(held.opened) for tensor in piece[1:])
    assert bytes_held < 8 * (0.4 * sum(SIZES[name]) + 5 * (4096 + 16))


def test_more_generations_than_two_registers_hold_are_corrected_each_by_its_own_age():
    reference, _ = train("plain", False, turnovers=40)
    for packed in (False, True):
        found, _ = train("c", packed, turnovers=40)
        assert int(reference["opened"].max()) == 41
        torch.testing.assert_close(found["weights"], reference["weights"], rtol=2e-5, atol=82 * 2.4e-7)


def test_packed_moments_are_saved_and_filled_as_those_of_all_weights_are():
    _, shard = train("plain", True)
    momentum, variance = shard.moments.flat(shard.opened)
    assert momentum.any() and not momentum[shard.opened == 0].any()
    other = Shard(torch.nn.Parameter(torch.zeros_like(shard.flat)), shard.fragments, packed=True)
    other.opened.copy_(shard.opened)
    assert not other.moments.flat(other.opened)[0].any()
    other.moments.fill(momentum, variance, other.opened)
    assert all(torch.equal(a, b) for a, b in zip(other.moments.flat(other.opened), (momentum, variance)))


@pytest.mark.parametrize("name", KERNELS)
def test_a_rank_on_which_no_trained_weight_lives_takes_part(name):
    kernel, weights = KERNELS[name](), torch.nn.Parameter(torch.ones(16))
    shard = Shard(weights, [])
    rule = Rule(0.1, 0.9, 0.999, 1e-8, 0.0, torch.ones(()), torch.ones(2), torch.ones(2))
    assert kernel.update(shard, torch.ones(16), "abs_sum", rule).tolist() == [0, 0]
    assert float(kernel.collect(shard, torch.ones(16), "abs_sum")) == 0 and bool((weights == 1).all())


def test_packed_moments_take_no_memory_before_the_first_update():
    shard = Shard(torch.nn.Parameter(torch.zeros(100_000)), [Fragment("w", 0, 0, 0, 100_000)], packed=True)
    assert shard.moments._pieces == []


def test_without_a_compiler_plain_torch_does_it_and_asking_for_the_compiled_form_is_refused(monkeypatch):
    from sculpt_dist.engine.optimizer.kernels import cpu

    cpu.find_kernel.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    try:
        assert isinstance(choose_kernel("auto", torch.device("cpu")), Plain)
        with pytest.raises(ConfigError, match="engine.kernel=fused: there is no C compiler"):
            choose_kernel("fused", torch.device("cpu"))
    finally:
        cpu.find_kernel.cache_clear()


@pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="triton is not installed, or there is a GPU to run it",
)
def test_the_gpu_kernel_computes_the_same_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1"
    }  # read when triton is imported, which others may have done here
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "triton"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and "10 passed" in ran.stdout, ran.stdout[-3000:]
