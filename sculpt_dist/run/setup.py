"""What a run works with, resolved once from its configuration and then handed down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.checks import check_batch
from sculpt_dist.config.schema import Concept, PrepareConfig, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import text_sha256
from sculpt_dist.data.images import own_images
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.evaluation.requests import Evaluation, resolve_evaluation
from sculpt_dist.guards.base import Guard
from sculpt_dist.methods.base import Editor, Method, load_method
from sculpt_dist.run.fingerprint import config_fingerprint
from sculpt_dist.run.folder import check_checkpoint, check_inputs
from sculpt_dist.run.hardening import Hardened
from sculpt_dist.run.holding import Holding, hold_prompts
from sculpt_dist.run.plan import Plan, make_plan
from sculpt_dist.worlds.find import world as find_world
from sculpt_dist.worlds.find import world_of

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group


@dataclass(frozen=True)
class RunSetup:
    """A configuration with the method, plan, prompts and images that it stands for."""

    config: RunConfig
    method: Method | Editor | Guard
    plan: Plan | None  # the steps of each concept; None for a method in closed form and for a guard
    prompts: tuple[ConceptPrompts, ...]  # of each concept
    held: tuple[str, ...] = ()  # prompts that the run holds

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(self.config.concepts)

    @property
    def first_concept(self) -> int:
        """The concept with which training begins: the last one stands for all that train together."""
        return len(self.concepts) - 1 if self.config.train.together else 0

    def trained_with(self, number: int) -> range:
        """The concepts that train when it is the turn of concept `number`."""
        return range(number + 1) if self.config.train.together else range(number, number + 1)

    @property
    def method_name(self) -> str:
        return str(self.config.method.get("name", "dm_cal"))

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def scores(self) -> bool:
        """Whether the run draws images and scores them."""
        calibrates = isinstance(self.method, Method) and self.method.calibration_images > 0
        return self.config.evaluate.enabled or calibrates

    @property
    def trained(self) -> tuple[Method, Plan]:
        """The method and the plan of its steps, for what only a method that trains can do."""
        assert isinstance(self.method, Method) and self.plan is not None
        return self.method, self.plan

    @cached_property
    def evaluation(self) -> Evaluation:
        """The images to draw and score. Raises ConfigError where the configuration is incomplete."""
        resolved = resolve_evaluation(self.config.evaluate, self.config.concepts, self.held)
        return replace(resolved, shared=self.config.prepare.folder)

    @cached_property
    def evaluation_between(self) -> Evaluation:
        """That of the stages between the base and the last one. Raises ConfigError for too small a subset."""
        between = self.evaluation.part(self.config.evaluate.subset)
        assert between.requests
        return between

    @cached_property
    def fingerprint(self) -> str:
        """A checksum over everything in the configuration that decides the result."""
        return config_fingerprint(self.config)

    def micro_batch(self, ranks: int) -> int:
        """Samples per stream of one rank's micro-batch. Raises ConfigError where the batch does not divide."""
        if ranks < 1:
            raise ConfigError(f"ranks={ranks}: must be at least 1")
        micro = check_batch(self.config, ranks)
        if self.plan is not None:
            from sculpt_dist.data.streams import Layout

            layout = Layout(self.config.train.batch, ranks, 0, self.config.train.accumulate)
            for spec in self.trained[0].streams():
                layout.shared(spec)
        return micro

    def check_checkpoint(self, path: Path, state: Mapping[str, Any], fingerprints: Mapping[str, str]) -> bool:
        """Whether another configuration or other data made a checkpoint. Raises RunFolderError unless accepted."""
        targets = [concept.target for concept in self.concepts]
        return check_checkpoint(path, state, fingerprints, self.config.run.override, targets)

    def join_ranks(self) -> Group:
        """The ranks of this job. Raises LaunchError when they come with different run folders or configurations."""
        from sculpt_dist.engine.group import Group

        attacks = text_sha256(repr((self.config.attack, self.config.evaluate.attacks)))[:12]
        identity = f"run.folder={self.config.run.folder}, configuration {self.fingerprint[:12]}, attacks {attacks}"
        return Group(self.config.engine.timeout, identity)


def check_images(prepare: PrepareConfig, concepts: Sequence[Concept]) -> None:
    """Raises ConfigError where the user gives images, but none of a target."""
    for concept in concepts if prepare.images is not None else ():
        images, _ = own_images(prepare.images, concept.target)
        if not images and prepare.images_missing == "refuse":
            raise ConfigError(
                f"prepare.images={prepare.images}: has no folder {concept.target!r}; add it, or let the model draw "
                "what is missing with prepare.images_missing=draw"
            )


def check_world(config: RunConfig) -> None:
    """Raises ConfigError for an unknown world, or a shipped model judged by the classifier of another world."""
    wanted, judge = config.model.world, world_of(config.evaluate.classifier)
    find_world(wanted)
    if config.model.path is None and config.evaluate.enabled and judge not in (None, wanted):
        raise ConfigError(
            f"model.world={wanted} and evaluate.classifier={config.evaluate.classifier}: the shipped model of a world "
            f"is not judged by another world; start from a configuration of {wanted}/, or set the classifier to null"
        )


def check_method(config: RunConfig, method: Method) -> None:
    """Raises ConfigError for settings with which a method that trains cannot run."""
    if config.train.together and not method.takes_together:
        raise ConfigError(f"train.together=true: {_named(config)} trains one concept after another; set it to false")
    if config.mask.keep < 1 and method.rank_per_concept:
        raise ConfigError(
            f"mask.keep={config.mask.keep}: {_named(config)} opens each concept's own ranks of its adapter; set it to 1"
        )
    for key in ("checkpointing", "compile"):
        if method.reads_attention and getattr(config.engine, key):
            raise ConfigError(
                f"engine.{key}=true: {_named(config)} reads attention maps, which such a forward does not show; set it "
                "to false"
            )


def _named(config: RunConfig) -> str:
    return f"method.name={config.method.get('name', 'dm_cal')}"


def resolve(config: RunConfig) -> RunSetup:
    """Raises ConfigError for a configuration that cannot run; no model is opened."""
    if not config.concepts:
        raise ConfigError(
            "concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'"
        )
    check_world(config)
    check_inputs(config)
    check_images(config.prepare, config.concepts)
    prompts = tuple(concept_prompts(concept, config.prepare) for concept in config.concepts)
    method, held = load_method(config.method), hold_prompts(config.hold, config.concepts)
    if not isinstance(method, Method):
        if config.adversarial.steps:
            raise ConfigError(
                f"adversarial.steps={config.adversarial.steps}: {_named(config)} has no updates; set it to 0"
            )
        last = replace(prompts[-1], keep=(*prompts[-1].keep, *held))
        return RunSetup(config, method, None, (*prompts[:-1], last), held)
    check_method(config, method)
    if config.adversarial.steps:
        method = Hardened(method, config.adversarial)
    if held:
        method = Holding(method, config.hold)
    at_once = len(prompts) if config.train.together else 1
    plan = make_plan(config.train, config.mask, config.engine, method, at_once)
    return RunSetup(config, method, plan, prompts, held)
