"""The basis of a plan: a run's model and method on the meta device, and a rehearsal of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.zero import PERSISTENT
from sculpt_dist.maths.planning import Kept, Layout
from sculpt_dist.methods.base import Method
from sculpt_dist.planning.check import first_step, loss_functions, open_on_meta, open_trainable, shard_elements
from sculpt_dist.planning.rehearsal import Counted, counted, rehearse
from sculpt_dist.run.setup import resolve

WIDTHS = {"fp32": 4, "bf16": 2}  # bytes of a number


@dataclass(frozen=True)
class Drawing:
    """Counts of a batch of drawn images, without the net."""

    batch: int
    encoders: int  # bytes of the text encoders and the autoencoder
    forward: Counted  # guided, of one sampler step
    decoding: Counted

    @property
    def bytes(self) -> int:
        return self.encoders + max(self.forward.bytes, self.decoding.bytes)


class Subject:
    """Counts of a configuration's model and method: sizes, operations, and bytes that are alive in a step."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        """Raises ConfigError and ModelError, as `check.check_run`, and ConfigError where nothing trains."""
        setup = resolve(config)
        if setup.plan is None:
            raise ConfigError(
                f"method.name={setup.method_name}: is a closed form or a guard, without training steps: there is "
                "nothing to plan"
            )
        self.micro_batch = setup.micro_batch(ranks)
        self.backbone = backbone = open_on_meta(setup)
        self.trained = open_trainable(setup, backbone)
        if config.engine.checkpointing:
            backbone.net.enable_gradient_checkpointing()
        self.sizes = [parameter.numel() for parameter in backbone.net.parameters()]
        self.method: Method
        self.method, step = first_step(setup, backbone, self.micro_batch)
        plan = setup.plan
        functions = loss_functions(self.method, plan).values()
        rehearsed = [rehearse(lambda: function(step), backbone.net) for function in functions]  # noqa: B023 (called at once)
        self.training = rehearsed[1:] if plan.collect else rehearsed
        self.steps = [rehearsed[:1], self.training] if plan.collect else [self.training]
        self.walks = step.trajectory.latents is not None
        self.refresh = plan.refresh if plan.masked else 0
        parts = [backbone.part(name) for name in backbone.parts]
        self.encoders = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        self.embeddings = backbone.embeddings.num_bytes

    @property
    def flops(self) -> float:
        """Operations of a training micro-batch."""
        return float(sum(group.forward_flops + group.backward_flops for group in self.training))

    def drawing(self, batch: int) -> Drawing:
        """What it takes to draw `batch` images: a guided forward for each sampler step, then the decoding."""
        backbone, device = self.backbone, torch.device("meta")
        cond = backbone.with_size_ids(backbone.embed([""] * 2 * batch, negative=True))
        noisy = torch.empty(2 * batch, *backbone.latent_shape, device=device)
        time = backbone.sample_time(torch.zeros(2 * batch, device=device))
        forward = counted(lambda: backbone.denoise(backbone.net, noisy, time, cond), backbone.net)
        return Drawing(batch, self.encoders, forward, counted(lambda: backbone.decode(noisy[:batch]), backbone.vae))

    def prompt_flops(self) -> int:
        """Operations of the text encoders for a prompt."""
        return counted(lambda: self.backbone.encode_prompts([""], False), self.backbone.net).flops

    def layout(self, stage: int, precision: str, ranks: int) -> Layout:
        """How the net's tensors are spread over `ranks` ranks."""
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

    def kept(self, config: RunConfig) -> Kept:
        """What a rank keeps from step to step in addition to the net."""
        packed = config.engine.moments == "open"
        return Kept(
            moments=8 * config.mask.keep if packed else 8.0,
            teachers=int(self.method.needs_teacher) + int(self.method.needs_original),
            loss_groups=len(self.training),
            candidate=bool(self.method.candidate_every(config.train.steps)),
            copies=config.train.background_save and config.train.checkpoint_every > 0,
            embeddings=self.embeddings,
            packed=packed,
            pulled=bool(config.train.l1sp or config.train.l2sp),
        )
