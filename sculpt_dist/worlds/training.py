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
    weights: list[Tensor] = [weight for module in modules.values() for weight in module.parameters()]
    averages = [weight.detach().clone() for weight in weights] if plan.average is not None else []
    optimizer = torch.optim.AdamW(weights, plan.peak, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)
    state = _State(modules, averages, optimizer, rng)
    first = state.restore(file, about) if file is not None else 0
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
                state.save(file, {**about, "step": str(step + 1)})
                saved = time.monotonic()
                if saved > shown + 600:
                    console.print(f"{description}: step {step + 1} of {plan.steps}, loss {value.item():.4f}")
                    shown = saved
    with torch.no_grad():
        if averages:
            torch._foreach_copy_(weights, averages)


@dataclass(frozen=True)
class _State:
    """Everything that a step changes."""

    modules: Mapping[str, nn.Module]
    averages: list[Tensor]  # of the weights, each in its shape; empty without a moving average
    optimizer: torch.optim.Optimizer
    rng: torch.Generator

    def tensors(self) -> dict[str, Tensor]:
        """All but the random numbers, under names of its own; the tensors themselves."""
        found = {
            f"module/{part}/{key}": value
            for part, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        found |= {f"average/{i}": average for i, average in enumerate(self.averages)}
        for i, weight in enumerate(self.optimizer.param_groups[0]["params"]):
            moments = self.optimizer.state[weight]
            if not moments:  # AdamW makes them at the first step
                zero = torch.zeros_like
                moments |= {"step": torch.tensor(0.0), "exp_avg": zero(weight), "exp_avg_sq": zero(weight)}
            found |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
        return found

    def save(self, file: Path, about: dict[str, str]) -> None:
        tensors = {name: value.detach().contiguous() for name, value in self.tensors().items()}
        make_folder(file.parent)
        write_atomically(file, save({**tensors, "rng": self.rng.get_state()}, about))

    def restore(self, file: Path, about: dict[str, str]) -> int:
        """The steps done, once everything is as it was then; 0 without a readable file of this plan and origin."""
        tensors = self.tensors()
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
                self.rng.set_state(content.get_tensor("rng"))
                return int(found["step"])
        except (OSError, SafetensorError):
            return 0
