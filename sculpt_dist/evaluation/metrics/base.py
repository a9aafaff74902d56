"""What a metric is, and how an evaluation finds its metrics.

Every other file of this folder is one metric, named after the file. It defines

    build(context, options) -> Metric | None    None when the configuration does not ask for the metric
    Options                                     a frozen dataclass; only for a metric with options of its own

`evaluate.metrics: {NAME: {OPTION: VALUE}}` names a metric and sets its options. `build` receives them as an instance
of `Options`, or None when the configuration does not name the metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sculpt_dist.config.load import merge_section
from sculpt_dist.config.schema import EvaluateConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin, plugins
from sculpt_dist.worlds.find import DEFAULT_WORLD, world_of

if TYPE_CHECKING:
    from sculpt_dist.evaluation.classifiers.clip import Encoder as ClipEncoder
    from sculpt_dist.evaluation.features import Features

PACKAGE = "sculpt_dist.evaluation.metrics"
ReferenceOf = Callable[[str, "Features", Sequence[Path]], Tensor]


class Metric(ABC):
    """A score with additive state: each rank updates with its images, the states are summed, `result` reads the sum."""

    @abstractmethod
    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Takes uint8 images [B, 3, h, w] and the B prompts they were drawn from."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Float64 sums only, because the states of several ranks are added."""

    @abstractmethod
    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores from the summed state. They appear under these names in scores.json, reports and comparisons."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a metric that has none."""


@dataclass(frozen=True)
class MetricContext:
    """What metrics are built from. Encoders and reference features load on first use and are shared by all metrics."""

    settings: EvaluateConfig
    num_images: int  # upper bound on the images of all ranks together
    first: int  # this rank numbers its images from here, so that no two ranks use the same number
    reference_of: ReferenceOf | None = None  # how to compute the features of the reference; None: here and now

    @cached_property
    def clip(self) -> ClipEncoder | None:
        """The model of `evaluate.clip`. Raises ModelError when the folder cannot be used."""
        if not self.settings.clip:
            return None
        from sculpt_dist.evaluation.classifiers.clip import Encoder

        return Encoder(self.settings.clip)

    @cached_property
    def features(self) -> Features:
        """Image features of `evaluate.clip`, or without it of the classifier of a world."""
        if self.clip is not None:
            return self.clip.image_features
        from sculpt_dist.evaluation.worlds import WorldEncoder

        return WorldEncoder(self._world).image_features

    @cached_property
    def reference(self) -> Tensor | None:
        """Features of the images in `evaluate.reference`, float64 [N, D]. Raises ConfigError or ModelError."""
        where = self.settings.reference
        if not where:
            return None
        if self.reference_of is not None:
            return self.reference_of(where, self.features, self._encoder_files)
        from sculpt_dist.evaluation.features import reference_features

        return reference_features(where, self.features)

    @property
    def _encoder_files(self) -> Sequence[Path]:
        """The files that decide what `features` computes."""
        if not self.settings.clip:
            from sculpt_dist.evaluation.worlds import encoder_file

            return [encoder_file(self._world)]
        folder = Path(self.settings.clip).expanduser()
        return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".txt"))

    @property
    def _world(self) -> str:
        """Whose classifier gives the features: that of the classifier, else of the reference, else the default one."""
        return world_of(self.settings.classifier) or world_of(self.settings.reference or "") or DEFAULT_WORLD

    def require(self, key: str, options: object | None) -> None:
        """Raises ConfigError when the configuration names a metric but leaves out `evaluate.<key>`, which it needs."""
        if options is not None and not getattr(self.settings, key):
            raise ConfigError(f"evaluate.{key} is not set, but a metric named in evaluate.metrics needs it: set it")


def build_metrics(
    settings: EvaluateConfig, num_images: int, first: int, reference_of: ReferenceOf | None = None
) -> list[Metric]:
    """The metrics that the settings ask for, sorted by name.

    All ranks together draw at most `num_images` images; this rank numbers its own from `first`. `reference_of` maps
    (`evaluate.reference`, encoder, the encoder's files) to features of the reference images, float64 [N, D].
    Raises ConfigError for an unknown metric or option, ConfigError or ModelError for a folder that cannot be used.
    """
    context = MetricContext(settings, num_images, first, reference_of)
    for name in settings.metrics or {}:
        plugin(PACKAGE, name, "evaluate.metrics")
    metrics = [_build(name, context) for name in plugins(PACKAGE)]
    return [metric for metric in metrics if metric is not None]


def _build(name: str, context: MetricContext) -> Metric | None:
    module = plugin(PACKAGE, name, "evaluate.metrics")
    options, named, key = None, context.settings.metrics or {}, f"evaluate.metrics.{name}"
    if name in named:
        section = vars(module).get("Options", NoOptions)
        options = merge_section(section, named[name], key, prefix=f"{key}.")
    metric: Metric | None = module.build(context, options)
    return metric
