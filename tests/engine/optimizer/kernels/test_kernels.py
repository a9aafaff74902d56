"""Every kernel against the plain one, and packed moments against dense ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.masking import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer import MaskedAdamW
from sculpt_dist.engine.optimizer.kernels import Kernel, Rule, choose_kernel
from sculpt_dist.engine.optimizer.kernels.plain import Plain
from sculpt_dist.engine.sharding import Fragment, Shard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs the GPU kernel on the CPU
LARGE = (300_007, 1, 15, 4_099)  # more than a chunk, less than a vector, no multiples of 16
SMALL = (4_099, 1, 15, 700)  # for the interpreter
CPU_KERNELS = ["plain", "c", "c without AVX-512"]
TRITON = pytest.param("triton", marks=[] if INTERPRETED else pytest.mark.gpu)


def sizes_of(name: str) -> tuple[int, ...]:
    return SMALL if name == "triton" and INTERPRETED else LARGE


def device_of(name: str) -> str:
    return "cuda" if name == "triton" and not INTERPRETED else "cpu"


def kernel_of(name: str) -> Kernel:
    if name == "plain":
        return Plain()
    if name == "triton":
        pytest.importorskip("triton")
        from sculpt_dist.engine.optimizer.kernels.gpu import TritonKernel

        return TritonKernel()
    from sculpt_dist.engine.optimizer.kernels.cpu import FLAGS, BuildError, CompiledKernel, build_library

    try:
        return CompiledKernel(build_library(FLAGS if name == "c" else (*FLAGS, "-mno-avx512f")))
    except BuildError as error:
        pytest.skip(str(error))


def train(
    name: str,
    packed: bool,
    statistic: str = "abs_sum",
    clip: float = 0.0,
    decay: float = 0.0,
    turnovers: int = 3,
    sizes: tuple[int, ...] | None = None,
) -> tuple[dict[str, torch.Tensor], Shard]:
    """A few steps on random gradients, with turnovers in between; returns the final state on the CPU, and the shard."""
    sizes, device = sizes or sizes_of(name), device_of(name)
    n, rng = sum(sizes) + 9, torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(n, generator=rng).to(device))
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    fragments = [Fragment(str(i), i, 0, offset, size) for i, (offset, size) in enumerate(zip(offsets, sizes))]
    shard = Shard(weights, fragments, packed)
    names = {str(i): size for i, size in enumerate(sizes)}
    mask = DynamicMask([shard], names, None, MaskSettings(0.4, "global", statistic, 0))
    optimizer = MaskedAdamW([weights], (0.9, 0.999), decay, clip, kernel_of(name))
    optimizer.attach([shard], mask, None)
    optimizer.statistic, optimizer.param_groups[0]["lr"] = statistic, 0.01
    mask.open_all()

    def step(phase: str) -> None:
        optimizer.phase = phase
        weights.grad = torch.randn(n, generator=rng).to(device)
        weights.grad[shard.padding] = 0
        before = weights.grad.clone()
        optimizer.step()
        assert torch.equal(weights.grad, before)

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
    state = {
        "weights": weights.detach(),
        "saliency": shard.saliency,
        "opened": shard.opened,
        "momentum": momentum,
        "variance": variance,
        "norms": torch.tensor(norms),
    }
    return {kind: tensor.clone().cpu() for kind, tensor in state.items()}, shard


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("statistic", "clip", "decay"),
    [("abs_sum", 0.0, 0.0), ("sum_abs", 0.0, 0.1), ("sum_sq", 5.0, 0.0), ("abs_sum", 5.0, 0.1)],
)
@pytest.mark.parametrize("name", [*CPU_KERNELS[1:], TRITON])
def test_every_kernel_computes_what_the_plain_one_does(name, statistic, clip, decay, packed):
    found, _ = train(name, packed, statistic, clip, decay)
    reference, _ = train("plain", False, statistic, clip, decay, sizes=sizes_of(name))
    assert torch.equal(found["opened"], reference["opened"])
    assert int(reference["opened"].max()) == 4
    tolerances = {"weights": 8 * 2.4e-7}  # eight updates of weights up to 4
    for kind, tensor in reference.items():
        torch.testing.assert_close(
            found[kind].double(),
            tensor.double(),
            rtol=2e-5,
            atol=tolerances.get(kind, 1e-7),
            msg=lambda text: f"{kind}: {text}",  # noqa: B023 (called within this iteration)
        )


@pytest.mark.parametrize("name", [*CPU_KERNELS, TRITON])
def test_packed_moments_give_the_same_bits_in_less_memory(name):
    dense, _ = train(name, False)
    packed, shard = train(name, True)
    for kind in ("weights", "saliency", "opened", "momentum", "variance"):
        assert torch.equal(dense[kind], packed[kind]), kind
    bytes_held = sum(moment.nbytes for _, *moments in shard.moments.pieces(shard.opened) for moment in moments)
    assert bytes_held < 8 * (0.4 * sum(sizes_of(name)) + 5 * (4096 + 16))


def test_more_generations_than_two_registers_hold_are_each_corrected_by_their_own_age():
    reference, _ = train("plain", False, turnovers=40)
    for packed in (False, True):
        found, _ = train("c", packed, turnovers=40)
        assert int(reference["opened"].max()) == 41
        torch.testing.assert_close(found["weights"], reference["weights"], rtol=2e-5, atol=82 * 2.4e-7)


def test_packed_moments_are_filled_with_what_was_saved():
    _, shard = train("plain", True)
    momentum, variance = shard.moments.flat(shard.opened)
    assert momentum.any()
    assert not momentum[shard.opened == 0].any()
    other = Shard(torch.nn.Parameter(torch.zeros_like(shard.flat)), shard.fragments, packed=True)
    other.opened.copy_(shard.opened)
    assert not other.moments.flat(other.opened)[0].any()
    other.moments.fill(momentum, variance, other.opened)
    assert all(torch.equal(a, b) for a, b in zip(other.moments.flat(other.opened), (momentum, variance)))


@pytest.mark.parametrize("name", [*CPU_KERNELS, TRITON])
def test_a_rank_without_trained_weights_takes_part(name):
    kernel, device = kernel_of(name), device_of(name)
    weights = torch.nn.Parameter(torch.ones(16, device=device))
    shard, gradient = Shard(weights, []), torch.ones(16, device=device)
    one, two = torch.ones((), device=device), torch.ones(2, device=device)
    rule = Rule(0.1, 0.9, 0.999, 1e-8, 0.0, one, two, two)
    assert kernel.update(shard, gradient, "abs_sum", rule).tolist() == [0, 0]
    assert float(kernel.collect(shard, gradient, "abs_sum")) == 0
    assert bool((weights == 1).all())


def test_packed_moments_take_no_memory_before_the_first_update():
    shard = Shard(torch.nn.Parameter(torch.zeros(100_000)), [Fragment("w", 0, 0, 0, 100_000)], packed=True)
    assert shard.moments._pieces == []


def test_without_a_compiler_auto_is_the_plain_kernel_and_fused_is_refused(monkeypatch):
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


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_gpu_kernel_passes_these_tests_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # triton reads it when imported, which this process has done
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "triton"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout[-3000:]
    assert "10 passed" in child.stdout, child.stdout[-3000:]
