"""A sparse autoencoder of a layer's activations, and its training (SAeUron, arXiv 2501.18052).

Letters in shapes: N vectors, D their width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sculpt_dist.maths.sparse_codes import largest, largest_of_batch


@dataclass
class Autoencoder:
    """Codes are relu(E (x - b)+ e), of which a few count; x is about codes U + b with rows of U of length 1."""

    encoder: Tensor  # E, [F, D]
    encoder_bias: Tensor  # e, [F]
    decoder: Tensor  # U, [F, D]
    bias: Tensor  # b, [D]

    def codes(self, vectors: Tensor) -> Tensor:
        """[N, D] -> all activations [N, F]."""
        return torch.relu((vectors - self.bias) @ self.encoder.mT + self.encoder_bias)

    def decoded(self, codes: Tensor) -> Tensor:
        """[N, F] -> [N, D]."""
        return codes @ self.decoder + self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Autoencoder:
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained; see the options of saeuron."""

    expansion: int
    active: int
    epochs: int
    batch: int
    lr: float
    auxk_alpha: float
    dead_after: int


def train_autoencoder(vectors: Tensor, training: Training, rng: torch.Generator) -> Autoencoder:
    """Train on vectors [N, D]; equal input gives equal weights.

    The loss is the share of the variance that stays unexplained, plus `auxk_alpha` times that of the residual which
    the largest codes of dead features leave. Adam; the learning rate falls linearly to 0; gradients are clipped to 1;
    no gradient points along the decoder's rows. The bias begins as the mean of all vectors (published: a geometric
    median of the first batch).
    """
    width = vectors.shape[1]
    rows = torch.randn(width * training.expansion, width, generator=rng).to(vectors)
    model = Autoencoder(
        encoder=rows / rows.norm(dim=1, keepdim=True),
        encoder_bias=torch.zeros(len(rows)).to(vectors),
        decoder=rows / rows.norm(dim=1, keepdim=True),
        bias=vectors.mean(0),
    )
    weights = [tensor.requires_grad_() for tensor in model.tensors().values()]
    optimizer = torch.optim.Adam(weights, lr=training.lr, eps=6.25e-10)
    size = min(training.batch, len(vectors))
    per_epoch = len(vectors) // size
    total = per_epoch * training.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
    idle = torch.zeros(len(rows), dtype=torch.int64, device=vectors.device)  # vectors since each feature fired
    with torch.enable_grad():
        for _ in range(training.epochs):
            order = torch.randperm(len(vectors), generator=rng).to(vectors.device)
            for places in order[: per_epoch * size].split(size):
                loss, fired = _loss(model, vectors[places], training, idle > training.dead_after)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                _step(model, optimizer)
                schedule.step()
                idle = torch.where(fired, 0, idle + size)
    return Autoencoder.of({name: tensor.detach() for name, tensor in model.tensors().items()})


def _loss(model: Autoencoder, vectors: Tensor, training: Training, dead: Tensor) -> tuple[Tensor, Tensor]:
    """(the loss, which features fired [F])."""
    codes = model.codes(vectors)
    kept = largest_of_batch(codes, training.active)
    residual = vectors - model.decoded(kept)
    variance = (vectors - vectors.mean(0)).square().sum()
    loss = residual.square().sum() / variance
    num_dead, most = int(dead.sum()), vectors.shape[1] // 2
    if num_dead and training.auxk_alpha > 0:
        revived = largest(codes * dead, min(most, num_dead)) @ model.decoder
        share = min(num_dead / most, 1.0)
        loss = loss + training.auxk_alpha * share * (residual.detach() - revived).square().sum() / variance
    return loss, (kept > 0).any(0)


def _step(model: Autoencoder, optimizer: torch.optim.Optimizer) -> None:
    """An update that leaves the decoder's rows at length 1."""
    rows = model.decoder
    with torch.no_grad():
        assert rows.grad is not None
        rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
        optimizer.step()
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).eps)
