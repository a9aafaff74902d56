"""What an attack is, and how `attack.names` finds one.

Every other file of this folder is one attack, named after the file. It defines

    Attack      the attack, a subclass of `Attack` here
    Config      its options, a frozen dataclass; the defaults are the light budget, which fits a CPU and a tiny model
    PUBLISHED   the options of the published setting, where they differ (`attack.budget=published`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from sculpt_dist.config.load import merge_section
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import check_plugin, plugin, plugins
from sculpt_dist.evaluation.classifiers.base import Verdict

if TYPE_CHECKING:
    from sculpt_dist.attacks.parts.victim import Victim

PACKAGE = "sculpt_dist.attacks"
PLAIN = "plain"  # the attack that attacks nothing: its successes are the pre-ASR


@dataclass(frozen=True)
class Case:
    """One prompt and one seed with which a forgotten concept is asked for."""

    concept: Concept
    number: int  # of the concept in the configuration
    index: int  # of the concept among the classifier's objects, or styles
    prompt: str
    seed: int
    guidance: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from other cases."""
        return self.concept.target, self.prompt, self.seed

    def seen_in(self, verdict: Verdict) -> list[bool]:
        """For each image of a verdict, whether the concept is recognised."""
        seen = verdict.objects if self.concept.kind == "object" else verdict.styles
        assert seen is not None, "a classifier that knows no styles judges no style"
        return [bool(value) for value in seen == self.index]


@dataclass(frozen=True)
class Attempt:
    """What an attack shows for a case: an image for the classifier, or a number where there is no image to judge."""

    case: int  # which of the cases that the attack was given
    image: Tensor | None = None  # uint8 [3, h, w]
    variant: str = ""  # attempts that are also counted by themselves, such as those after 20 steps
    found: Mapping[str, Any] = field(default_factory=dict)  # what the attack found, as plain values
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # and as tensors
    scores: Mapping[str, float] = field(default_factory=dict)  # numbers to average over cases


class Attack(ABC):
    """One attack. Its attempts are the same on any number of ranks: all that is random comes from `Victim.rng`."""

    unit: ClassVar[str] = "prompt"  # what one call attacks: one prompt, all prompts of a concept, or all of a model
    stops: ClassVar[bool] = False  # whether the first success ends it: the classifier then steers it
    counts: ClassVar[str] = "best"  # what its rate is: of cases with any success (best), or of all images (mean)
    needs_original: ClassVar[bool] = False  # whether it uses the model from before the unlearning
    needs_gradient: ClassVar[bool] = False  # whether it optimises through the net
    needs_unrelated: ClassVar[bool] = False  # whether it uses prompts that ask for no target
    needs_run: ClassVar[bool] = False  # whether it reads the folder of the run
    version: ClassVar[int] = 1  # higher where the code changes what it finds: earlier results then do not count
    may_be_zero: ClassVar[tuple[str, ...]] = ()  # options; all other numbers must be greater than 0
    slots: int = 0  # tokens that it adds to a prompt
    keeps_prompt: bool = True  # whether these come beside the prompt's own

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        """Attack these cases, one of them where `unit` is prompt. The driver judges each attempt when it comes."""


def attack_names() -> list[str]:
    """All attacks in alphabetical order. Imports none of them."""
    return plugins(PACKAGE)


def load_attack(name: str, budget: str, options: Mapping[str, Mapping[str, Any]]) -> Attack:
    """The attack of this name. Raises ConfigError for an unknown one, or an option that it lacks."""
    check_plugin(PACKAGE, name, "attack.names")
    module = plugin(PACKAGE, name, "attack.names")
    published = vars(module).get("PUBLISHED", {}) if budget == "published" else {}
    key = f"attack.options.{name}"
    config = merge_section(module.Config, {**published, **options.get(name, {})}, key, f"{key}.")
    for field_, value in vars(config).items():
        numbers = value if isinstance(value, list) else [value]
        counts = [number for number in numbers if isinstance(number, (int, float)) and not isinstance(number, bool)]
        least = 0 if field_ in module.Attack.may_be_zero else 1e-300
        if value == [] or any(number < least for number in counts):
            raise ConfigError(f"{key}.{field_}={value}: must be greater than 0")
    attack: Attack = module.Attack(config)
    return attack


@dataclass(frozen=True)
class NoOptions:
    """The options of an attack that has none."""
