"""The Engine: trains a net under DeepSpeed ZeRO stages 0-3, behind a few methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking.mask import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer.kernels import choose_kernel
from sculpt_dist.engine.optimizer.masked_adamw import Combine, MaskedAdamW
from sculpt_dist.engine.sharding.partitions import check_coverage, find_shards, parameter_sizes
from sculpt_dist.engine.sharding.shards import Fragment, Shard
from sculpt_dist.engine.zero.frozen_weights import FrozenWeights
from sculpt_dist.engine.zero.loading import return_free_memory
from sculpt_dist.engine.zero.settings import DTYPES, EngineSettings, deepspeed_config

ADVICE = "the last checkpoint is kept; lower train.lr or check the data of this concept"
Stored = Callable[[Container[str]], Iterable[tuple[str, Tensor]]]


class Engine:
    """A net whose trainable part is optimised over all ranks. All of them must call every method."""

    def __init__(
        self,
        net: nn.Module,
        trainable: Sequence[str],
        group: Group,
        settings: EngineSettings,
        mask: MaskSettings,
        stored: Stored,
    ) -> None:
        """`trainable` names the parameters that may move; the rest is frozen. The engine takes over `net`.

        `stored` yields stored values of parameters by name: in a bf16 run the fp32 masters start from them, not from
        rounded copies.
        """
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns about client optimizers
        self.group, self.settings = group, settings
        names = set(trainable)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in names)
        net.to(group.device, DTYPES[settings.precision])
        net.eval()  # no dropout: the pseudo label and the student come from the same net
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in net.named_parameters() if p.requires_grad}
        moving = [parameter for parameter in net.parameters() if parameter.requires_grad]
        kernel = choose_kernel(settings.kernel, group.device)
        self.optimizer = MaskedAdamW(moving, settings.betas, settings.weight_decay, settings.clip, kernel)
        self._engine: Any = deepspeed.initialize(
            model=net, optimizer=self.optimizer, config=deepspeed_config(settings, group.size)
        )[0]
        self.sizes = parameter_sizes(self._engine)
        self.shards = find_shards(self._engine, settings.stage, settings.packed)
        self.replicated = settings.stage == 0
        self.num_trained = sum(self.sizes.values())
        held = torch.tensor([sum(f.numel for shard in self.shards for f in shard.fragments)], device=group.device)
        check_coverage(self.shards, self.sizes, int(held if self.replicated else group.sum(held)))
        owners = None if self.replicated else group
        self.mask = DynamicMask(self.shards, self.sizes, owners, mask)
        self.mask.open_all()
        self.optimizer.statistic = mask.saliency
        self.optimizer.attach(self.shards, self.mask, owners)
        if settings.precision == "bf16":
            self._fill_masters(stored)
        return_free_memory()  # left over from construction

    @property
    def net(self) -> nn.Module:
        """The net that a backbone's `denoise` calls."""
        return self._engine

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.precision]

    def snapshot(self) -> FrozenWeights:
        """A frozen copy of the net's present weights."""
        return FrozenWeights(self._engine, self.settings.stage)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; DeepSpeed divides the loss [] by the accumulation count."""
        self._engine.backward(loss)

    def step(self, phase: str, lr: float = 0.0, combine: Combine | None = None) -> None:
        """End a micro-batch. After the last one of a step the optimizer runs its `phase` (see MaskedAdamW).

        Raises NonFiniteError, on all ranks, when the gradient is not finite.
        """
        self.optimizer.phase = phase
        self.optimizer.param_groups[0]["lr"] = lr
        if combine is not None:
            self.optimizer.combine = combine
        boundary, before = self._engine.is_gradient_accumulation_boundary(), self.optimizer.steps_seen
        self._engine.step()
        self.optimizer.phase = "hold"
        if boundary and self.optimizer.steps_seen == before:
            # DeepSpeed found an infinite gradient and skipped the optimizer.
            raise NonFiniteError(f"the gradient is not finite at update {self.optimizer.updates}; {ADVICE}")
        if boundary and phase == "train" and not math.isfinite(self.optimizer.grad_norm):
            raise NonFiniteError(f"the gradient is not finite at update {self.optimizer.updates - 1}; {ADVICE}")

    def agree_finite(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each loss term [] over ranks.

        Raises NonFiniteError, on all ranks, when a term of any rank is not finite.
        """
        values = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
        means = (self.group.sum(values.clone()) / self.group.size).tolist()
        if not all(math.isfinite(mean) for mean in means):
            where = "here" if not bool(torch.isfinite(values).all()) else "on another rank"
            named = ", ".join(f"{name} {value}" for name, value in zip(terms, values.tolist()))
            raise NonFiniteError(
                f"the loss is not finite {where} (rank {self.group.rank}: {named}) at update {self.optimizer.updates}; "
                f"{ADVICE}"
            )
        return dict(zip(terms, means))

    def check_weights(self) -> None:
        """Raises NonFiniteError, on all ranks, when a trained weight is not finite.

        No loss tells after the last update of a concept.
        """
        finite = all(bool(torch.isfinite(shard.flat).all()) for shard in self.shards)
        if self.group.max(torch.tensor([float(not finite)], device=self.group.device)).item():
            raise NonFiniteError(f"a weight is not finite after update {self.optimizer.updates - 1}; {ADVICE}")

    def begin_concept(self, number: int) -> None:
        """Reset moments and saliency, and open every weight until a mask is built."""
        self.optimizer.updates = 0
        self.mask.concept, self.mask.selections = number, 0
        for shard in self.shards:
            shard.saliency.zero_()
            shard.moments.reset()
        self.mask.open_all()

    def publish(self) -> None:
        """Copy the fp32 shards into the net's weights, as DeepSpeed does after a step."""
        if self.settings.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif self.settings.stage == 3:
            zero = self._engine.optimizer
            zero._partition_all_parameters()
            zero._reassign_or_swap_out_partitioned_parameters(0)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def masters(self) -> list[Tensor]:
        """A copy of this rank's fp32 shards, [n] each."""
        return [shard.flat.clone() for shard in self.shards]

    def set_masters(self, masters: Sequence[Tensor]) -> None:
        """Restore fp32 shards that `masters` returned, and publish them to the net."""
        for shard, master in zip(self.shards, masters):
            shard.flat.copy_(master)
        self.publish()

    def _fill_masters(self, stored: Stored) -> None:
        fragments = self._fragments()
        for name, tensor in stored(fragments):
            for shard, f in fragments[name]:
                shard.flat[f.here] = tensor.view(-1)[f.start : f.start + f.numel].to(shard.flat)

    def _fragments(self) -> dict[str, list[tuple[Shard, Fragment]]]:
        """This rank's fragments of each parameter, by name."""
        found: dict[str, list[tuple[Shard, Fragment]]] = {}
        for shard in self.shards:
            for fragment in shard.fragments:
                found.setdefault(fragment.name, []).append((shard, fragment))
        return found

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The trainable parameters in fp32, unsharded, one at a time: (name, tensor on rank 0 or None elsewhere)."""
        fragments = self._fragments()
        for name, size in self.sizes.items():
            whole = torch.zeros(size, device=self.group.device)
            for shard, f in fragments.get(name, []):
                whole[f.start : f.start + f.numel] = shard.flat[f.here]
            if not self.replicated:
                self.group.sum(whole)
            yield name, whole.view(self.shapes[name]).cpu() if self.group.is_first else None
