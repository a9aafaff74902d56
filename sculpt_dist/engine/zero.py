"""The engine: DeepSpeed ZeRO stages 0-3 behind a handful of verbs. The only importer of deepspeed besides `group.py`."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import ModelError, NonFiniteError
from sculpt_dist.engine.frozen import FrozenWeights
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.kernels import choose_kernel
from sculpt_dist.engine.mask import DynamicMask, MaskSettings
from sculpt_dist.engine.masked import Combine, MaskedAdamW
from sculpt_dist.engine.shards import Fragment, Shard, check_coverage, find_shards, parameter_sizes

ADVICE = "the last checkpoint stays; lower train.lr or look at the data of this concept"
Stored = Callable[[Container[str]], Iterable[tuple[str, Tensor]]]
TRIM_EVERY = 1 << 28  # bytes of loaded weights
REDUCE_BUCKET = 1 << 25  # elements of gradients that are reduced together
PERSISTENT = 100_000  # elements of a tensor up to which stage 3 has it whole always
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EngineSettings:
    stage: int
    precision: str  # fp32 or bf16
    micro_batch: int  # samples per rank, stream and backward
    accumulate: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    packed: bool = False  # moments are held for open weights only
    kernel: str = "auto"  # who computes the masked step (kernels/)
    gathered: float = 1e9  # parameters that stage 3 holds whole at a time


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
            model=net, optimizer=self.optimizer, config=_deepspeed_config(settings, group.size)
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


def sharded_net(
    empty: Callable[[], nn.Module],
    stored: Iterable[tuple[str, Tensor]],
    group: Group,
    settings: EngineSettings,
    shapes: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    """A net for stage 3, built without its weights and filled tensor by tensor, each cut into the ranks' parts as it arrives.

    `shapes` names what will arrive, in order; `stored` is read by the first rank alone. No rank ever holds more than its share and
    one whole tensor. Raises ModelError, on all ranks, when the net and the stored tensors do not fit.
    """
    import deepspeed
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        net = empty()
    expected = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    check_fit(shapes, expected)
    partition = deepspeed.zero.Init(
        config_dict_or_path=_deepspeed_config(settings, group.size), dtype=DTYPES[settings.precision], enabled=False
    )
    largest = max(math.prod(shape) for shape in expected.values())
    passing = torch.empty(
        largest, dtype=DTYPES[settings.precision], device=group.device
    )  # one buffer: the heap would fragment otherwise
    source, broken, since_trim = iter(stored), [], 0
    for name, shape in shapes.items():
        tensor = next(source)[1] if group.is_first else None
        whole = passing[: math.prod(shape)].view(shape)
        if tensor is not None:
            whole.copy_(tensor)
            if not torch.isfinite(whole).all():
                broken.append(name)
        parameter = nn.Parameter(whole, requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(module), leaf, parameter)
        partition._convert_to_zero_parameters([parameter])  # the first rank's values go to all, and each keeps its part
        del tensor
        since_trim += whole.nbytes
        if since_trim > TRIM_EVERY:
            return_free_memory()
            since_trim = 0
    broken = group.from_first(broken)
    if broken:
        raise ModelError(
            f"{len(broken)} weights of the net hold values that are not finite ({broken[0]}, ...); the checkpoint is damaged"
        )
    return net.eval()


def return_free_memory() -> None:
    """Give the holes that passing tensors left in the heap back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def check_fit(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object = "the net"
) -> None:
    """Raises ModelError when names or shapes of stored tensors are not those of the net."""
    wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
    if wrong:
        first = f"{wrong[0]}: stored {stored.get(wrong[0], 'none')}, config {expected.get(wrong[0], 'none')}"
        raise ModelError(
            f"{where}: {len(wrong)} weights do not fit config.json, first {first}; take both from one model"
        )


def fetched_ahead(gathered: float) -> int:
    """How many of the elements that stage 3 may hold whole are fetched before they are needed."""
    return int(min(5e7, gathered / 2))


def _deepspeed_config(settings: EngineSettings, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is told. Its clipping is off: it would scale the saliency, and see the norm of unmasked gradients."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero: dict[str, Any] = {"stage": settings.stage, "reduce_bucket_size": REDUCE_BUCKET}
    if (
        settings.stage in (1, 2) and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields
    ):  # not in its earlier versions
        zero["compute_grad_norm"] = False  # ours is of the masked gradient
    if settings.stage == 3:
        zero["sub_group_size"] = int(1e15)  # one flat shard per rank, so that one step sees the whole gradient
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = int(settings.gathered)
        zero["stage3_prefetch_bucket_size"] = fetched_ahead(settings.gathered)
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulate,
        "train_batch_size": settings.micro_batch * settings.accumulate * ranks,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
    if settings.precision == "bf16":
        config |= {
            "bf16": {"enabled": True},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return config
