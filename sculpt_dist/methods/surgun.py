"""SurgUn: the target's prompt learns distractors while it loses the target (arXiv 2603.00975). A reconstruction.

Only the abstract is known: ascent on the target and descent on diverse distractors under the same target prompt, a
logarithmic contrast, adapters on chosen attention blocks, and a choice of blocks and checkpoints by the images that
they draw. All equations and numbers here are our own (UNVERIFIED). Let l(x, c) be the denoising loss of one sample, x_T
a sample of the target and x_D one of the distractors, both at the same time and under the target's prompt c. With
l_T = l(x_T, c) and l_D = l(x_D, c):

    log     L = mean l_D - b log(l_T / (l_T + l_D))
    ratio   L = mean b log(l_D / l_T)
    margin  L = mean l_D - b min(l_T, m)

Each sample has its own contrast, so that the loss does not depend on the number of ranks. `distractors` is how many
candidates become distractors: those farthest from one another and from the target in text space. The model before the
first concept draws their samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses, TextCond
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.distances import farthest_points
from sculpt_dist.maths.losses import mse_each
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Setup, Step, matrices

CONTRASTS = ("log", "ratio", "margin")


@dataclass(frozen=True)
class Config:
    """The options of surgun."""

    name: str = "surgun"
    """Name of this method."""
    contrast: str = "log"
    """Form of the contrast: log, ratio or margin."""
    contrast_weight: float = 0.1
    """Weight of the contrast, b."""
    margin: float = 1.0
    """Largest loss of the target that counts in the margin form, m."""
    distractors: int = 4
    """Number of distractors per concept."""
    candidates: list[str] = field(
        default_factory=lambda: (
            "apple, airplane, bicycle, book, bridge, butterfly, cake, camera, castle, chair, clock, cloud, coin, cup, "
            "drum, elephant, flower, fountain, guitar, hat, horse, island, key, ladder, lamp, leaf, lighthouse, moon, "
            "mountain, mushroom, piano, robot, sailboat, shell, shoe, snowman, table, telescope, train, tree, "
            "umbrella, volcano, waterfall, windmill"
        ).split(", ")
    )
    """Objects from which distractors are chosen; the run's own concepts are left out."""
    style_candidates: list[str] = field(
        default_factory=lambda: [
            "oil painting",
            "pencil sketch",
            "pixel art",
            "watercolor",
            "photorealistic",
            "cubist",
            "mosaic",
            "comic",
        ]
    )
    """Styles from which distractors of a style are chosen."""
    blocks: list[int] = field(default_factory=list)
    """Numbers of the blocks that train (`block.K` groups); empty trains all. See `sculpt-dist localize`."""
    attention: list[str] = field(default_factory=lambda: ["cross_attention", "self_attention"])
    """Kinds of attention that train: cross_attention, self_attention."""
    rank: int = 16
    """Rank of the adapter; 0 trains the blocks' own weights."""
    calibrations: int = 0
    """Candidates per concept, of which the best is kept; 0 keeps the last weights."""
    calibration_images: int = 1
    """Images per object and style, drawn of each candidate."""


class Method(Base):
    """Trains an adapter on the attention matrices of the chosen blocks, or these matrices themselves."""

    needs_teacher = False

    def __init__(self, config: Config) -> None:
        if config.contrast not in CONTRASTS:
            raise ConfigError(f"method.contrast={config.contrast}: choose one of {', '.join(CONTRASTS)}")
        if config.distractors < 1:
            raise ConfigError(f"method.distractors={config.distractors}: must be at least 1")
        if not config.attention or set(config.attention) - {"cross_attention", "self_attention"}:
            raise ConfigError(f"method.attention={list(config.attention)}: choose from cross_attention, self_attention")
        if config.calibrations and config.calibration_images < 1:
            raise ConfigError(
                f"method.calibration_images={config.calibration_images}: checkpoints are judged by images; use at "
                "least 1"
            )
        self.config = config
        self.calibration_images = config.calibration_images if config.calibrations else 0

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target"), StreamSpec("distractor"))

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        attention = [name for kind in self.config.attention for name in matrices(groups, kind)]
        chosen = {name for block in self.config.blocks for name in matrices(groups, f"block.{block}")}
        names = [name for name in attention if not self.config.blocks or name in chosen]
        if not names:
            raise ConfigError(
                f"method.blocks={list(self.config.blocks)}: no {' or '.join(self.config.attention)} in these blocks"
            )
        return names

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any] | None:
        if not self.config.rank:
            return None
        layers = [name.removesuffix(".weight") for name in self.trainable(groups)]
        return {"r": self.config.rank, "lora_alpha": self.config.rank, "target_modules": layers}

    def extra_concepts(self, setup: Setup) -> Mapping[str, Sequence[str]]:
        concept = setup.concepts[setup.concept]
        listed = self.config.candidates if concept.kind == "object" else self.config.style_candidates
        taken = {normal(name) for other in setup.concepts for name in (other.target, other.superclass or "")}
        names = [name for name in dict.fromkeys(listed) if normal(name) not in taken]
        if len(names) < self.config.distractors:
            raise ConfigError(
                f"method.distractors={self.config.distractors}, but only {len(names)} candidates are no concept of "
                "this run"
            )
        meanings = text_points(
            setup.backbone.embed([setup.prompts.of([name])[0] for name in [concept.target, *names]])
        )  # [1 + n, D]
        chosen = farthest_points(meanings[1:], meanings[0], self.config.distractors)
        return {"distractor": [names[i] for i in chosen]}

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        target, distractor, config = step.batch.target, step.batch.distractor, self.config
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B], the same for both
        noisy_target, goal_target = step.corrupted(target, time, "target")
        noisy_distractor, goal_distractor = step.corrupted(distractor, time, "distractor")
        of_target, of_distractor = step.student.all(
            [(noisy_target, time, target.cond), (noisy_distractor, time, step.batch.distractor_as_target)]
        )
        lost, learned = mse_each(of_target, goal_target), mse_each(of_distractor, goal_distractor)  # l_T, l_D [B]
        if config.contrast == "ratio":
            return Losses({"contrast": config.contrast_weight * (learned / lost).log().mean()})
        if config.contrast == "margin":
            return Losses(
                {"learn": learned.mean(), "contrast": -config.contrast_weight * lost.clamp(max=config.margin).mean()}
            )
        return Losses(
            {"learn": learned.mean(), "contrast": -config.contrast_weight * (lost / (lost + learned)).log().mean()}
        )

    def candidate_every(self, updates: int) -> int:
        return max(1, updates // self.config.calibrations) if self.config.calibrations else 0

    def judge(self, recent: Mapping[str, float]) -> float:
        retained = [recent[name] for name in ("IRA", "CRA") if name in recent]  # a classifier may know no styles
        return -(recent.get("UA", 0.0) + (sum(retained) / len(retained) if retained else 0.0))


def text_points(cond: TextCond) -> Tensor:
    """One point per prompt, [B, D]: the mean of its tokens, padding left out where it is masked."""
    if cond.token_mask is None:
        return cond.tokens.float().mean(1)
    weight = cond.token_mask.float().unsqueeze(-1)  # [B, L, 1]
    return (cond.tokens.float() * weight).sum(1) / weight.sum(1)
