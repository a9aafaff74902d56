"""Sculpting Memory: dynamic gradient mask and concept-aware loss (Li et al., arXiv 2504.09039, ICCV 2025).

Let e be the student, eT the teacher (the net before this concept), f the target, s the superclass, a the anchors, and
sg stop-gradient:

    L = MSE(e(x_f, c_f), sg label) + r MSE(e(x_s, c_s), goal_s) + d MSE(e(x_a, c_a), sg eT(x_a, c_a))

The published label is e(x_f, c_s). The default here is not in the paper: label = eT(x_f, c_s) + w (eT(x_f, c_s) -
eT(x_f, c_f)). The distillation term is a reconstruction: the paper's equation and weights for it could not be checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import EARLIER_TARGETS, StreamSpec
from sculpt_dist.maths.losses import guided_label, mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Request, Step


@dataclass(frozen=True)
class Config:
    """The options of dm_cal."""

    name: str = "dm_cal"
    """Name of this method."""
    retain_weight: float = 0.25
    """Weight of denoising the superclass, r."""
    distill_weight: float = 0.25
    """Weight of the distillation on anchors, d."""
    label_source: str = "teacher"
    """Net that gives the label: teacher, student (published) or original."""
    label_guidance: float = 1.0
    """Guidance of the label, w; 0 is published."""
    anchors: list[str] = field(default_factory=lambda: ["targets", "superclass", "keep"])
    """Sources of the anchor stream: targets (earlier ones), superclass, keep."""
    anchor_share: float | None = None
    """The superclass's share of the anchor stream, above 0 and below 1; null: as much as each earlier target has."""
    parts: list[str] = field(default_factory=lambda: ["q", "k", "v", "out"])
    """Matrices of the cross-attention that may move: q, k, v, out; and pooled, what takes in SDXL's pooled text."""
    reference_compat: bool = False
    """Reproduce the published code's behaviour, including its faults (see REFERENCE)."""


# Part -> group of parameters. `pooled` is not in the paper: it is the input of SDXL's pooled text, which may carry a
# style.
PARTS = {part: f"cross_attention.{part}" for part in ("q", "k", "v", "out")} | {"pooled": "pooled_text"}

# Name in `anchors` -> source of samples, in the order in which the sources share the stream.
ANCHORS = {"targets": EARLIER_TARGETS, "superclass": "superclass", "keep": "keep"}

REFERENCE = """With `reference_compat: true`
- the distillation term is computed but does not train;
- the label is the student's own, without guidance;
- moments of closed and opened weights are kept, so that closed weights keep moving on them;
- the schedule and the refreshes count the collect steps, too, so that the schedule never ends;
- the mask's progress is that of the tenth of the run in which a step lies, an epoch of the published code;
- the result is the candidate with the lowest mean forget loss over a ninth of the updates.
Not reproduced: rank-local masks, gradients of untrained weights, the moving bias of the output projection, ties that
all open, the decay of the first moment that goes through .95, .85, .95 with the learning rate (torch's OneCycleLR does
so unasked), and losses of the collect steps in the first candidate's mean."""


class Method(Base):
    """Trains the query, key, value and output matrices of the cross-attention, as the paper does, or some of them."""

    def __init__(self, config: Config) -> None:
        if config.label_source not in ("teacher", "student", "original"):
            raise ConfigError(f"method.label_source={config.label_source}: choose teacher, student or original")
        unknown = set(config.anchors) - set(ANCHORS)
        if unknown:
            raise ConfigError(f"method.anchors contains {sorted(unknown)}: choose from targets, superclass, keep")
        if config.anchor_share is not None and not 0 < config.anchor_share < 1:
            raise ConfigError(f"method.anchor_share={config.anchor_share}: give a share above 0 and below 1, or null")
        if config.anchor_share is not None and "superclass" not in config.anchors:
            raise ConfigError(
                f"method.anchor_share={config.anchor_share}: method.anchors lacks the superclass, whose share it is"
            )
        unknown = set(config.parts) - set(PARTS)
        if unknown or not config.parts:
            raise ConfigError(f"method.parts contains {sorted(unknown) or 'nothing'}: choose from {', '.join(PARTS)}")
        self.config = config
        self.compat = config.reference_compat
        self.label_source = "student" if self.compat else config.label_source
        self.label_guidance = 0.0 if self.compat else config.label_guidance
        self.needs_original = self.label_source == "original"
        self.needs_teacher = self.label_source == "teacher" or bool(config.anchors and config.distill_weight)
        self.reference_mask = self.compat

    def streams(self) -> Sequence[StreamSpec]:
        anchors = [ANCHORS[name] for name in ANCHORS if name in self.config.anchors]
        fixed = None if self.config.anchor_share is None else ("superclass", self.config.anchor_share)
        return (StreamSpec("target"), StreamSpec("superclass"), StreamSpec("anchor", tuple(anchors), fixed=fixed))

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return [name for part in self.config.parts for name in groups[PARTS[part]] if name.endswith(".weight")]

    def saliency(self, step: Step) -> Losses:
        """Plain denoising of the target, MSE(e(x_f, c_f), goal_f)."""
        target = step.batch.target
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, goal = step.corrupted(target, time, "target")
        return Losses({"saliency": mse(step.student(noisy, time, target.cond), goal)})

    def losses(self, step: Step) -> Losses:
        target, superclass, anchor = step.batch.target, step.batch.superclass, step.batch.anchor
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B], the same for target and superclass
        noisy_target, _ = step.corrupted(target, time, "target")
        noisy_superclass, goal = step.corrupted(superclass, time, "superclass")
        requests = [(noisy_target, time, target.cond), (noisy_superclass, time, superclass.cond)]
        anchored: list[Request] = []
        if anchor is not None and self.config.distill_weight:
            anchor_time = step.backbone.sample_time(step.rng.uniform("anchor time"))
            anchored = [(step.corrupted(anchor, anchor_time, "anchor")[0], anchor_time, anchor.cond)]
        labels = [(noisy_target, time, step.batch.target_as_superclass), requests[0]][: 2 if self.label_guidance else 1]
        if self.label_source == "teacher":  # one teacher forward for label and distillation
            answers = step.frozen("teacher").all(labels + anchored)
        else:
            source = step.student if self.label_source == "student" else step.frozen("original")
            answers = source.without_gradient(labels) + (step.frozen("teacher").all(anchored) if anchored else [])
        label = guided_label(answers[0], answers[1], self.label_guidance) if self.label_guidance else answers[0]
        predicted = step.student.all(requests + anchored)
        terms = {
            "forget": mse(predicted[0], label),
            "retain": self.config.retain_weight * mse(predicted[1], goal),
        }
        if anchored:
            trains = 0.0 if self.compat else 1.0
            terms["distill"] = trains * self.config.distill_weight * mse(predicted[2], answers[-1])
        return Losses(terms)

    def candidate_every(self, updates: int) -> int:
        return max(1, round(updates / 9)) if self.compat else 0

    def judge(self, recent: Mapping[str, float]) -> float:
        return recent["forget"]
