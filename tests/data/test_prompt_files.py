"""The user's own lists of prompts: what is read, what is refused, and which images are drawn from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import PROJECT, TINY_RUN, launch

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept, PrepareConfig, PromptsConfig, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.prompt_files import ListedPrompt, read_prompts
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts, naming
from sculpt_dist.evaluation.requests import Evaluation, as_batches, resolve_evaluation
from sculpt_dist.maths.accuracy import Answers, Target, unlearning_scores
from sculpt_dist.run.fingerprint import config_fingerprint

CANVAS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
ODD = ["${train.lr} and ???", "a {concept}, [oil] {object}", "# a bird, -1", "prompt"]  # special texts elsewhere


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def test_a_text_file_is_read_verbatim(tmp_path):
    file = write(tmp_path, "list.TXT", "\ufeff" + "\r\n".join([ODD[0], "", f"  {ODD[1]} ", " \t", *ODD[2:]]))
    assert read_prompts(file) == tuple(map(ListedPrompt, ODD))


def test_a_csv_is_read_with_the_seeds_and_guidances_of_published_lists(tmp_path):
    rows = [
        "case_number,prompt, evaluation_seed,sd_guidance_scale",
        '0,"a ""red"" cat,\n on a mat",12,7.5',
        "",
        "1,???,,",
        "2,x,9223372036854775807",
    ]
    found = read_prompts(write(tmp_path, "list.csv", "\n".join(rows)))
    assert found == (ListedPrompt('a "red" cat, on a mat', 12, 7.5), ListedPrompt("???"), ListedPrompt("x", 2**63 - 1))
    assert read_prompts(write(tmp_path, "two.csv", "sd_seed,seed,prompt\n1,2,x"))[0].seed == 2


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x85", "\u2028"])
def test_every_way_to_end_a_line_is_understood(tmp_path, end):
    prompts = ("a red cat", "a dog", "a bird")
    for start in ("", "\ufeff"):
        assert [line.prompt for line in read_prompts(write(tmp_path, "a.txt", start + end.join(prompts)))] == [*prompts]
        rows = end.join(["Prompt;SEED", *(f"{prompt};{i}.0" for i, prompt in enumerate(prompts))])
        for delimiter in ";,\t":
            found = read_prompts(write(tmp_path, "a.csv", start + rows.replace(";", delimiter)))
            assert found == tuple(ListedPrompt(prompt, i) for i, prompt in enumerate(prompts))


BAD = {
    "list.json": ("{}", "a .txt file, one prompt per line, or a .csv file"),
    "empty.txt": (" \n\n", "contains no prompts"),
    "empty.csv": ("prompt\n", "contains no prompts"),
    "nul.txt": ("a cat\na \0 dog\n", "line 2: contains the control character U+0000"),
    "escape.csv": ("prompt\n\na \x1b[31mdog\n", "line 3: contains the control character U+001B"),
    "latin.txt": (b"a cat\n\na caf\xe9\n", "line 3: is not UTF-8 (byte 0xe9)"),
    "nothing.csv": ("", "line 1: has no column prompt; its columns are: none"),
    "columns.csv": ("text;seed\nx;1\n", "line 1: has no column prompt; its columns are: text;seed"),
    "commas.csv": (
        "prompt,seed\na cat, a dog, 3\n",
        "line 2: has more fields than the 2 columns: put a prompt with commas into double quotes",
    ),
    "hole.csv": ("seed,prompt\n1,x\n\n\n2, \n", "line 5: the prompt is empty"),
    "short.csv": ("seed,prompt\n1\n", "line 2: the prompt is empty"),
    "seed.csv": ("prompt,seed\nx,1.5\n", "line 2: seed='1.5' is not an integer"),
    "large.csv": (
        f"prompt,seed\nx,{2**63}\n",
        "line 2: seed='9223372036854775808' is not an integer from 0 to 2**63 - 1",
    ),
    "guidance.csv": ("prompt,guidance\nx,1\ny,nan\n", "line 3: guidance='nan' is not a finite number"),
    "quote.csv": ('prompt\nx\n"a "cat"\n', "line 3: is not valid csv"),
    "open.csv": ('prompt\nx\n"a cat\ny\nz\n', "line 3: is not valid csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_of_a_bad_file_names_the_file_and_the_line(tmp_path, name):
    file = write(tmp_path, name, BAD[name][0])
    with pytest.raises(ConfigError) as caught:
        read_prompts(file)
    assert name in str(caught.value) and BAD[name][1] in str(caught.value)


def test_a_missing_file_and_a_file_for_an_unknown_target_are_refused_before_the_run_starts(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.txt: this list of prompts does not exist"):
        concept_prompts(Concept("cat", "animal"), PrepareConfig(prompts=PromptsConfig(files={"cat": "nowhere.txt"})))
    cat = "concepts=[{target: cat, superclass: animal}]"
    with pytest.raises(ConfigError, match="files names 'dog', which is not a target; there are: cat"):
        load_config(None, [cat, "prepare.prompts.files.dog=x.txt"])
    with pytest.raises(ConfigError, match="evaluate.reference or evaluate.clip"):
        load_config(None, [cat, "evaluate.retain_prompts=x.txt"])
    config = load_config(None, [cat, "evaluate.prompts.unicorn=x.txt"])
    with pytest.raises(ConfigError, match="evaluate.prompts names 'unicorn', which is not evaluated; choose from: cat"):
        _ = resolved(config).requests


def test_a_list_gives_the_targets_prompts_and_templates_give_the_other_roles(tmp_path):
    file = write(tmp_path, "list.txt", "\n".join([*ODD[:2], "Cats and a CAT, [oil]"]))
    prepare = PrepareConfig(
        samples=3, prompts=PromptsConfig(object=["a {concept}", "one {concept}"], files={"Cat": file})
    )
    prompts = concept_prompts(Concept("cat", r"animal\1", keep=["dog"]), prepare)
    assert prompts.target == (*ODD[:2], "Cats and a CAT, [oil]")
    assert prompts.superclass == (r"a animal\1", r"one animal\1", r"Cats and a animal\1, [oil]")
    assert (prompts.negative, prompts.keep) == ("a cat", ("a dog", "one dog")) and prompts.of(["bird"]) == (
        "a bird",
        "one bird",
    )
    style = concept_prompts(Concept("oil", kind="style"), replace(prepare, prompts=PromptsConfig(files={"oil": file})))
    assert style.target == prompts.target and style.superclass == ("a photo",) * 3
    assert concept_prompts(Concept("dog", "animal"), prepare).target == ("a dog", "one dog")


@pytest.mark.parametrize(
    ("name", "prompt", "replaced"),
    [
        ("猫", "一只猫在草地上", "一只animal在草地上"),
        ("cat", "一只cat在草地上", "一只animal在草地上"),
        ("แมว", "รูปแมวดำ", "รูปanimalดำ"),
        ("cat", "a Cat, a catalogue and a bobcat", "a animal, a catalogue and a bobcat"),
        ("кот", "чёрный кот и которые", "чёрный animal и которые"),
    ],
)
def test_a_name_is_found_in_prompts_of_every_script(name, prompt, replaced):
    assert naming(name).sub("animal", prompt) == replaced


def test_prompts_that_do_not_name_the_target_are_told(tmp_path):
    file = write(tmp_path, "list.txt", "a cat\na dog\nanother one")
    prepare = PrepareConfig(prompts=PromptsConfig(files={"cat": file}))
    with pytest.warns(UserWarning, match="2 of 3 prompts do not name 'cat', such as 'a dog'"):
        prompts = concept_prompts(Concept("cat", "animal"), prepare)
    assert prompts.superclass == ("a animal", "a photo of animal", "a photo of animal")


def test_prompts_beyond_the_number_of_samples_are_dropped_with_a_warning(tmp_path):
    prepare = PrepareConfig(samples=2, prompts=PromptsConfig(files={"cat": write(tmp_path, "list.txt", "x\ny\nz")}))
    with pytest.warns(UserWarning, match="contains 3 prompts; prepare.samples=2, so only the first 2"):
        assert concept_prompts(Concept("cat", "animal"), prepare).target == ("x", "y")


def resolved(config: RunConfig) -> Evaluation:
    return resolve_evaluation(config.evaluate, config.concepts)


def lists(tmp_path: Path) -> RunConfig:
    judged = write(tmp_path, "judged.csv", "prompt,seed,guidance\nx,5,2\ny,,\nx,6,4\nz,7,2")
    retained = write(tmp_path, "retained.txt", "p\nq\np")
    overrides = [
        f"evaluate.prompts.cat={judged}",
        f"evaluate.retain_prompts={retained}",
        "evaluate.reference=canvas",
        "evaluate.images=1",
    ]
    named = [
        "concepts=[{target: cat, superclass: animal}]",
        "evaluate.objects=[house]",
        "evaluate.styles=[neon]",
        "evaluate.guidance=4",
    ]
    return load_config(None, [*overrides, *named])


def test_every_line_becomes_an_image_with_its_own_seed_and_guidance(tmp_path):
    config = lists(tmp_path)
    house, *cats = (request for request in resolved(config).requests if request.judged)
    assert (house.prompt, house.style, house.guidance) == ("a photo of a house in neon style", 0, 4)
    assert [(request.prompt, request.object, request.style, request.guidance) for request in cats] == [
        ("x", 1, -1, 2),
        ("y", 1, -1, 4),
        ("x", 1, -1, 4),
        ("z", 1, -1, 2),
    ]
    assert [cats[i].seed for i in (0, 2, 3)] == [5, 6, 7] and [request.shown for request in cats] == [
        "cat--none.png",
        None,
        None,
        None,
    ]
    assert cats[0].prompt_id == cats[2].prompt_id and len({request.prompt_id for request in (house, *cats)}) == 4
    retained = [request for request in resolved(config).requests if not request.judged]
    assert [request.prompt for request in retained] == ["p", "q", "p"] and len(
        {request.seed for request in retained}
    ) == 3


def test_a_batch_has_one_guidance_and_is_scored_as_a_whole_or_not_at_all(tmp_path):
    config = lists(tmp_path)
    wanted = resolved(config).requests
    batches = as_batches(wanted, 2)
    assert [[request.prompt for request in batch] for batch in batches] == [
        ["a photo of a house in neon style"],
        ["x", "z"],
        ["y", "x"],
        ["p", "q"],
        ["p"],
    ]
    assert all(len({(request.guidance, request.judged, request.listed) for request in batch}) == 1 for batch in batches)
    templates = resolved(load_config(None, ["evaluate.images=3"])).requests
    assert sum(as_batches(templates, 7), []) == list(templates) and len(templates) == 180  # noqa: RUF017 (a few lists)


def test_an_image_is_not_scored_on_what_its_prompt_does_not_name():
    column = np.array
    answers = Answers(column([0, 1]), column([0, 1]), column([-1, 2]), column([-1, 1]), column([2, 2]))
    scores = unlearning_scores(answers, [Target("object", 0, ())])
    assert (scores["UA"], scores["IRA"], scores["CRA"], scores["CTA"]) == (1, 1, 1, None)


def test_the_content_of_a_list_is_part_of_the_fingerprint_of_a_run(tmp_path):
    cat = "concepts=[{target: cat, superclass: animal}]"
    file = write(tmp_path, "list.txt", "x\ny")
    listed = load_config(None, [cat, f"prepare.prompts.files.cat={file}"])
    before = config_fingerprint(listed)
    write(tmp_path, "list.txt", "x\n\ny\n")
    assert config_fingerprint(listed) == before != config_fingerprint(load_config(None, [cat]))
    write(tmp_path, "list.txt", "x\nz")
    assert config_fingerprint(listed) != before


DETECTOR = """
import torch
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict

class Bright(Classifier):
    objects = ("nudity",)
    def __init__(self, where, objects, styles):
        assert objects == ("nudity",) and styles == ()
    def classify(self, images):
        bright = images.float().mean((1, 2, 3)) > 150
        return Verdict(torch.where(bright, 0, -1), None)
"""


def run(tmp_path: Path, *arguments: str, ranks: int = 1, code: int = 0) -> str:
    (tmp_path / "my_detector.py").write_text(DETECTOR)
    return launch(ranks, "-m", "sculpt_dist", *arguments, code=code, modules=tmp_path)


SHORT = [*TINY_RUN[:-1], "evaluate.batch=2", f"model.path={CANVAS}", "evaluate.classifier=own:my_detector:Bright"]
PROMPTS = [
    *ODD,
    "a photo of a bird in neon style that is far too long for ten tokens",
    "a photo of a cat",
    "a photo of a cat",
]


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["esd-nudity", "dm_cal-nudity"])
def test_a_nudity_preset_runs_with_a_list_and_a_detector(tmp_path, preset):
    file, folder = write(tmp_path, "list.txt", "\n".join(PROMPTS)), tmp_path / "run"
    small = [*SHORT, "prepare.samples=7", f"prepare.prompts.files.nudity={file}", f"run.folder={folder}"]
    small += ["method.sampler_steps=3", "mask.collect=0"] if preset == "esd-nudity" else ["mask.refresh=2"]
    printed = run(tmp_path, "unlearn", str(PROJECT / "configs" / "presets" / f"{preset}.yaml"), *small)
    before, after = (
        json.loads((folder / "evaluation" / stage / "scores.json").read_text())["plain"]
        for stage in ("before", "after-00")
    )
    counted = {stage["targets"]["nudity"]["seen"] for stage in (before, after)}
    assert all(0 <= seen <= 7 for seen in counted) and before["images"] == after["images"] == {"target": 7, "other": 0}
    assert before["UA"] == 1 - before["targets"]["nudity"]["seen"] / 7 and before["IRA"] is None
    seen, seen_before = (stage["targets"]["nudity"]["seen"] for stage in (after, before))
    assert f"nudity is seen in {seen} of 7 images, {seen_before} before" in printed
    assert (folder / "model" / "model_index.json").is_file() and "it is cut before" in printed
    if preset == "dm_cal-nudity":
        index = json.loads((folder / "data" / "object-nudity" / "target" / "index.json").read_text())
        assert index["recipe"]["prompts"] == PROMPTS
    write(tmp_path, "list.txt", "another")
    printed = run(tmp_path, "unlearn", str(PROJECT / "configs" / "presets" / f"{preset}.yaml"), *small, code=2)
    assert "list.txt: its prompts have changed" in printed


@pytest.mark.two_ranks
@pytest.mark.slow
def test_two_ranks_draw_the_same_images_of_a_list(tmp_path):
    judged = (
        "prompt,evaluation_seed,evaluation_guidance\n"
        "a photo of a cat,1,3\na photo of a bird,2,5\na photo of a cat,3,3\na photo of a boat,,\na tree,4,5\n"
    )
    retained = "\n".join(f"a photo of a {name}" for name in ("house", "car", "tower", "bridge", "flower"))
    files = [
        f"evaluate.prompts.nudity={write(tmp_path, 'judged.csv', judged)}",
        f"evaluate.retain_prompts={write(tmp_path, 'retained.txt', retained)}",
    ]
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        preset = str(PROJECT / "configs" / "presets" / "esd-nudity.yaml")
        given = [*SHORT, *files, "evaluate.reference=canvas", f"run.folder={tmp_path / 'run'}"]
        run(tmp_path, "evaluate", preset, *given, "--model", str(CANVAS), "--output", str(out), ranks=ranks)
        scores = json.loads((out / "scores.json").read_text())["plain"]
        found[ranks] = (
            (out / "answers.json").read_text(),
            (out / "images" / "nudity--none.png").read_bytes(),
            scores.pop("extra"),
            scores,
        )
    assert (
        found[1][:2] == found[2][:2]
        and found[1][3] == found[2][3]
        and found[1][3]["images"] == {"target": 5, "other": 0}
    )
    # FID of fewer images than features is accurate to 1e-7 (see metrics/fid.py), on whichever machine
    assert found[1][2] == pytest.approx(found[2][2], rel=1e-7) and found[1][2]["fid"] > 0


@pytest.mark.parametrize(("templates", "names"), [(3, 4), (4, 4), (6, 4), (13, 4), (2, 3), (1, 5)])
def test_few_prompts_cover_all_names_and_many_templates(templates, names):
    forms, things = [f"{{concept}} form {i}" for i in range(templates)], [f"thing {i}" for i in range(names)]
    prompts = ConceptPrompts((), (), "", (), tuple(forms)).of(things)
    assert len(set(prompts)) == len(prompts) == templates * names
    assert all(
        prompt.endswith(f"form {i % templates}") for i, prompt in enumerate(prompts)
    )  # like the target prompt at this index
    for drawn in range(names, len(prompts) + 1):
        held = [sum(prompt.startswith(thing + " ") for prompt in prompts[:drawn]) for thing in things]
        assert min(held) >= 1 and max(held) - min(held) <= 2


def test_embeddings_of_listed_prompts_are_kept_for_their_batch_only():
    backbone = Backbone(CANVAS, torch.float32, torch.device("cpu"))
    kept = backbone.embed(["a cat"])
    with backbone.temporary_embeddings():
        once = backbone.embed(["a cat", "a dog"])
    backbone.encode_prompts = None  # nothing can be embedded any more
    assert torch.equal(backbone.embed(["a cat"]).tokens, kept.tokens) and torch.equal(once.tokens[:1], kept.tokens)
    with pytest.raises(TypeError):
        backbone.embed(["a dog"])
