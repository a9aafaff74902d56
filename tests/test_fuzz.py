"""Whatever a user's file or override holds, the answer is a result or one line: over a thousand cases, always the same.

`pytest -m exhaustive tests/test_fuzz.py` tries twenty times as many.
"""

from __future__ import annotations

import copy
import itertools
import json
import string
from pathlib import Path

import pytest
import yaml
from harness import PROJECT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.formats.delta import apply_delta, write_delta
from sculpt_dist.cli.options import load
from sculpt_dist.config.reference import run_keys
from sculpt_dist.core.errors import SculptError
from sculpt_dist.data.prompt_files import read_prompts
from sculpt_dist.evaluation.evaluator import check_evaluation
from sculpt_dist.experiments.compare import checked_configs, comparison_cells, read_comparison
from sculpt_dist.experiments.trials import read_sweep
from sculpt_dist.run.setup import resolve
from sculpt_dist.track.tracker import check_tracking

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
CONCEPT = "concepts=[{target: cat, superclass: animal}]"
CASES = {"overrides": 300, "files": 180, "prompts": 220, "sweeps": 100, "comparisons": 50, "deltas": 250}  # >= 1,000
SCALE = pytest.mark.parametrize("scale", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
NAMED = [  # what once ended in a traceback, or in a page of text
    *(
        "!!float abc",
        "!!timestamp 2020",
        "!!python/object:os.system x",
        "!!binary =",
        "!!int 0x",
        "!!set {a}",
        "&a [*a]",
    ),
    *(
        "[[1],[2]]",
        "[a,b]",
        "{a: 1}",
        "{}",
        "[]",
        "[null]",
        "{a: {b: {c: 1}}}",
        "[" * 60 + "]" * 60,
        "{a: [1, {b: 2}]}",
    ),
    *(
        "1" * 6000,
        "9" * 399,
        "0x" + "f" * 398,
        "9" * 309,
        "-" + "9" * 6000,
        "1e999",
        "-1e999",
        ".nan",
        ".inf",
        "1e-999",
        "0x" + "f" * 6000,
        "0o7",
        "1_000",
        "+1",
    ),
    *("~nosuchuser", "~nosuchuser/x", "~", "x" * 300, "x/" * 3000, "/proc/self/mem/x", "/dev/null/x", "..", ".", ""),
    *(
        "\ud800",
        "a\udfffb",
        '"\\ud800"',
        "\0",
        "a\0b",
        "\x1b[31m",
        "\u202e",
        "\u200b",
        "\ufeff",
        "e\u0301",
        "\U0010ffff",
    ),
    *("${train.lr}", "${oc.env:HOME}", "${", "${}", "${a.b.c}", "${oc.env:}", "\\${x}", "???", "null", "true", "no"),
    *(
        "a\nb",
        "a\r\nb",
        "- a\n- b",
        "a: b: c",
        ": :",
        "%",
        "@x",
        "`x`",
        "*x",
        "&x",
        "!x",
        "| x",
        "> x",
        "'",
        '"',
        "#",
        "a #b",
    ),
    *(
        "[{target: cat, superclass: animal}]",
        "[{target: [cat]}]",
        "[{target: 7}]",
        "[{target: !!float x}]",
        "[cat, dog]",
    ),
    *("[{target: cat, superclass: animal, keep: {a: b}}]", "[{target: " + "x" * 9000 + ", superclass: animal}]"),
    *(
        "https://user:TOKEN@host/x",
        "hub/model",
        "own:no.such:Class",
        "own:",
        "clip:",
        "image:/nowhere",
        "name.safetensors",
    ),
]
KEYS = [key.name for key in run_keys() if "[]" not in key.name]
ODD_KEYS = ["concepts[0].target", "concepts[9]", 'prepare.prompts.files."van gogh"', "evaluate.members.animal", "x", ""]
ODD_KEYS += [
    "method.lr",
    "method",
    "train",
    "run",
    "concepts",
    "[0]",
    "a..b",
    "train.lr.x",
    "train[0]",
    "'",
    '"a',
    "\0",
    "\ud800",
]
ODD_KEYS += [
    "evaluate.metrics.kid",
    "evaluate.metrics.x",
    "prepare.prompts.files[0]",
    "concepts[99999999999999999999].target",
]

text = (
    st.text(max_size=30) | st.text(st.characters(), max_size=8) | st.text(string.punctuation + " a1\n\t", max_size=12)
)
numbers = st.integers() | st.floats() | st.integers(-(10**40), 10**40)
plain = st.none() | st.booleans() | numbers | text | st.sampled_from(NAMED)
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
values = st.sampled_from(NAMED) | text | numbers.map(str) | nested.map(lambda value: json.dumps(value, default=str))
overrides = st.tuples(st.sampled_from(KEYS) | st.sampled_from(ODD_KEYS) | text, values).map("=".join)


def every_case(count: int, *strategies, scale: int = 1):
    """Runs a check on so many drawn cases, the same in every process."""

    def run(check) -> None:
        settings(
            max_examples=count * scale,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(*strategies)(check))()

    return run


def answer(call, *inputs: str) -> None:
    """Calls; whatever is refused, is so in one line of readable length that repeats no long input."""
    try:
        call()
    except SculptError as error:
        message = str(error)
        assert message.strip() and message.isprintable() and len(message) <= 1500, message
        assert not [given for given in inputs if len(given) > 250 and given[:250] in message], message


def begin(file: Path | None, given: list[str]) -> None:
    """What `unlearn` does before it joins its ranks."""
    setup = resolve(load(file, given))
    check_tracking(setup.config.track)
    if setup.scores:
        check_evaluation(setup.evaluation)


def changed(content, data: st.DataObject):
    """The content with one or two of its members replaced, removed or added."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        at = content
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = data.draw(st.sampled_from(places))
            if isinstance(at[place], (dict, list)) and at[place] and data.draw(st.booleans()):
                at = at[place]
                continue
            kind = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if kind == "remove":
                del at[place]
            elif kind == "add" and isinstance(at, dict):
                at[data.draw(text)] = data.draw(nested)
            else:
                at[place] = data.draw(nested)
            break
    return content


def as_yaml(content) -> bytes:
    return yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")


def test_values_that_once_failed_are_taken_or_refused_in_a_line_by_each_kind_of_key():
    keys = itertools.cycle(
        ["train.betas", "model.path", "concepts", "evaluate.prompts", "train", "train.steps", "train.lr"]
    )
    for value, key, other in zip(NAMED, keys, keys):
        answer(lambda value=value, key=key: begin(None, [CONCEPT, f"{key}={value}"]), value)
        answer(lambda value=value, other=other: begin(None, [CONCEPT, f"{other}={value}"]), value)


@SCALE
def test_overrides_are_taken_or_refused_in_a_line(scale):
    @every_case(CASES["overrides"], st.lists(overrides, min_size=1, max_size=2), scale=scale)
    def check(given):
        answer(lambda: begin(None, [CONCEPT, *given]), *(one.partition("=")[2] for one in given))


@SCALE
def test_configuration_files_are_taken_or_refused_in_a_line(scale, tmp_path):
    file, whole = tmp_path / "run.yaml", yaml.safe_load(CONFIG.read_text())

    @every_case(CASES["files"], st.data(), scale=scale)
    def check(data):
        kind = data.draw(st.sampled_from(["changed", "line", "line", "raw"]))
        if kind == "changed":
            file.write_bytes(as_yaml(changed(whole, data)))
        elif kind == "line":
            section, _, name = data.draw(st.sampled_from(KEYS)).partition(".")
            line = f"{section}:\n  {name or 'x'}: {data.draw(values)}\n"
            file.write_bytes(line.encode("utf-8", "surrogatepass"))
        else:
            file.write_bytes(data.draw(st.binary(max_size=60) | text.map(lambda s: s.encode("utf-8", "surrogatepass"))))
        answer(lambda: begin(file, []))


@SCALE
def test_lists_of_prompts_are_taken_or_refused_in_a_line(scale, tmp_path):
    cells = st.sampled_from(
        ["prompt", "seed", "guidance", "a cat", "1", "1.0", "-1", "1e999", "nan", "9" * 5000, '"', "''"]
    )
    marks = st.sampled_from([",", ",", ";", "\t", "\n", "\n", "\r", "\r\n", "\x85", " ", '"', "\0", "\x0b"])
    table = st.lists(st.tuples(cells | text, marks).map("".join), max_size=14).map("".join)

    @every_case(
        CASES["prompts"],
        st.sampled_from([".txt", ".csv", ".csv", ".CSV"]),
        st.booleans(),
        table | st.sampled_from(NAMED),
        st.binary(max_size=4),
        scale=scale,
    )
    def check(suffix, has_head, content, tail):
        file = tmp_path / f"list{suffix}"
        file.write_bytes(b"prompt,seed\n" * has_head + content.encode("utf-8", "surrogatepass") + tail)
        answer(lambda: read_prompts(file))

    for name in NAMED:
        answer(lambda name=name: read_prompts(f"{name}.csv"), name)


@SCALE
def test_sweeps_are_taken_or_refused_in_a_line(scale, tmp_path):
    file = tmp_path / "sweep.yaml"
    command = ["python", "-m", "sculpt_dist", "unlearn", str(CONFIG), "${args_no_hyphens}", "train.steps=3"]
    whole = {
        "method": "random",
        "run_cap": 2,
        "metric": {"name": "H", "goal": "maximize"},
        "parameters": {
            "train.lr": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-3},
            "mask.keep": {"values": [0.3, 1.0]},
            "mask.refresh": {"distribution": "q_uniform", "min": 1, "max": 9, "q": 2},
            "train.steps": {"min": 2, "max": 5},
            "train.clip": {"distribution": "q_normal", "mu": 3.0, "sigma": 1.0},
        },
        "command": command,
    }

    @every_case(CASES["sweeps"], st.data(), scale=scale)
    def check(data):
        if data.draw(st.integers(0, 5)):
            file.write_bytes(as_yaml(changed(whole, data)))
        else:
            file.write_bytes(
                data.draw(st.binary(max_size=60) | values.map(lambda s: s.encode("utf-8", "surrogatepass")))
            )

        def start():
            plan = read_sweep(file, folder=tmp_path / "out")
            if plan.count < 5:
                plan.check()
            else:
                plan.trial(0, plan.point(0))

        answer(start)


@SCALE
def test_comparisons_are_taken_or_refused_in_a_line(scale, tmp_path):
    file = tmp_path / "compare.yaml"
    whole = {
        "folder": str(tmp_path / "out"),
        "against": "first",
        "sequences": {"one": [{"target": "cat", "superclass": "animal"}]},
        "rows": [
            {"name": "first", "config": str(CONFIG)},
            {"name": "second", "config": str(CONFIG), "overrides": ["train.lr=1e-5"]},
        ],
        "tables": [{"title": "All", "sequence": "one", "backbones": ["sd15"], "seeds": [0]}],
        "overrides": ["train.steps=3"],
    }

    @every_case(CASES["comparisons"], st.data(), scale=scale)
    def check(data):
        file.write_bytes(as_yaml(changed(whole, data)))

        def start():
            cells = list(comparison_cells(read_comparison(file), file, []))
            checked_configs(cells[:3], 1)

        answer(start)


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny base, and a delta of it."""
    folder = tmp_path_factory.mktemp("delta")
    base, model = folder / "base", folder / "model"
    import torch

    tensors = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4).half(), "steps": torch.arange(3)}
    for place, held in ((base, tensors), (model, tensors | {"a.weight": torch.full((2, 3), 2.0)})):
        (place / "unet").mkdir(parents=True)
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        (place / "model_index.json").write_text(json.dumps(index))
        (place / "unet" / "config.json").write_text("{}")
        save_file(held, place / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_delta(base, model, folder / "delta.safetensors")
    return base, folder / "delta.safetensors"


@SCALE
def test_deltas_are_applied_or_refused_in_a_line_and_leave_nothing(scale, delta, tmp_path):
    base, file = delta
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, content = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header["__metadata__"]["tensors"] = json.loads(header["__metadata__"]["tensors"])
    applied = []

    @every_case(CASES["deltas"], st.data(), scale=scale)
    def check(data):
        mutant, output = tmp_path / "mutant.safetensors", tmp_path / "applied"
        if data.draw(st.booleans()):
            told = changed(header, data)
            about = told.get("__metadata__") if isinstance(told, dict) else None
            if isinstance(about, dict) and "tensors" in about and data.draw(st.integers(0, 9)):
                about["tensors"] = json.dumps(about["tensors"])
            packed = json.dumps(told).encode()
            mutant.write_bytes(len(packed).to_bytes(8, "little") + packed + content)
        else:
            place, some = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(max_size=9))
            mutant.write_bytes(whole[:place] + some + whole[place + data.draw(st.integers(0, 9)) :])

        def start():
            apply_delta(base, mutant, output)
            applied.append(load_file(output / "unet" / "diffusion_pytorch_model.safetensors")["a.weight"].sum().item())
            for part in sorted(output.rglob("*"), reverse=True):
                part.rmdir() if part.is_dir() else part.unlink()
            output.rmdir()

        answer(start)
        assert not output.exists() and not list(tmp_path.glob(".*")) and set(applied) <= {12.0}
