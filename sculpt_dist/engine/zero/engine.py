"""The Engine: trains a net under DeepSpeed ZeRO stages 0-3, behind a few methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking.mask import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer.kernels import choose_kernel
from sculpt_dist.engine.optimizer.masked_adamw import Combine, MaskedAdamW, Pull
from sculpt_dist.engine.sharding.partitions import check_coverage, find_shards, parameter_sizes
from sculpt_dist.engine.sharding.shards import Fragment, Shard
from sculpt_dist.engine.zero.drawing import fits, gathered_net
from sculpt_dist.engine.zero.frozen_weights import FrozenWeights
from sculpt_dist.engine.zero.loading import return_free_memory
from sculpt_dist.engine.zero.settings import DTYPES, EngineSettings, deepspeed_config

ADVICE = "the last checkpoint is kept; lower train.lr or check the data of this concept"
Stored = Callable[[Container[str]], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all ranks."""

    terms: dict[str, float]  # of the loss: the mean over micro-batches and ranks
    grad_norm: float  # of the last update's masked gradient, before clipping
    update_norm: float  # of the last update, over all weights
    raised: tuple[bool, ...]  # whether any rank raised each flag


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
        empty: Callable[[], nn.Module] | None = None,
    ) -> None:
        """`trainable` names the parameters that may move; the rest is frozen. The engine takes over `net`.

        `stored` yields stored values of parameters by name: in a bf16 run the fp32 masters start from them, not from
        rounded copies. `empty` builds a net like it, for drawing with whole weights on stage 3.
        """
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns about client optimizers
        self.group, self.settings, self._empty = group, settings, empty
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
        self._losses: list[dict[str, Tensor]] = []  # of the present step's micro-batches
        self._update = 0  # number of the present step's update
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

    @contextmanager
    def drawing(self) -> Iterator[nn.Module]:
        """The net to draw with: on stage 3, where `engine.draw` asks for it, a whole one with the present weights."""
        draw, module = self.settings.draw, self._engine.module
        is_whole = self.settings.stage == 3 and self._empty is not None and draw != "sharded"
        if is_whole and (draw == "whole" or fits(module, self.group)):
            assert self._empty is not None
            yield gathered_net(module, self._empty, self.group.device)
            return_free_memory()
        else:
            yield self.net

    def snapshot(self) -> FrozenWeights:
        """A frozen copy of the net's present weights."""
        return FrozenWeights(self._engine, self.settings.stage)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; DeepSpeed divides the loss [] by the accumulation count."""
        self._engine.backward(loss)

    def record(self, terms: Mapping[str, Tensor]) -> None:
        """Keep the loss terms [] of one micro-batch for `end_step`; this waits for nothing."""
        self._losses.append({name: term.detach().float().reshape(()) for name, term in terms.items()})

    def step(self, phase: str, lr: float = 0.0, combine: Combine | None = None) -> None:
        """End a micro-batch. After the last one of a step the optimizer runs its `phase` (see MaskedAdamW).

        Raises NonFiniteError, on all ranks, when DeepSpeed finds an infinite gradient; `end_step` finds the others.
        """
        self.optimizer.phase = phase
        self.optimizer.param_groups[0]["lr"] = lr
        if combine is not None:
            self.optimizer.combine = combine
        boundary, before = self._engine.is_gradient_accumulation_boundary(), self.optimizer.steps_seen
        self._update = self.optimizer.updates
        self._engine.step()
        self.optimizer.phase = "hold"
        if boundary and self.optimizer.steps_seen == before:  # DeepSpeed skipped the optimizer
            self.end_step()  # a loss may be the cause
            raise NonFiniteError(f"the gradient is not finite at update {self._update}; {ADVICE}")

    def end_step(self, *flags: bool) -> StepResult:
        """What a step measured, over all ranks: one sum over them, and the step's one wait for the device.

        `flags`: what this rank tells the others. Raises NonFiniteError, on all ranks, when a recorded loss of any rank
        or the gradient is not finite. No checkpoint holds the weights of such a step.
        """
        losses, self._losses = self._losses, []
        own = [term for terms in losses for term in terms.values()]
        nothing = torch.zeros((), dtype=torch.float64, device=self.group.device)
        norm, moved = self.optimizer.measures()  # totals on stage 0; on the others only the norm is one
        norm = norm if self.group.is_first else nothing
        moved = moved if self.group.is_first or not self.replicated else nothing
        told = [torch.full_like(nothing, float(flag)) for flag in flags]
        total = self.group.sum(torch.stack([number.double() for number in (*own, norm, moved, *told)]))
        means = (total[: len(own)].float() / self.group.size).double()
        found = torch.cat([means, total[len(own) :]]).tolist()
        grad_norm, squares, *raised = found[len(own) :]
        self._check_finite(losses, found, grad_norm)
        terms: dict[str, float] = {}
        for name, mean in zip((name for part in losses for name in part), found):
            terms[name] = terms.get(name, 0.0) + mean / self.settings.accumulate
        update_norm = self.optimizer.param_groups[0]["lr"] * math.sqrt(squares)
        return StepResult(terms, grad_norm, update_norm, tuple(count > 0 for count in raised))

    def _check_finite(self, losses: Sequence[Mapping[str, Tensor]], means: Sequence[float], grad_norm: float) -> None:
        """Raises NonFiniteError for the first micro-batch with a mean that is not finite, else for the gradient.

        `means` begins with those of the terms of all micro-batches.
        """
        for terms in losses:
            of_ranks, means = means[: len(terms)], means[len(terms) :]
            if not all(map(math.isfinite, of_ranks)):
                here = {name: float(value) for name, value in terms.items()}
                where = "on another rank" if all(math.isfinite(value) for value in here.values()) else "here"
                named = ", ".join(f"{name} {value}" for name, value in here.items())
                raise NonFiniteError(
                    f"the loss is not finite {where} (rank {self.group.rank}: {named}) at update {self._update}; "
                    f"{ADVICE}"
                )
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the gradient is not finite at update {self._update}; {ADVICE}")

    def check_weights(self) -> None:
        """Raises NonFiniteError, on all ranks, when a trained weight is not finite.

        No loss tells after the last update of a concept.
        """
        finite = all(bool(torch.isfinite(shard.flat).all()) for shard in self.shards)
        if self.group.max(torch.tensor([float(not finite)], device=self.group.device)).item():
            raise NonFiniteError(f"a weight is not finite after update {self.optimizer.updates - 1}; {ADVICE}")

    def begin_concept(self, number: int) -> None:
        """Reset moments and saliency, and open every weight until a mask is built."""
        self.optimizer.begin()
        self.mask.concept, self.mask.selections = number, 0
        for shard in self.shards:
            shard.saliency.zero_()
            shard.moments.reset()
        self.mask.open_all()

    def open_ranks(self, ranks: range) -> None:
        """Train only these ranks of a LoRA adapter: rows of A [r, ...] and columns of B [out, r, ...]."""

        def chosen(name: str, places: Tensor) -> Tensor:
            shape = self.shapes[name]
            inner, kernel = math.prod(shape[1:]), math.prod(shape[2:])
            rank = places // inner if ".lora_A." in name else places % inner // kernel
            return (rank >= ranks.start) & (rank < ranks.stop)

        self.mask.open_where(chosen)

    def transform(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Replace every trained parameter by what `change` makes of (its name, the whole of it in fp32)."""
        fragments = self._fragments()
        for name, whole in self._whole(self.shapes):
            changed = change(name, whole).reshape(-1)
            for shard, f in fragments.get(name, []):
                shard.flat[f.here] = changed[f.start : f.start + f.numel]
        self.publish()

    def set_frozen(self, values: Mapping[str, Tensor]) -> None:
        """Set weights that do not train, by their stored names; the tensors are whole on every rank."""
        import deepspeed

        frozen = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self._engine.module.named_parameters()
            if not parameter.requires_grad
        }
        for name, value in values.items():
            sharded = [frozen[name]] if self.settings.stage == 3 else []
            with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)), torch.no_grad():
                frozen[name].copy_(value.to(frozen[name]))

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

    def pull_to_present(self, l1: float, l2: float) -> None:
        """From now on, pull the weights towards their present values in every update (see `Pull`)."""
        self.optimizer.pull = Pull(self.masters(), l1, l2)

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

    def full_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """These trainable parameters in fp32, unsharded, one at a time: (name, tensor on rank 0 or None elsewhere)."""
        for name, whole in self._whole(names):
            yield name, whole.cpu() if self.group.is_first else None

    def _whole(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These trainable parameters in fp32, whole on every rank, one at a time."""
        fragments = self._fragments()
        for name in names:
            whole = torch.zeros(self.sizes[name], device=self.group.device)
            for shard, f in fragments.get(name, []):
                whole[f.start : f.start + f.numel] = shard.flat[f.here]
            if not self.replicated:
                self.group.sum(whole)
            yield name, whole.view(self.shapes[name])
