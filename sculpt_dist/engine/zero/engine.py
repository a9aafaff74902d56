"""The engine: DeepSpeed ZeRO stages 0-3 behind a handful of verbs. The only importer of deepspeed besides `group.py`."""

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

ADVICE = "the last checkpoint stays; lower train.lr or look at the data of this concept"
Stored = Callable[[Container[str]], Iterable[tuple[str, Tensor]]]


class Engine:
    """A net whose trainable part is optimised over all ranks; every verb is entered by all of them."""

    def __init__(
        self,
        net: nn.Module,
        trainable: Sequence[str],
        group: Group,
        settings: EngineSettings,
        mask: MaskSettings,
        stored: Stored,
    ) -> None:
        """`trainable` names the parameters that may move; the rest is frozen. `net` belongs to the engine from now on.

        `stored` gives the stored values of parameters by name: in a bf16 run the fp32 masters start from those, not from rounded copies.
        """
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of any optimizer that is not its own
        self.group, self.settings = group, settings
        names = set(trainable)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in names)
        net.to(group.device, DTYPES[settings.precision])
        net.eval()  # no dropout: the pseudo label and the student see the same net
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
        return_free_memory()  # what building it left

    @property
    def net(self) -> nn.Module:
        """What a backbone's `denoise` calls."""
        return self._engine

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.precision]

    def snapshot(self) -> FrozenWeights:
        """The net as it is now, frozen."""
        return FrozenWeights(self._engine, self.settings.stage)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch; the loss [] is divided by the accumulation count."""
        self._engine.backward(loss)

    def step(self, phase: str, lr: float = 0.0, combine: Combine | None = None) -> None:
        """End a micro-batch; at the last one of a step the optimizer acts as `phase` says (see MaskedAdamW).

        Raises NonFiniteError, on all ranks alike, when the gradient is not finite.
        """
        self.optimizer.phase = phase
        self.optimizer.param_groups[0]["lr"] = lr
        if combine is not None:
            self.optimizer.combine = combine
        boundary, before = self._engine.is_gradient_accumulation_boundary(), self.optimizer.steps_seen
        self._engine.step()
        self.optimizer.phase = "hold"
        if (
            boundary and self.optimizer.steps_seen == before
        ):  # DeepSpeed found an infinite gradient and skipped its optimizer
            raise NonFiniteError(f"the gradient is not finite at update {self.optimizer.updates}; {ADVICE}")
        if boundary and phase == "train" and not math.isfinite(self.optimizer.grad_norm):
            raise NonFiniteError(f"the gradient is not finite at update {self.optimizer.updates - 1}; {ADVICE}")

    def agree_finite(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each loss term [] over ranks. Raises NonFiniteError on all ranks when any rank's term is not finite."""
        mine = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
        means = (self.group.sum(mine.clone()) / self.group.size).tolist()
        if not all(math.isfinite(mean) for mean in means):
            where = "here" if not bool(torch.isfinite(mine).all()) else "on another rank"
            named = ", ".join(f"{name} {value}" for name, value in zip(terms, mine.tolist()))
            raise NonFiniteError(
                f"the loss is not finite {where} (rank {self.group.rank}: {named}) at update {self.optimizer.updates}; {ADVICE}"
            )
        return dict(zip(terms, means))

    def begin_concept(self, number: int) -> None:
        """New moments, new saliency, every weight open until a mask is built."""
        self.optimizer.updates = 0
        self.mask.concept, self.mask.selections = number, 0
        for shard in self.shards:
            shard.saliency.zero_()
            shard.moments.reset()
        self.mask.open_all()

    def publish(self) -> None:
        """Make the net compute with the fp32 shards as they are now: what DeepSpeed does after a step."""
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
        """Put fp32 shards back, as `masters` gave them, and let the net compute with them."""
        for shard, master in zip(self.shards, masters):
            shard.flat.copy_(master)
        self.publish()

    def _fill_masters(self, stored: Stored) -> None:
        fragments = self._fragments()
        for name, tensor in stored(fragments):
            for shard, f in fragments[name]:
                shard.flat[f.here] = tensor.view(-1)[f.start : f.start + f.numel].to(shard.flat)

    def _fragments(self) -> dict[str, list[tuple[Shard, Fragment]]]:
        """Where this rank's part of each parameter lies."""
        here: dict[str, list[tuple[Shard, Fragment]]] = {}
        for shard in self.shards:
            for fragment in shard.fragments:
                here.setdefault(fragment.name, []).append((shard, fragment))
        return here

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The trainable parameters in fp32, whole, one at a time: (name, its tensor on rank 0, None elsewhere)."""
        here = self._fragments()
        for name, size in self.sizes.items():
            whole = torch.zeros(size, device=self.group.device)
            for shard, f in here.get(name, []):
                whole[f.start : f.start + f.numel] = shard.flat[f.here]
            if not self.replicated:
                self.group.sum(whole)
            yield name, whole.view(self.shapes[name]).cpu() if self.group.is_first else None
