"""Wrong values anywhere in the files of a run folder: the report is written, or one line names the file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from handmade_run import write_attacks, write_run

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.report.card import model_card
from sculpt_dist.report.figures import draw_loss, draw_mask, draw_relapse, draw_scores
from sculpt_dist.report.page import render_page
from sculpt_dist.report.record import read_run
from sculpt_dist.report.summary import summarise

FILES = (
    *("config.yaml", "costs.json", "manifest.json", "metrics.jsonl", "evaluation/after-01/scores.json"),
    "attacks/attacks.json",
)
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 2.5, 10**30, 10**400, -(10**18), 1e308, float("nan"), float("inf")),
    *("", "1", "cat", "a" * 5000, "\ud800", "\x00<b>", "${a.b}", "${oc.env:HOME}", "{{ 1 }}", "007"),
    *([], [1], [0.1, 0.9], [[1]], ["a"] * 3, {}, {"a": 1}, {"accuracy": []}, {"a": {"b": {"c": [{}]}}}, [{}] * 3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all members of a value."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*path, key)
        yield from places(member, (*path, key))


def mutated(content: Any, rng: random.Random) -> Any:
    """The content with a value replaced, removed or added, one to three times."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        found = list(places(content))
        if not found:
            return rng.choice(WRONG)
        *path, key = rng.choice(found)
        holder = content
        for part in path:
            holder = holder[part]
        way = rng.random()
        if way < 0.75:
            holder[key] = copy.deepcopy(rng.choice(WRONG))
        elif way < 0.9:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("", "x", "cat", "UA", "terms", "\ud800", "<i>"))] = copy.deepcopy(rng.choice(WRONG))
    return content if rng.random() > 0.02 else rng.choice(WRONG)


def written(file: Path, rng: random.Random) -> None:
    """Write a mutation of a file."""
    if file.suffix == ".yaml":
        text = json.dumps(mutated(yaml.safe_load(file.read_text()), rng))  # which is yaml, too
    elif file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for _ in range(rng.randint(1, 20)):
            at = rng.randrange(len(lines))
            lines[at] = mutated(lines[at], rng)
        text = "\n".join(map(json.dumps, lines))
    else:
        text = json.dumps(mutated(json.loads(file.read_text()), rng))
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text) + 1)]
    file.write_text(text)


def report(folder: Path, draws: bool = True) -> str:
    """The page of a report, without the encoding of pictures, which takes most of the time."""
    run = read_run(folder)
    content = summarise(run)
    json.dumps(content, allow_nan=False)
    if draws:
        draw_loss(run.lines, run.targets)
        draw_mask(run.lines, run.targets, (run.costs.get("weights") or {}).get("trained"))
        draw_relapse(run.accuracies, run.targets)
        draw_scores([(0, content["before"]), *enumerate(content["concepts"], 1)])
    model_card(run.config, content)
    page = render_page(run, content, {}, None)
    page.encode()
    return page


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 40), *(pytest.param(seed, 500, marks=pytest.mark.exhaustive) for seed in range(1, 5))]
)
def test_wrong_values_are_shown_or_named_in_one_line(tmp_path: Path, seed: int, count: int) -> None:
    folder, rng, named = write_attacks(write_run(tmp_path / "run", styles=("neon",))), random.Random(seed), 0
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*metrics[5:15], *metrics[80:90]]))
    whole = {name: (folder / name).read_bytes() for name in FILES}
    for number in range(count):
        name = FILES[number % len(FILES)]
        written(folder / name, rng)
        mutation = (folder / name).read_text()
        try:
            message = report(folder, name not in ("config.yaml", "manifest.json")) and None
        except RunFolderError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {mutation[:3000]}") from error
        named += message is not None
        assert message is None or ("\n" not in message and name in message and len(message) < 1000), message
        (folder / name).write_bytes(whole[name])
    assert named > count // 10 and report(folder)
