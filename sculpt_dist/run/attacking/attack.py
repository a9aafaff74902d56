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
from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, ModelError, RunFolderError
from sculpt_dist.core.files import file_sha256, is_intact, make_folder, text_sha256, write_record
from sculpt_dist.core.progress import progress
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation, load_classifiers
from sculpt_dist.run.attacking.cases import Work, cases_of, unrelated_prompts, works_of
from sculpt_dist.run.attacking.rates import summarise_attacks
from sculpt_dist.run.attacking.worker import Worker
from sculpt_dist.run.export import write_report_and_card
from sculpt_dist.run.folder import code_versions
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.setup import RunSetup, resolve

ATTACKS, OTHERS = "attacks", "attacks-model"  # in the run folder: of its own export, and of other models

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
    where = output or setup.folder / (ATTACKS if model is None else OTHERS)
    attacks = chosen_attacks(config, config.attack.names or None, has_run=model is None)
    check_evaluation(setup.evaluation)
    check_attacks(setup, attacks)
    group = setup.join_ranks()
    group.on_first(lambda: make_folder(where))
    with watched(group, where if model is not None else setup.folder, config.engine.grace) as stop:
        found = attack_model(setup, attacks, group, stop, model, original, where)
    if where == setup.folder / ATTACKS and (setup.folder / "report" / "report.json").is_file():
        backbone = open_backbone(config.model, group, setup.folder)
        group.on_first(lambda: write_report_and_card(setup.folder, backbone))
    return found, where


def chosen_attacks(config: RunConfig, names: Sequence[str] | None, has_run: bool) -> dict[str, Attack]:
    """The attacks by name, and the plain prompt; None: all that can be. Raises ConfigError for one that cannot."""
    settings = config.attack
    for name in set(settings.options) - set(attack_names()):
        raise ConfigError(f"attack.options.{name}: there is no such attack. There are: {', '.join(attack_names())}.")
    attacks = {name: load_attack(name, settings.budget, settings.options) for name in names or attack_names()}
    for name in [name for name, attack in attacks.items() if attack.needs_run and not has_run]:
        if names:
            raise ConfigError(f"attack.names={name}: reads the stages of a run; leave out --model, or this attack")
        del attacks[name]
    return {PLAIN: load_attack(PLAIN, settings.budget, {}), **attacks}


def check_attacks(setup: RunSetup, attacks: Mapping[str, Attack]) -> None:
    """Detect before anything is drawn what would make attacks fail, beside the evaluation. Raises ConfigError."""
    cases_of(setup)
    for name in [name for name, attack in attacks.items() if attack.needs_unrelated]:
        if not unrelated_prompts(setup.evaluation):
            raise ConfigError(f"attack.names={name}: every prompt of the evaluation has a target; set evaluate.objects")
    if setup.config.model.dtype == "float16":
        for name in [name for name, attack in attacks.items() if attack.needs_gradient]:
            raise ConfigError(
                f"attack.names={name}: its gradients underflow in model.dtype=float16, and it would seem to fail: "
                "set model.dtype=bfloat16 or float32"
            )


def check_room(backbone: Backbone, attacks: Mapping[str, Attack], cases: Sequence[Case]) -> None:
    """Raises ConfigError where a prompt is too long, or leaves no room for an attack's tokens."""
    for prompt in dict.fromkeys(case.prompt for case in cases):
        backbone.tokenized([prompt], negative=False)
        for name, attack in attacks.items():
            if attack.slots:
                try:
                    backbone.words.open(prompt if attack.keeps_prompt else "", attack.slots)
                except ConfigError as error:
                    raise ConfigError(f"attack.options.{name}.tokens={attack.slots}: {error}") from error


def attack_model(
    setup: RunSetup,
    attacks: Mapping[str, Attack],
    group: Group,
    stop: StopRequest,
    model: Path | None,
    original: Path | None,
    where: Path,
) -> dict[str, Any]:
    """Attack a model, by default the run's export; returns the content of attacks.json. All ranks enter."""
    config, cases = setup.config, cases_of(setup)
    victim = _open_victim(setup, attacks, cases, group, model, original)
    models = group.on_first(lambda: _fingerprints(victim))
    made_by = _made_by(setup, attacks, victim, models)
    classifiers = load_classifiers(setup.evaluation)
    worker = Worker(victim, attacks, made_by, classifiers, where, config.attack.repeat, lambda: stop.requested)
    works = {name: list(works_of(name, attack, cases)) for name, attack in attacks.items()}
    worker.plain = {work.cases[0].key: work for work in works[PLAIN]}
    attacking = [work for name, of_attack in works.items() if name != PLAIN for work in of_attack]
    for label, part in (("draw", works[PLAIN]), ("attack", attacking)):  # attacks may leave out what succeeds plainly
        for first in progress(range(0, len(part), group.size), label, group.is_first):
            stop.check("the attacks")
            group.together(partial(worker.do, part[first + group.rank : first + group.rank + 1]))
    stop.check("the attacks")

    def summarise() -> dict[str, Any]:
        pieces = {name: [_result(worker, work) for work in of_attack] for name, of_attack in works.items()}
        results = {name: [case for piece in found for case in piece["cases"]] for name, found in pieces.items()}
        passes = {name: sum(piece["passes"] for piece in found) for name, found in pieces.items()}
        about = _about(setup, victim, models)
        found = about | {"attacks": summarise_attacks(config, attacks, results, passes)}
        earlier = _earlier(where / "attacks.json", about)
        write_record(where / "attacks.json", found | {"attacks": {**found["attacks"], **_others(earlier, found)}})
        return found

    return group.on_first(summarise)


def _about(setup: RunSetup, victim: Victim, models: Sequence[str]) -> dict[str, Any]:
    """What attacks.json says beside the rates: what was attacked, how, and who judged."""
    evaluate, folder = setup.config.evaluate, victim.model.backbone.folder
    return {
        "model": models[0],
        "checksums": file_sha256(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else None,
        "evaluation": setup.evaluation.fingerprint,
        "judges": {"classifier": evaluate.classifier, "witness": evaluate.witness},
        "budget": setup.config.attack.budget,
        "code": code_versions(),
    }


def _earlier(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The attacks of an earlier call on the same model with the same evaluation."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    same = isinstance(found, dict) and is_intact(found) and all(found.get(key) == about[key] for key in about)
    return dict(found["attacks"]) if same else {}


def _others(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier attacks that this call did not make, measured over the same plain prompts."""
    plain = found["attacks"][PLAIN]["settings"]
    kept = earlier.get(PLAIN, {}).get("settings") == plain
    return {name: rates for name, rates in earlier.items() if kept and name not in found["attacks"]}


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
    group.together(lambda: check_room(attacked.backbone, attacks, cases))
    known = None
    if any(attack.needs_original for attack in attacks.values()):
        known = Model(_open_original(config, group, run, original), config.evaluate.steps)
    group.together(lambda: check_alike(attacked, known))
    has_run = run if model is None else None
    return Victim(attacked, known, config.evaluate.seed, has_run, unrelated_prompts(setup.evaluation))


def _result(worker: Worker, work: Work) -> dict[str, Any]:
    """What came of a piece of work. Raises RunFolderError where a rank wrote it elsewhere."""
    found = worker.read(work)
    if found is None:
        raise RunFolderError(f"{work.file(worker.where)}: is not there: all ranks need one folder that they share")
    return found


def _fingerprints(victim: Victim) -> list[str]:
    """Checksums of the model and, where it is open, of the original."""
    return [base_fingerprint(one.backbone.folder) for one in (victim.model, victim.original) if one is not None]


def _made_by(setup: RunSetup, attacks: Mapping[str, Attack], victim: Victim, models: Sequence[str]) -> dict[str, str]:
    """Of each attack, a checksum over all that decides its result, beside the cases."""
    config, backbone = setup.config, victim.model.backbone
    drawing = [backbone.frozen_dtypes, backbone.image_size, list(backbone.size_ids or ()), config.model.cut_prompts]
    judging = [setup.evaluation.fingerprint, config.evaluate.seed, config.attack.repeat]
    common = [models[0], [asdict(concept) for concept in setup.concepts], *drawing, *judging]
    own = {
        name: [name, attack.version, asdict(attack.config), models if attack.needs_original else None]
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
