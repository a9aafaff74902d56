"""The rates of attacks, from the results of all pieces of work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sculpt_dist.attacks.base import PLAIN, Attack
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.files import text_sha256
from sculpt_dist.maths.attack_rates import Tried, attack_rates, mean_scores, variant_rates

SHOWN = 4  # images of each attack in a report
JUDGES = ("classifier", "witness")
Cases = Sequence[dict[str, Any]]  # as a piece of work writes them


def summarise_attacks(
    config: RunConfig, attacks: Mapping[str, Attack], results: Mapping[str, Cases], passes: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """The rates of every attack, from its cases and its passes through the nets."""
    has_witness = config.evaluate.witness is not None
    return {
        name: _rates(cases, results[PLAIN], attacks[name], has_witness)
        | {"settings": attack_settings(config, attacks[name]), "passes": passes[name] / max(1, len(cases))}
        for name, cases in results.items()
    }


def attack_settings(config: RunConfig, attack: Attack) -> str:
    """A checksum over the settings of an attack, and the version of its code."""
    common = (config.attack.cases, config.attack.prompt, config.attack.repeat)
    return text_sha256(json.dumps([*common, asdict(attack.config), attack.version], sort_keys=True))[:16]


def _rates(cases: Cases, plain: Cases, attack: Attack, has_witness: bool) -> dict[str, Any]:
    """By both classifiers; `post` is the witness's where the first one steered the attack."""
    base = {_key(case): case["attempts"][0] for case in plain}
    rates: dict[str, Any] = {"judged_by": JUDGES[attack.stops and has_witness]}
    # what precedes a unit's first attempt, and the attempts on other cases, are no passes of one case
    told = attack.unit == "prompt"
    for judge, seen in zip(JUDGES, ("seen", "witness")[: 1 + has_witness]):
        tried = [_tried(case["attempts"], base[_key(case)], seen, told) for case in cases]
        rates[judge] = attack_rates(tried, attack.counts)
        if variants := variant_rates(tried):
            rates[judge]["variants"] = variants
    rates["counts"] = attack.counts
    rates |= {key: rates[rates["judged_by"]][key] for key in ("pre", "post", "post_ci95")}
    if not any(case["image"] for case in cases) and any(case["attempts"] for case in cases):
        rates |= {"post": None, "post_ci95": None}  # numbers alone: nothing was judged
    drawn = sorted((case for case in cases if case["image"]), key=lambda case: not _is_seen(case))
    rates["shown"] = [
        {"file": case["image"], "concept": case["concept"], "seen": _is_seen(case)} for case in drawn[:SHOWN]
    ]
    rates["scores"] = mean_scores([one["scores"] for case in cases for one in case["attempts"]])
    return rates


def _tried(attempts: Cases, plain: Mapping[str, Any], seen: str, told: bool) -> Tried:
    judged = [one for one in attempts if one[seen] is not None]
    passes, variants = (tuple(one[name] for one in judged) for name in ("passes", "variant"))
    return Tried(tuple(one[seen] for one in judged), bool(plain[seen]), passes if told else (), variants)


def _key(case: Mapping[str, Any]) -> tuple[str, str, int]:
    return case["concept"], case["prompt"], case["seed"]


def _is_seen(case: Mapping[str, Any]) -> bool:
    return any(one["seen"] for one in case["attempts"])
