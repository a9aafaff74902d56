"""What a run would need: memory of a rank, traffic and time of a step, and the cheapest change that makes it fit. No weights, no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sculpt_dist.config.load import check, check_batch
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.masking import payload_bytes
from sculpt_dist.engine.zero import PERSISTENT, REDUCE_BUCKET, fetched_ahead
from sculpt_dist.maths.planning import Buckets, Kept, Layout, Rates, peak, resting, step_seconds, traffic
from sculpt_dist.methods.base import Method
from sculpt_dist.planning.check import first_step, loss_functions, open_backbone, open_trainable, shard_elements
from sculpt_dist.planning.rehearsal import living_bytes, rehearse
from sculpt_dist.run.preflight import check_settings

WIDTHS = {"fp32": 4, "bf16": 2}
TABLE = tuple(2**i for i in range(11))  # ranks, 1 to 1,024
GIGA = 1e9
FEW = 1e8  # elements that stage 3 may hold whole where memory is short


class Subject:
    """A run's model and method on the meta device, and one micro-batch of them rehearsed."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        """Raises ConfigError and ModelError, as `check.check_run`."""
        prompts, method, plan, self.micro_batch = check_settings(config, ranks)
        if plan is None or not isinstance(method, Method):
            raise ConfigError(
                f"method.name={config.method.get('name')}: is a closed form, which trains nothing: there is no step to plan"
            )
        self.backbone = backbone = open_backbone(config, prompts)
        self.trained = open_trainable(config, method, backbone)
        if config.engine.checkpointing:
            backbone.net.enable_gradient_checkpointing()
        self.sizes = [parameter.numel() for parameter in backbone.net.parameters()]
        self.method, step = first_step(method, plan, backbone, prompts, self.micro_batch)
        functions = loss_functions(self.method, plan).values()
        rehearsed = [rehearse(lambda: function(step), backbone.net) for function in functions]  # noqa: B023 (called within this turn)
        self.training = rehearsed[1:] if plan.collect else rehearsed
        self.steps = [rehearsed[:1], self.training] if plan.collect else [self.training]
        self.walks = step.trajectory.latents is not None
        self.refresh = plan.refresh if plan.masked else 0
        self.encoders = sum(
            p.numel() * p.element_size() for name in backbone.parts for p in backbone.part(name).parameters()
        )
        self.embeddings = sum(
            t.nbytes for cond in backbone._embedded.values() for t in vars(cond).values() if t is not None
        )

    @property
    def flops(self) -> float:
        """Operations of a training micro-batch."""
        return float(sum(group.forward_flops + group.backward_flops for group in self.training))

    def drawing(self, batch: int) -> int:
        """Bytes while so many images are drawn: the autoencoder, the text encoders, and what lives in a guided forward or in decoding."""
        backbone, device = self.backbone, torch.device("meta")
        cond = backbone.with_size_ids(backbone.embed([""] * 2 * batch, negative=True))
        noisy = torch.empty(2 * batch, *backbone.latent_shape, device=device)
        time = backbone.sample_time(torch.zeros(2 * batch, device=device))
        forward = living_bytes(lambda: backbone.denoise(backbone.net, noisy, time, cond), backbone.net)
        return self.encoders + max(forward, living_bytes(lambda: backbone.decode(noisy[:batch]), backbone.vae))

    def layout(self, stage: int, precision: str, ranks: int) -> Layout:
        sizes, large = self.sizes, [size for size in self.sizes if size > PERSISTENT]
        return Layout(
            parameters=sum(sizes),
            trained=tuple(self.trained),
            stage=stage,
            ranks=ranks,
            width=WIDTHS[precision],
            shard=shard_elements(self.trained, stage, ranks),
            sharded=sum(-(-size // ranks) for size in sizes) if stage == 3 else sum(sizes),
            large=sum(large),
            large_tensors=len(large),
        )


class Planner:
    """Plans of one configuration and of what it could be changed to; each model and micro-batch is rehearsed once."""

    def __init__(self, device: str) -> None:
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device}: choose cpu or cuda")
        self.whole = device == "cuda"
        self._subjects: dict[tuple[str, int, bool], Subject] = {}
        self._drawn: dict[tuple[str, int], int] = {}

    def subject(self, config: RunConfig, ranks: int) -> Subject:
        micro = check_settings(config, ranks)[3]
        key = (config.engine.precision, micro, config.engine.checkpointing)
        if key not in self._subjects:
            self._subjects[key] = Subject(config, ranks)
        return self._subjects[key]

    def buckets(self, config: RunConfig) -> Buckets:
        gathered = config.engine.gathered
        return Buckets(REDUCE_BUCKET, fetched_ahead(gathered), int(gathered), self.whole)

    def memory(self, config: RunConfig, ranks: int, subject: Subject) -> dict[str, float]:
        """Bytes of a rank by part: those of the fullest moment of a step, and `drawing`, which is another moment."""
        layout, kept = subject.layout(config.engine.stage, config.engine.precision, ranks), self._kept(config, subject)
        parts = peak(layout, kept, self.buckets(config), subject.steps, config.train.accumulate)
        still = resting(layout, kept)
        beside = sum(still.values()) if config.evaluate.enabled or config.engine.stage == 3 else still["weights"]
        batch = max(
            config.prepare.batch if subject.method.samples else 0,
            config.evaluate.batch if config.evaluate.enabled else 0,
        )
        return parts | {"drawing": beside + self._drawing(config, subject, batch) if batch else 0.0}

    def _drawing(self, config: RunConfig, subject: Subject, batch: int) -> int:
        key = (config.engine.precision, batch)
        if key not in self._drawn:
            self._drawn[key] = subject.drawing(batch)
        return self._drawn[key]

    def _kept(self, config: RunConfig, subject: Subject) -> Kept:
        method, packed = subject.method, config.engine.moments == "open"
        return Kept(
            moments=8 * config.mask.keep if packed else 8.0,
            teachers=2 if method.needs_original else 1,
            loss_groups=len(subject.training),
            candidate=bool(method.candidate_every(config.train.steps)),
            copies=config.train.background_save and config.train.checkpoint_every > 0,
            embeddings=subject.embeddings,
            packed=packed,
        )


def plan_run(
    config: RunConfig, ranks: int, memory: float, rates: Rates | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """What each of `ranks` ranks with `memory` bytes would hold, send and take; `rates` None: no times.

    Counted are tensors: not what kernels use inside, nor the CUDA context, nor what an allocator loses between tensors. Raises
    ConfigError and ModelError, as `check.check_run`, and ConfigError where nothing trains.
    """
    if not memory > 0:
        raise ConfigError(f"--memory {memory / GIGA:g}: must be more than 0 GB")
    planner = Planner(device)
    subject = planner.subject(config, ranks)
    stage, precision, accumulate = config.engine.stage, config.engine.precision, config.train.accumulate
    parts = planner.memory(config, ranks, subject)
    layout = subject.layout(stage, precision, ranks)
    flops = subject.flops * accumulate
    found: dict[str, Any] = {
        "net": type(subject.backbone.net).__name__,
        "parameters": layout.parameters,
        "trainable": layout.elements,
        "device": device,
        "ranks": ranks,
        "stage": stage,
        "precision": precision,
        "micro_batch": subject.micro_batch,
        "accumulate": accumulate,
        "memory": memory,
        "bytes": {name: round(size) for name, size in parts.items() if name != "drawing"},
        "flops_per_step": flops,
        "refresh_payload": _refresh(config, subject, ranks),
    }
    if subject.walks:
        found["assumed"] = "of the latents that the method draws itself, one sampler step per update"
    found |= _row(planner, config, subject, ranks, memory, flops, rates)
    found["change"] = None if found["fits"] else cheapest_change(planner, config, ranks, memory)
    found["table"] = [_row(planner, config, subject, k, memory, flops, rates) for k in TABLE]
    return found


def step_flops(config: RunConfig, ranks: int) -> float:
    """Operations of a rank's training step, counted."""
    return Subject(config, ranks).flops * config.train.accumulate


def _row(
    planner: Planner, config: RunConfig, subject: Subject, ranks: int, memory: float, flops: float, rates: Rates | None
) -> dict[str, Any]:
    """The same micro-batch on so many ranks."""
    parts = planner.memory(config, ranks, subject)
    layout = subject.layout(config.engine.stage, config.engine.precision, ranks)
    forwards = sum(len(group.forwards) for group in subject.training)
    sent = traffic(layout, planner.buckets(config), forwards, config.train.accumulate, len(subject.training))
    drawing = parts.pop("drawing")
    row: dict[str, Any] = {
        "ranks": ranks,
        "peak": round(sum(parts.values())),
        "drawing": round(drawing),
        "fits": max(sum(parts.values()), drawing) <= memory,
        "payload": {name: round(size) for name, size in sent.payload.items()},
        "collectives": sent.collectives,
    }
    if rates is not None:
        seconds = step_seconds(flops, layout, sent, rates)
        total = sum(seconds.values())
        row |= {"seconds": seconds, "step_seconds": total}
        row["samples_per_second"] = subject.micro_batch * config.train.accumulate * ranks / total
    return row


def _refresh(config: RunConfig, subject: Subject, ranks: int) -> int:
    """Bytes of a refresh of the mask."""
    slots = len(subject.trained)
    sharded = ranks > 1 and config.engine.stage > 0 and config.mask.keep < 1
    return payload_bytes(slots if config.mask.scope == "matrix" else 1, slots, ranks) if sharded else 0


Change = Mapping[str, Any]  # key of the configuration (or "ranks") -> value


def cheapest_change(planner: Planner, config: RunConfig, ranks: int, memory: float) -> dict[str, Any] | None:
    """What makes a run fit: the first change that does alone, from what costs nothing to what costs most; else the first ones together.

    Of those together, what turns out not to be needed is left out again. None where nothing fits on 1,024 ranks.
    """
    method = planner.subject(config, ranks).method

    def size(changes: Sequence[Change]) -> int:
        changed, count = _changed(config, ranks, changes)
        parts = planner.memory(changed, count, planner.subject(changed, count))
        drawing = parts.pop("drawing")
        return round(max(sum(parts.values()), drawing))

    together: list[Change] = []
    found = next(([change] for change in _changes(config, ranks, method) if size([change]) <= memory), None)
    while found is None:
        further = next(_changes(*_changed(config, ranks, together), method), None)
        if further is None:
            return None
        together.append(further)
        found = together if size(together) <= memory else None
    for change in found[::-1] if len(found) > 1 else []:
        without = [other for other in found if other is not change]
        if _is_valid(*_changed(config, ranks, without)) and size(without) <= memory:
            found = without
    merged = {key: value for change in found for key, value in change.items()}
    overrides = [f"{key}={str(value).lower()}" for key, value in merged.items() if key != "ranks"]
    return {"overrides": overrides, "ranks": merged.get("ranks", ranks), "peak": size(found)}


def _changed(config: RunConfig, ranks: int, changes: Sequence[Change]) -> tuple[RunConfig, int]:
    for key, value in ((key, value) for change in changes for key, value in change.items()):
        if key == "ranks":
            ranks = value
            continue
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config, ranks


def _is_valid(config: RunConfig, ranks: int) -> bool:
    try:
        check(config)
        check_batch(config, ranks)
    except ConfigError:
        return False
    return True


def _changes(config: RunConfig, ranks: int, method: Method) -> Iterator[Change]:
    """What can still be changed, cheapest first: it costs nothing, waiting, smaller passes, more passes, rounding, traffic, machines."""
    drawn = max(config.prepare.batch, config.evaluate.batch)
    if config.engine.moments == "all" and config.mask.keep < 1 and not method.reference_mask:
        yield {"engine.moments": "open"}
    if drawn > 1:
        yield {f"{part}.batch": min(getattr(config, part).batch, drawn // 2) for part in ("prepare", "evaluate")}
    if config.train.background_save:
        yield {"train.background_save": False}
    if config.train.batch % (config.train.accumulate * 2 * ranks) == 0:
        yield {"train.accumulate": config.train.accumulate * 2}
    if not config.engine.checkpointing:
        yield {"engine.checkpointing": True}
    if config.engine.precision == "fp32":
        yield {"engine.precision": "bf16", "engine.stage": max(2, config.engine.stage)}
    if config.engine.stage < 3 and ranks > 1:
        yield {"engine.stage": max(2, config.engine.stage + 1)}
    if config.engine.stage == 3 and ranks > 1 and config.engine.gathered > FEW:
        yield {"engine.gathered": FEW}
    if ranks * 2 <= TABLE[-1]:
        divides = config.train.batch % (ranks * 2 * config.train.accumulate) == 0
        yield {"ranks": ranks * 2} if divides else {"ranks": ranks * 2, "train.batch": config.train.batch * 2}
