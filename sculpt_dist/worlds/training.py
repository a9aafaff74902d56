"""One loop for all that a world trains on a CPU: it can be killed at any time, and goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sculpt_dist.core.files import make_folder, write_atomically
from sculpt_dist.worlds.console import console

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Descent:
    """AdamW under a warm-up and a cosine."""

    steps: int
    peak: float  # learning rate
    warmup: int = 100  # steps
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 1e-2
    clip: float | None = 1.0  # norm of the gradient
    average: float | None = None  # decay of a moving average that replaces the weights at the end

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.peak * min(1, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def descend(
    modules: Mapping[str, nn.Module],
    loss: Callable[[], Tensor],
    plan: Descent,
    rng: torch.Generator,
    description: str,
    file: Path | None = None,
    made_from: str = "",
) -> None:
    """Train the modules on `loss`, a scalar of which every random number comes from `rng`.

    With `file`, the training is saved there every minute and at the end; a call that finds it goes on from there, and
    ends with the same weights as one that was never stopped. `made_from` names all else that decides the weights: data,
    seed, settings. A file of another plan or made from something else is not used.
    """
    about = {"plan": json.dumps(asdict(plan)), "made_from": made_from}
    named = {f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()}
    weights: list[Tensor] = list(named.values())
    averages = [weight.detach().clone() for weight in weights] if plan.average is not None else []
    optimizer = torch.optim.AdamW(weights, plan.peak, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)
    first = _restore(file, about, modules, averages, optimizer, rng) if file is not None else 0
    saved, shown = time.monotonic(), 0.0
    with Progress(console=console) as progress:
        task = progress.add_task(description, total=plan.steps, completed=first)
        for step in range(first, plan.steps):
            optimizer.param_groups[0]["lr"] = plan.rate(step)
            value = loss()
            optimizer.zero_grad()
            value.backward()
            if plan.clip is not None:
                nn.utils.clip_grad_norm_(weights, plan.clip)
            optimizer.step()
            if plan.average is not None:
                decay = min(plan.average, (step + 2) / (step + 11))
                torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
            progress.advance(task)
            if file is not None and (time.monotonic() > saved + SAVE_EVERY or step + 1 == plan.steps):
                _save(file, {**about, "step": str(step + 1)}, modules, averages, optimizer, rng)
                saved = time.monotonic()
                if saved > shown + 600:
                    console.print(f"{description}: step {step + 1} of {plan.steps}, loss {value.item():.4f}")
                    shown = saved
    with torch.no_grad():
        if averages:
            torch._foreach_copy_(weights, averages)


def _tensors(
    modules: Mapping[str, nn.Module], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything that a step changes, under names of its own; the tensors themselves."""
    found = {
        f"module/{part}/{key}": value for part, module in modules.items() for key, value in module.state_dict().items()
    }
    found |= {f"average/{i}": average for i, average in enumerate(averages)}
    for i, weight in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[weight]
        if not state:
            state |= {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        found |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    return found


def _save(
    file: Path,
    about: dict[str, str],
    modules: Mapping[str, nn.Module],
    averages: list[Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> None:
    tensors = {name: value.detach().contiguous() for name, value in _tensors(modules, averages, optimizer).items()}
    make_folder(file.parent)
    write_atomically(file, save({**tensors, "rng": rng.get_state()}, about))


def _restore(
    file: Path,
    about: dict[str, str],
    modules: Mapping[str, nn.Module],
    averages: list[Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> int:
    """The steps done, once everything is as it was then; 0 without a readable file of this plan and origin."""
    tensors = _tensors(modules, averages, optimizer)
    try:
        with safe_open(file, "pt") as content:
            found = content.metadata() or {}
            if {key: found.get(key) for key in about} != about or set(content.keys()) != {*tensors, "rng"}:
                return 0
            if any(tuple(content.get_slice(name).get_shape()) != tensor.shape for name, tensor in tensors.items()):
                return 0
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(content.get_tensor(name))
            rng.set_state(content.get_tensor("rng"))
            return int(found["step"])
    except (OSError, SafetensorError):
        return 0
