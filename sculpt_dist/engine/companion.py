"""A small net that trains beside the student, such as a discriminator: whole on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sculpt_dist.engine.group import Group


class Companion:
    """A net with its own Adam, the same on all ranks: gradients are averaged over ranks and over the calls of a step.

    Checkpoints keep it.
    """

    def __init__(self, net: nn.Module, lr: float, betas: tuple[float, float], group: Group | None) -> None:
        self.net, self.group = net, group
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=betas)
        self._sums: list[Tensor] = []  # of gradients; the student's backward leaves its own in .grad
        self._calls = 0

    def learn(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss []; the weights stay as they are until `step`."""
        gradients = torch.autograd.grad(loss, list(self.net.parameters()))
        self._sums = [a + b for a, b in zip(self._sums, gradients)] if self._calls else list(gradients)
        self._calls += 1

    def step(self) -> None:
        """One update with the mean gradient. All ranks call it."""
        assert self._calls, "learn() comes before step()"
        ranks = 1 if self.group is None else self.group.size
        for parameter, total in zip(self.net.parameters(), self._sums):
            whole = total if self.group is None else self.group.sum(total)
            parameter.grad = whole / (self._calls * ranks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._calls = 0

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name, flat."""
        found = {f"weight {name}": tensor for name, tensor in self.net.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"{kind} {number}": torch.as_tensor(value) for kind, value in moments.items()}
        return {name: tensor.detach().flatten().float().clone() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights and moments that `state` gave."""
        weights = {name: state[f"weight {name}"].view_as(old) for name, old in self.net.state_dict().items()}
        self.net.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.net.parameters()):
            if f"step {number}" in state:
                moments[number] = {
                    "step": state[f"step {number}"].view(()),
                    "exp_avg": state[f"exp_avg {number}"].view_as(parameter),
                    "exp_avg_sq": state[f"exp_avg_sq {number}"].view_as(parameter),
                }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
