"""Reads a sweep file and gives every trial its point, the same wherever and whenever the trial runs."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sculpt_dist.config.experiments import SweepFile
from sculpt_dist.config.load import merge_section
from sculpt_dist.config.packaged import find_config
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed, is_folder_name
from sculpt_dist.core.messages import shown
from sculpt_dist.experiments.compare import checked_config
from sculpt_dist.experiments.tables import SCORES
from sculpt_dist.maths.sweep_points import KINDS, Parameter, value_at
from sculpt_dist.run.fingerprint import config_fingerprint

ARGUMENTS = "${args_no_hyphens}"  # W&B's agent replaces it with the point, as key=value
AGENT_OVERRIDES = ("run.folder=", "track.")  # in the command, for W&B's agent only
MOST_VALUES = 100_000
MOST_CHECKED = 1000  # trials whose configuration is read before the first one runs
RESERVED = ("run.folder", "track.group")  # keys that the sweep sets for every trial
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    index: int
    point: Point
    overrides: tuple[str, ...]
    config: RunConfig
    ranks: int

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @cached_property
    def fingerprint(self) -> str:
        return config_fingerprint(self.config)


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the folder of its trials."""

    name: str
    settings: SweepFile
    parameters: tuple[Parameter, ...]  # sorted by name, which is the order of a grid
    config: Path  # configuration file named in the command
    overrides: tuple[str, ...]  # for every trial
    folder: Path
    seed: int
    count: int  # trials
    ranks: int = 1  # of each trial
    _evaluations: set[str] = field(default_factory=set, compare=False, repr=False)  # already checked
    _trials: dict[int, Trial] = field(default_factory=dict, compare=False, repr=False)  # loading one takes 0.1 s

    def point(self, index: int) -> Point:
        """The point of a trial of a grid or a random search. It depends on (seed, index) only.

        In a grid the last parameter by name changes fastest.
        """
        if self.settings.method == "grid":
            sizes = [len(parameter.choices or ()) for parameter in self.parameters]
            at = np.unravel_index(index, sizes)
            return {parameter.name: (parameter.choices or [])[i] for parameter, i in zip(self.parameters, at)}
        return self.point_at(
            {p.name: np.random.default_rng(derived_seed(self.seed, index, p.name)).random() for p in self.parameters}
        )

    def point_at(self, shares: Mapping[str, float]) -> Point:
        """The point at these quantiles, in [0, 1], of the parameters' distributions."""
        return {parameter.name: value_at(parameter, shares[parameter.name]) for parameter in self.parameters}

    def trial(self, index: int, point: Point) -> Trial:
        """The trial at a point. Raises ConfigError if its configuration is invalid."""
        known = self._trials.get(index)
        if known is not None and known.point == point:
            return known
        own = (f"run.folder={self.folder / 'trials' / f'{index:04d}'}", f"track.group={self.name}")
        overrides = (*self.overrides, *(f"{name}={value}" for name, value in point.items()), *own)
        try:
            config = checked_config(self.config, overrides, self._evaluations, self.ranks)
        except ConfigError as error:
            raise ConfigError(f"trial {index}: {error}") from error
        if not config.evaluate.enabled:
            raise ConfigError(
                f"trial {index}: evaluate.enabled=false: set it to true, "
                f"or its report has no metric {self.settings.metric.name}"
            )
        self._trials[index] = Trial(index, point, overrides, config, self.ranks)
        return self._trials[index]

    def check(self) -> None:
        """Raises ConfigError if the configuration of a trial is invalid.

        Checks all trials, or, of more than MOST_CHECKED, so many drawn ones; the others when they start. Under bayes,
        the middle and both ends of the space.
        """
        if self.settings.method != "bayes":
            drawn = np.random.default_rng(0).integers(0, self.count, MOST_CHECKED)
            for index in range(self.count) if self.count <= MOST_CHECKED else sorted(set(drawn.tolist())):
                self.trial(index, self.point(index))
            return
        for share in (0.5, 0.0, 1.0):
            self.trial(0, self.point_at({parameter.name: share for parameter in self.parameters}))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the points of the trials and their results."""
        parameters = {parameter.name: {"kind": parameter.kind, **parameter.options} for parameter in self.parameters}
        seed = {} if self.settings.method == "grid" else {"seed": self.seed}
        return {
            "method": self.settings.method,
            "parameters": parameters,
            "config": str(self.config),
            "overrides": list(self.overrides),
        } | seed


def read_sweep(
    file: Path, overrides: Sequence[str] = (), folder: Path | None = None, seed: int = 0, ranks: int = 1
) -> Sweep:
    """Read and check a sweep file. `overrides` apply to every trial.

    Raises ConfigError, which names the file and the wrong key or value.
    """
    file = find_config(file)
    content = _read(file)
    parameters = [
        _parameter(file, name, given)
        for name, given in sorted(_mapping(file, "parameters", content.pop("parameters", None)).items())
    ]
    config, fixed = _command(file, content.pop("command", None))
    settings = merge_section(SweepFile, content, str(file), prefix="")
    _check(file, settings, parameters)
    name = settings.name or file.stem
    if not is_folder_name(name):
        raise ConfigError(f"{file}: name={shown(name)!r}: becomes a folder's name, so write one without slashes")
    count = settings.run_cap
    if settings.method == "grid":
        size = math.prod(len(parameter.choices or ()) for parameter in parameters)
        count = min(size, count or size)
    assert count is not None
    given = (*fixed, "track.wandb=false", *overrides)
    where = folder or Path("runs/sweeps") / name
    return Sweep(name, settings, tuple(parameters), config, given, where, seed, count, ranks)


def _read(file: Path) -> dict[str, Any]:
    """Read plain YAML, as W&B does: there 1e-4 is a string and 1.0e-4 a number."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such sweep file")
    try:
        return dict(_mapping(file, "a sweep", yaml.safe_load(file.read_text(encoding="utf-8"))))
    except ConfigError:
        raise
    except Exception as error:  # PyYAML leaks what the conversion of a scalar raises, such as of !!int x
        raise ConfigError(f"{file}: cannot be read as YAML: {shown(error)}") from error


def _mapping(file: Path, name: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not found or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{file}: {name} is {shown(repr(found))}; expected keys with values")
    return found


def _command(file: Path, command: Any) -> tuple[Path, list[str]]:
    """The configuration file and the overrides in the command. Raises ConfigError if it does not call `unlearn`."""
    words = [str(word) for word in command or ()]
    if "unlearn" not in words or ARGUMENTS not in words:
        raise ConfigError(
            f"{file}: command is {shown(repr(command))}; "
            f"write it as [${{env}}, python, -m, sculpt_dist, unlearn, CONFIG, {ARGUMENTS}] "
            "(W&B's agent runs this command; a local sweep uses its configuration and overrides)"
        )
    after = [word for word in words[words.index("unlearn") + 1 :] if not word.startswith("${")]
    files = [word for word in after if "=" not in word and not word.startswith("-")]
    if len(files) != 1:
        raise ConfigError(
            f"{file}: command names {len(files)} configuration files after unlearn "
            f"({shown(', '.join(files)) or 'none'}); name exactly one"
        )
    return Path(files[0]), [word for word in after if "=" in word and not word.startswith(AGENT_OVERRIDES)]


def _check(file: Path, settings: SweepFile, parameters: Sequence[Parameter]) -> None:
    metric = settings.metric
    for key, found, choices in (
        ("method", settings.method, ("grid", "random", "bayes")),
        ("metric.goal", metric.goal, ("minimize", "maximize")),
        ("metric.name", metric.name, SCORES),
    ):
        if found not in choices:
            missing = "; no report has it" if key == "metric.name" else ""
            raise ConfigError(f"{file}: {key}={shown(found)}{missing}: choose one of {', '.join(choices)}")
    if settings.early_terminate is not None:
        raise ConfigError(f"{file}: early_terminate needs W&B's server: remove it, or use `wandb sweep`")
    if settings.run_cap is None and settings.method != "grid":
        raise ConfigError(
            f"{file}: method {settings.method} never ends by itself: set the number of trials, run_cap: 20"
        )
    if settings.run_cap is not None and settings.run_cap < 1:
        raise ConfigError(f"{file}: run_cap={settings.run_cap}: must be at least 1")
    for parameter in parameters:
        span = parameter.options.get("max", 0) - parameter.options.get("min", 0)
        if settings.method == "grid" and span > MOST_VALUES * parameter.options.get("q", 1):
            raise ConfigError(f"{file}: {parameter.name}: a grid takes at most {MOST_VALUES:,} values of a range")
        if settings.method == "grid" and parameter.choices is None:
            raise ConfigError(
                f"{file}: {parameter.name}: a grid takes values, a value, int_uniform or q_uniform, not "
                f"{parameter.kind}"
            )
        if settings.method == "bayes" and parameter.kind == "categorical_w_probabilities":
            raise ConfigError(f"{file}: {parameter.name}: bayes weighs the values itself: remove the probabilities")


def _parameter(file: Path, name: str, given: Any) -> Parameter:
    """Raises ConfigError if W&B's schema forbids the parameter, or if it cannot be one override."""
    where = f"{file}: parameter {name}"
    given = dict(_mapping(file, f"parameter {name}", given))
    if "parameters" in given:
        raise ConfigError(f"{where}: is nested; write its keys with dots, for example train.lr")
    if name in RESERVED:
        raise ConfigError(f"{where}: is set by the sweep itself: remove it")
    kind = given.pop("distribution", None) or _kind(given)
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown distribution {shown(repr(kind))}; choose one of: {', '.join(KINDS)}")
    required, optional = KINDS[kind]
    if required - set(given) or set(given) - required - set(optional):
        needs = ", ".join(sorted(required)) or "nothing"
        may = f", and accepts {', '.join(optional)}" if optional else ""
        raise ConfigError(f"{where}: {kind} needs {needs}{may}; found: {shown(', '.join(given)) or 'nothing'}")
    options = {**optional, **given}
    _check_values(where, kind, options)
    return Parameter(name, kind, options)


def _kind(given: Mapping[str, Any]) -> str:
    """The distribution that W&B assumes if none is named."""
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    if "value" in given:
        return "constant"
    return "int_uniform" if all(_is_whole(given.get(end)) for end in ("min", "max")) else "uniform"


def _check_values(where: str, kind: str, options: Mapping[str, Any]) -> None:
    values = options.get("values", [options.get("value", "")])
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: values is {shown(repr(values))}; give a list of at least one")
    if any(value is None for value in values):
        raise ConfigError(f"{where}: null cannot be passed as key=value: remove it from the values")
    if any(a == b and type(a) is type(b) for a, b in itertools.combinations(values, 2)):
        raise ConfigError(f"{where}: values {shown(values)} contains one value twice: remove the duplicate")
    numbers = {key: options[key] for key in ("min", "max", "mu", "sigma", "q") if key in options}
    probabilities = options.get("probabilities", [1.0])
    for key, number in [
        *numbers.items(),
        *(
            ("probabilities", chance)
            for chance in (probabilities if isinstance(probabilities, list) else [probabilities])
        ),
    ]:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= sys.float_info.max:
            raise ConfigError(
                f"{where}: {key}={shown(repr(number))} is not a number (in YAML 1e-4 is a string, 1.0e-4 a number)"
            )
    if kind == "int_uniform" and not all(_is_whole(number) for number in numbers.values()):
        raise ConfigError(f"{where}: int_uniform from {numbers['min']} to {numbers['max']}: both must be whole numbers")
    if "min" in numbers and numbers["min"] >= numbers["max"]:
        raise ConfigError(f"{where}: min={numbers['min']} is not below max={numbers['max']}")
    if kind.endswith("_values") and numbers["min"] <= 0:
        raise ConfigError(f"{where}: min={numbers['min']}: {kind} needs numbers above 0")
    if numbers.get("q", 1) <= 0 or numbers.get("sigma", 0) < 0:
        raise ConfigError(f"{where}: q must be above 0 and sigma at least 0; found {numbers}")
    if "probabilities" in options and (
        len(probabilities) != len(values)
        or any(chance < 0 for chance in probabilities)
        or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-8)
    ):
        raise ConfigError(
            f"{where}: probabilities {shown(probabilities)}: give one for each of the {len(values)} values, with sum 1"
        )


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
