"""Attacks a model with all ranks, each of which has the whole of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.attacks.base import PLAIN, Attack, Case, attack_names, load_attack
from sculpt_dist.attacks.parts.victim import Model, Victim, check_alike
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, ModelError, RunFolderError
from sculpt_dist.core.files import make_folder, text_sha256, write_record
from sculpt_dist.core.progress import progress
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation, load_classifiers
from sculpt_dist.run.attacking.cases import Work, cases_of, unrelated_prompts, works_of
from sculpt_dist.run.attacking.rates import summarise_attacks
from sculpt_dist.run.attacking.worker import Worker
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.setup import RunSetup, resolve

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.engine.group import Group
    from sculpt_dist.engine.stopping.request import StopRequest


def attack_only(
    config: RunConfig, model: Path | None, original: Path | None, output: Path | None
) -> tuple[dict[str, Any], Path]:
    """Attack a model folder; by default the export of the configuration's run. Returns the rates and their folder.

    `original`: the model from before the unlearning; by default that of the configuration.
    """
    setup = resolve(config)
    names, where = config.attack.names or None, output or setup.folder / "attacks"
    attacks = chosen_attacks(setup, names, has_run=model is None)
    check_evaluation(setup.evaluation)
    group = setup.join_ranks()
    group.on_first(lambda: make_folder(where))
    with watched(group, where, config.engine.grace) as stop:
        found = attack_model(setup, attacks, group, stop, model, original, where)
    return found, where


def chosen_attacks(setup: RunSetup, names: Sequence[str] | None, has_run: bool) -> dict[str, Attack]:
    """The attacks by name; None: all that can be. Raises ConfigError for one that cannot."""
    settings = setup.config.attack
    attacks = {name: load_attack(name, settings.budget, settings.options) for name in names or attack_names()}
    for name in set(settings.options) - set(attack_names()):
        raise ConfigError(f"attack.options.{name}: there is no such attack. There are: {', '.join(attack_names())}.")
    if not has_run:
        for name in [name for name, attack in attacks.items() if attack.needs_run]:
            if names:
                raise ConfigError(f"attack.names={name}: reads the stages of a run; leave out --model, or this attack")
            del attacks[name]
    return {PLAIN: load_attack(PLAIN, settings.budget, {}), **attacks}


def attack_model(
    setup: RunSetup,
    attacks: Mapping[str, Attack],
    group: Group,
    stop: StopRequest,
    model: Path | None,
    original: Path | None,
    where: Path,
) -> dict[str, Any]:
    """Attack a model, by default the run's export; returns the rates on every rank. All ranks enter."""
    config = setup.config
    cases = group.together(lambda: cases_of(setup))
    victim = _open_victim(setup, attacks, cases, group, model, original)
    made_by = group.on_first(lambda: _made_by(setup, attacks, victim))
    worker = Worker(victim, attacks, made_by, load_classifiers(setup.evaluation), where, config.attack.repeat)
    works = {name: list(works_of(name, attack, cases)) for name, attack in attacks.items()}
    worker.plain = {work.cases[0].key: work for work in works[PLAIN]}
    attacking = [work for name, of_attack in works.items() if name != PLAIN for work in of_attack]
    for label, part in (("draw", works[PLAIN]), ("attack", attacking)):  # attacks may leave out what succeeds plainly
        for first in progress(range(0, len(part), group.size), label, group.is_first):
            stop.check("the attacks")
            group.together(partial(worker.do, part[first + group.rank : first + group.rank + 1]))

    def summarise() -> dict[str, Any]:
        results = {name: [case for work in of_one for case in _result(worker, work)] for name, of_one in works.items()}
        found = summarise_attacks(config, attacks, results)
        write_record(where / "attacks.json", found)
        return found

    return group.on_first(summarise)


def _open_victim(
    setup: RunSetup,
    attacks: Mapping[str, Attack],
    cases: Sequence[Case],
    group: Group,
    model: Path | None,
    original: Path | None,
) -> Victim:
    """Open the models, and check that all attacks can be made. Raises ConfigError or ModelError."""
    config, run = setup.config, setup.folder
    folder = model or run / "model"
    group.on_first(lambda: _check_there(folder, "--model"))
    attacked = Model(open_backbone(config.model, group, run, folder), config.evaluate.steps)
    group.together(lambda: _check_room(attacked.backbone, attacks, cases))
    known = None
    if any(attack.needs_original for attack in attacks.values()):
        known = Model(_open_original(config, group, run, original), config.evaluate.steps)
    group.together(lambda: check_alike(attacked, known))
    has_run = run if model is None else None
    return Victim(attacked, known, config.evaluate.seed, has_run, unrelated_prompts(setup.evaluation))


def _result(worker: Worker, work: Work) -> list[dict[str, Any]]:
    """The cases of a piece of work. Raises RunFolderError where a rank wrote it elsewhere."""
    found = worker.read(work)
    if found is None:
        raise RunFolderError(f"{work.file(worker.where)}: is not there: all ranks need one folder that they share")
    cases: list[dict[str, Any]] = found["cases"]
    return cases


def _made_by(setup: RunSetup, attacks: Mapping[str, Attack], victim: Victim) -> dict[str, str]:
    """Of each attack, a checksum over all that decides its result. It reads the weights of both models."""
    config, backbone = setup.config, victim.model.backbone
    models = [base_fingerprint(model.backbone.folder) for model in (victim.model, victim.original) if model is not None]
    common = [
        *(models[0], setup.evaluation.fingerprint, config.evaluate.seed, config.attack.prompt, config.attack.repeat),
        *(config.attack.cases, [asdict(concept) for concept in setup.concepts]),
        *(backbone.frozen_dtypes, backbone.image_size, list(backbone.size_ids or ())),
    ]
    own = {
        name: [name, asdict(attack.config), models if attack.needs_original else None]
        for name, attack in attacks.items()
    }
    return {name: text_sha256(json.dumps([*common, *about], sort_keys=True)) for name, about in own.items()}


def _open_original(config: RunConfig, group: Group, run: Path, folder: Path | None) -> Backbone:
    if folder is not None:
        group.on_first(lambda: _check_there(folder, "--original"))
    try:
        return open_backbone(config.model, group, run, folder)
    except ModelError as error:
        raise ModelError(
            f"{error}; the chosen attacks need the model from before the unlearning: set model.path, or --original, or "
            "attack.names to attacks that do not"
        ) from error


def _check_there(folder: Path, option: str) -> None:
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: is no pipeline folder (no model_index.json): give the model with {option}")


def _check_room(backbone: Backbone, attacks: Mapping[str, Attack], cases: Sequence[Case]) -> None:
    """Raises ConfigError where a prompt is too long, or leaves no room for an attack's tokens."""
    for prompt in dict.fromkeys(case.prompt for case in cases):
        backbone.tokenized([prompt], negative=False)
        for name, attack in attacks.items():
            if attack.slots:
                try:
                    backbone.words.open(prompt, attack.slots)
                except ConfigError as error:
                    raise ConfigError(f"attack.options.{name}.tokens={attack.slots}: {error}") from error
