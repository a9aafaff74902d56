"""Where models come from, and how damaged ones are detected before anything is trained."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from harness import PROJECT, SMALL, rank_environment, sculpt
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.io.folders import load_tokenizer, stored_weights, unloaded_files, weight_files
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.backbones.sana import Backbone as Sana
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.planning.check import check_run
from sculpt_dist.run.model import base_fingerprint
from sculpt_dist.run.preflight import check_model

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
CPU = torch.device("cpu")
PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    shutil.copytree(ASSETS / "sd15", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model):
    """The denoiser in several files, as large checkpoints have it."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float16)
    shutil.rmtree(model / "unet")
    net.save_pretrained(model / "unet", max_shard_size="1MB")
    return model


def opened(folder: Path) -> Backbone:
    return Backbone(folder, torch.float32, CPU)


def test_sharded_weights_equal_those_of_the_plain_file(sharded):
    assert len(weight_files(sharded / "unet")) > 2
    plain = load_file(ASSETS / "sd15" / "unet" / PLAIN)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in stored_weights(sharded, "unet"))
    whole = opened(sharded).net.state_dict()
    assert all(torch.equal(whole[name], tensor.float()) for name, tensor in plain.items())


def test_a_large_export_is_sharded(sharded, monkeypatch):
    from sculpt_dist.backbones.io import writing

    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 2_000_000)
    out = sharded.parent / "out"
    write_pipeline(sharded, out, "unet", torch.float32, iter(reversed(list(stored_weights(sharded, "unet")))))
    files = sorted(path.name for path in (out / "unet").glob("*.safetensors"))
    assert len(files) == 4 and files[0] == "diffusion_pytorch_model-00001-of-00004.safetensors"
    assert all((out / "unet" / name).stat().st_size < 2_100_000 for name in files)
    base = opened(sharded).net.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in opened(out).net.state_dict().items())


STRAYS = [
    "backup.safetensors",
    "diffusion_pytorch_model_ema.safetensors",
    "diffusion_pytorch_model (1).safetensors",
    "diffusion_pytorch_model.old.bak.safetensors",
    "model.safetensors",
    "pytorch_lora_weights.safetensors",
    "0.safetensors",
]


@pytest.mark.parametrize("in_shards", [False, True])
def test_only_the_weights_that_diffusers_loads_by_name_are_read_and_exported(model, request, in_shards):
    if in_shards:
        request.getfixturevalue("sharded")
    loaded, before = weight_files(model / "unet"), opened(model).net.state_dict()
    wrong = {name: 2 * tensor for name, tensor in load_file(ASSETS / "sd15" / "unet" / PLAIN).items()}
    for name in STRAYS:
        save_file(wrong, model / "unet" / name, {"format": "pt"})
    assert weight_files(model / "unet") == loaded and {f.name for f in unloaded_files(model / "unet")} == set(STRAYS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened(model).net.state_dict().items())
    out = model.parent / "out"
    write_pipeline(model, out, "unet", torch.float32, stored_weights(model, "unet"))
    assert not unloaded_files(out / "unet")
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened(out).net.state_dict().items())
    for file in loaded:
        file.unlink()
    with pytest.raises(ModelError, match="unet"):
        opened(model)


def test_a_run_names_what_it_does_not_load_once(canvas_config, tmp_path, model):
    shutil.copy(model / "unet" / PLAIN, model / "unet" / "backup.safetensors")
    given = [*SMALL, "evaluate.enabled=false", f"model.path={model}", f"run.folder={tmp_path / 'run'}"]
    printed = sculpt("prepare", canvas_config, *given)
    assert printed.count("unet/backup.safetensors: no weights by their names, so neither loaded nor exported") == 1


def test_code_of_a_model_folder_is_never_run(model, monkeypatch):
    (model / "tokenizer" / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Evil: ...\n")
    file = model / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    file.write_text(json.dumps(content))
    load_tokenizer.cache_clear()
    opened(model).embed(["a cat"])  # by the library's own class
    file.write_text(json.dumps(content | {"tokenizer_class": "Evil"}))
    load_tokenizer.cache_clear()
    with pytest.raises(ModelError, match="tokenizer: cannot be loaded"):
        opened(model).embed(["a cat"])
    assert not (model / "ran").exists()


@pytest.mark.parametrize("length", [None, 10**6])
def test_a_tokenizer_takes_no_more_tokens_than_its_encoder(model, length):
    file = model / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text())
    takes = content.pop("model_max_length")
    file.write_text(json.dumps(content if length is None else content | {"model_max_length": length}))
    load_tokenizer.cache_clear()
    assert opened(model).embed(["a cat"]).tokens.shape[1] == takes
    with pytest.raises(ConfigError, match="it would be cut before"):
        opened(model).embed(["a cat " * 100])


def test_a_link_out_of_the_models_folder_is_not_exported(model, tmp_path):
    (tmp_path / "secret.txt").write_text("root:x:0:0")
    (model / "vae" / "secret.json").symlink_to(tmp_path / "secret.txt")
    (model / "tokenizer" / "notes.txt").write_text("not a file of a tokenizer")
    write_pipeline(model, tmp_path / "out", "unet", torch.float32, stored_weights(model, "unet"))
    assert not (tmp_path / "out" / "vae" / "secret.json").exists()
    assert not (tmp_path / "out" / "tokenizer" / "notes.txt").exists()
    assert opened(tmp_path / "out").embed(["a cat"]).tokens.isfinite().all()
    (model / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ModelError, match=r"vocab\.txt: is a link to .*secret\.txt, outside the model's folder"):
        write_pipeline(model, tmp_path / "other", "unet", torch.float32, stored_weights(model, "unet"))


@pytest.mark.parametrize("kind", ["deep", "pipe", "device", "folder"])
def test_a_file_that_is_none_or_nested_without_end_is_refused_at_once(model, kind):
    for file in (model / "model_index.json", model / "unet" / "config.json"):
        content = file.read_text()
        file.unlink()
        if kind == "deep":
            file.write_text("[" * 100_000)
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()
        with pytest.raises(ModelError, match=file.name):
            opened(model)
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_text(content)


def test_an_index_that_lists_a_missing_shard_is_refused(sharded):
    (sharded / "unet" / "diffusion_pytorch_model-00002-of-00004.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"index.json: lists 1 shards that are missing \(diffusion_pytorch_model-00002"
    ):
        opened(sharded)


@pytest.mark.parametrize("keep", [0, 5, 2000, -3])
def test_a_cut_shard_is_refused_before_anything_is_loaded(sharded, keep):
    file = sharded / "unet" / "diffusion_pytorch_model-00003-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="00003-of-00004.safetensors: is (cut short|no safetensors)"):
        opened(sharded)


def test_a_flipped_bit_is_detected_by_the_checksums_of_an_export(model):
    out = model.parent / "out"
    write_pipeline(model, out, "unet", torch.float16, stored_weights(model, "unet"))
    before = base_fingerprint(out)
    content = bytearray((out / "unet" / PLAIN).read_bytes())
    content[-1000] ^= 1
    (out / "unet" / PLAIN).write_bytes(content)
    with pytest.raises(ModelError, match=f"unet/{PLAIN}: is damaged or was changed: its sha256"):
        base_fingerprint(out)
    content[-1000] ^= 1
    (out / "unet" / PLAIN).write_bytes(content)
    assert base_fingerprint(out) == before
    checked = subprocess.run(["sha256sum", "-c", "CHECKSUMS"], cwd=out, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_an_infinite_weight_is_detected_without_checksums(model):
    tensors = load_file(model / "unet" / PLAIN)
    tensors["conv_in.weight"].view(-1)[7] = float("inf")
    save_file(tensors, model / "unet" / PLAIN, {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights hold values that are not finite .conv_in.weight"):
        opened(model).net  # noqa: B018 (the access itself is tested)


@pytest.mark.slow
def test_half_a_net_is_refused_on_every_stage(canvas_config, tmp_path):
    shutil.copytree(ASSETS / "sana", tmp_path / "half")
    file = tmp_path / "half" / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"num_layers": 4', '"num_layers": 2'))
    arguments = [*SMALL, "model.arch=sana", f"model.path={tmp_path / 'half'}", "evaluate.enabled=false"]
    for stage in (2, 3):
        printed = sculpt(
            "unlearn", canvas_config, *arguments, f"engine.stage={stage}", f"run.folder={tmp_path / str(stage)}", code=2
        )
        assert "weights do not fit" in printed and "transformer_blocks.2" in printed
    assert "weights do not fit" in sculpt("check", canvas_config, *arguments, code=2)


@pytest.mark.two_ranks
@pytest.mark.slow
def test_an_infinite_weight_is_detected_on_stage_3_too(canvas_config, tmp_path, model):
    tensors = load_file(model / "unet" / PLAIN)
    tensors["conv_in.weight"].view(-1)[7] = float("inf")
    save_file(tensors, model / "unet" / PLAIN, {"format": "pt"})
    arguments = [
        *SMALL,
        f"model.path={model}",
        f"run.folder={tmp_path / 'run'}",
        "evaluate.enabled=false",
        "engine.stage=3",
    ]
    printed = sculpt("unlearn", canvas_config, *arguments, ranks=2, code=2)
    assert printed.count("ModelError:") == 1 and "not finite (conv_in.weight" in printed


@pytest.mark.parametrize("name", ["model.ckpt", pytest.param("cut.safetensors", marks=pytest.mark.slow)])
def test_a_bad_single_file_is_reported_before_its_missing_settings(canvas_config, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "model.ckpt":
        torch.save({"a": torch.zeros(2)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes((ASSETS / "sd15" / "unet" / PLAIN).read_bytes()[:-10])
    printed = sculpt(
        "unlearn", canvas_config, *SMALL, f"model.path={tmp_path / name}", f"run.folder={tmp_path / 'run'}", code=2
    )
    assert ("holds pickled weights" if name == "model.ckpt" else "is cut short") in printed


@pytest.mark.two_ranks
def test_an_error_of_one_rank_is_printed_by_the_first(canvas_config, tmp_path):
    """A damaged image in the second rank's share, and a prompt that is too long."""
    from PIL import Image

    (tmp_path / "images" / "bird").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / "bird" / f"{i}.png")
    (tmp_path / "images" / "bird" / "4.png").write_bytes(b"no image")
    arguments = ["prepare", canvas_config, *SMALL, f"run.folder={tmp_path / 'run'}"]
    own = [f"prepare.images={tmp_path / 'images'}", "prepare.images_missing=draw"]
    printed = sculpt(*arguments, *own, ranks=2, code=2)
    assert printed.count("ConfigError:") == 1 and "4.png: cannot be read" in printed
    prompts = "['a {concept}', 'a photo of a {concept} in natural style and more']"
    long = f"concepts=[{{target: bird, superclass: animal, prompts: {prompts}}}]"
    printed = sculpt(*arguments, "prepare.batch=1", long, ranks=2, code=2)
    assert printed.count("ConfigError:") == 1 and "it would be cut before" in printed


@pytest.mark.slow
def test_a_flipped_bit_in_an_export_is_detected_when_it_is_evaluated(canvas_config, tmp_path, model):
    out = tmp_path / "out"
    write_pipeline(model, out, "unet", torch.float16, stored_weights(model, "unet"))
    content = bytearray((out / "unet" / PLAIN).read_bytes())
    content[-1000] ^= 1
    (out / "unet" / PLAIN).write_bytes(content)
    printed = sculpt("evaluate", canvas_config, *SMALL, f"run.folder={tmp_path / 'run'}", "--model", str(out), code=2)
    assert "is damaged or was changed" in printed


def test_spare_variants_and_whole_models_are_not_fetched():
    from fnmatch import fnmatch

    from sculpt_dist.backbones.io.find import WANTED, _is_spare

    held = [
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    held += [
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "model_index.json",
        "unet/config.json",
    ]
    fetched = [file for file in held if any(fnmatch(file, wanted) for wanted in WANTED) and not _is_spare(file, held)]
    assert fetched == [held[1], held[3], "model_index.json", "unet/config.json"]


def test_mixed_dtypes_are_refused(model):
    tensors = load_file(model / "unet" / PLAIN)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].float()
    save_file(tensors, model / "unet" / PLAIN, {"format": "pt"})
    with pytest.raises(ModelError, match=r"mixed dtypes, .*1 in float32 \(conv_in.weight"):
        opened(model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(model, part):
    shutil.rmtree(model / part)
    with pytest.raises(ModelError, match=f"{part}.*lacks"):
        opened(model).embed(["a cat"])


def test_pickled_weights_are_refused_with_the_command_that_converts_them(model):
    (model / "vae" / PLAIN).unlink()
    torch.save({"a": torch.zeros(2)}, model / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="diffusion_pytorch_model.bin: holds pickled weights.*python -c"):
        opened(model)


@pytest.mark.parametrize(
    ("arch", "folder", "message"),
    [
        ("sdxl", "sd15", "holds a StableDiffusionPipeline, model.arch expects StableDiffusionXLPipeline"),
        ("sd15", "sdxl", "holds a StableDiffusionXLPipeline, model.arch expects StableDiffusionPipeline"),
    ],
)
def test_a_checkpoint_of_another_kind_ends_the_run_before_anything_is_drawn(
    canvas_config, tmp_path, arch, folder, message
):
    arguments = [
        *SMALL,
        f"model.arch={arch}",
        f"model.path={ASSETS / folder}",
        f"run.folder={tmp_path / 'run'}",
        "evaluate.enabled=false",
    ]
    printed = sculpt("unlearn", canvas_config, *arguments, code=2)
    assert message in printed and "Traceback" not in printed and not (tmp_path / "run" / "data").exists()


def rewritten(file: Path, change) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_a_shard_that_lacks_what_its_index_promises_is_refused(sharded):
    file = sharded / "unet" / "diffusion_pytorch_model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes().replace(b'weight":', b'veight":', 1))  # one bit of the header
    with pytest.raises(
        ModelError,
        match="2 weights are not where it says, first .*veight, which is not listed and is in .*00002-of-00004",
    ):
        opened(sharded)


def test_a_component_of_another_class_is_refused(tmp_path):
    shutil.copytree(ASSETS / "sana", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.copytree(ASSETS / "sd15" / "vae", tmp_path / "model" / "vae")
    with pytest.raises(ModelError, match="vae: holds a AutoencoderKL, not a AutoencoderDC"):
        Sana(tmp_path / "model", torch.float32, CPU)


@pytest.mark.parametrize(
    ("arch", "part", "taken", "what"),
    [
        ("sd15", "text_encoder", ("sdxl", "text_encoder_2"), "one prediction of unet for one prompt: .*compare the"),
        ("sd15", "unet", ("sdxl", "unet"), "addition_embed_type=text_time: this net takes other size and text cond"),
        ("sdxl", "unet", ("sd15", "unet"), "addition_embed_type=None: this net takes other size and text conditions"),
    ],
)
def test_components_that_do_not_fit_together_are_refused_before_anything_is_drawn(tmp_path, arch, part, taken, what):
    shutil.copytree(ASSETS / arch, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    shutil.copytree(ASSETS.joinpath(*taken), tmp_path / "model" / part)
    config = load_config(CONFIG, [f"model.arch={arch}", f"model.path={tmp_path / 'model'}"])
    with pytest.raises(ModelError, match=what):
        check_model(config.model, tmp_path / "model")
    with pytest.raises(ModelError, match="compare the sizes|takes other size"):
        check_run(config, 1)


def test_the_command_reports_components_that_do_not_fit_together(tmp_path, model):
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(ASSETS / "sdxl" / "text_encoder_2", model / "text_encoder")
    printed = sculpt("unlearn", str(CONFIG), *SMALL, f"model.path={model}", f"run.folder={tmp_path / 'run'}", code=2)
    assert (
        "Traceback" not in printed and "one prediction of unet" in printed and not (tmp_path / "run" / "data").exists()
    )


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", ["[]", "{}"])
def test_empty_settings_are_refused(model, file, content):
    (model / file).write_text(content)
    with pytest.raises(ModelError):
        opened(model)


def test_a_list_for_a_size_is_refused(model):
    rewritten(model / "unet" / "config.json", lambda content: content | {"sample_size": [8, 8]})
    with pytest.raises(ModelError, match="has a missing or invalid size"):
        opened(model)


def test_schedulers_without_alpha_bar_are_refused(model):
    for name, message in (("EDMEulerScheduler", "has no alpha_bar"), ("SASolverScheduler", "adds noise of its own")):
        rewritten(
            model / "scheduler" / "scheduler_config.json",
            lambda content: content | {"_class_name": name, "prediction_type": "epsilon"},  # noqa: B023 (called at once)
        )
        with pytest.raises(ModelError, match=message):
            opened(model)


def test_pickles_are_refused_in_a_component_that_is_only_copied(model):
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "config.json").write_text("{}")
    (model / "safety_checker" / "pytorch_model.bin").write_bytes(b"")
    opened(model)  # the index does not name it, so it is not copied
    rewritten(
        model / "model_index.json",
        lambda content: content | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
    )
    with pytest.raises(ModelError, match="safety_checker/pytorch_model.bin: holds pickled weights"):
        opened(model)


def test_the_conversion_command_writes_weights_that_can_be_read(model):
    part = model / "text_encoder"
    held = load_file(part / "model.safetensors")
    torch.save(held, part / "pytorch_model.bin")
    (part / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="convert it with") as refused:
        opened(model)
    command = shlex.split(str(refused.value).partition("convert it with: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    encoder = opened(model).part("text_encoder").state_dict()
    assert all(torch.equal(encoder[name], tensor.float()) for name, tensor in held.items() if name in encoder)


def test_a_single_file_of_stable_diffusion_2_is_refused_without_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_file({"cond_stage_model.model.ln_final.weight": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(
        ModelError,
        match="two.safetensors: looks like Stable Diffusion 2.x; single files of .* 1.x and SDXL are read",
    ):
        check_run(
            load_config(CONFIG, [f"model.path={tmp_path / 'two.safetensors'}", f"run.folder={tmp_path / 'run'}"]), 1
        )


@pytest.mark.two_ranks
def test_a_damaged_shard_ends_every_rank_with_one_line(canvas_config, tmp_path, sharded):
    file = sharded / "unet" / "diffusion_pytorch_model-00003-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    arguments = [
        *SMALL,
        f"model.path={sharded}",
        f"run.folder={tmp_path / 'run'}",
        "evaluate.enabled=false",
        "engine.stage=3",
    ]
    printed = sculpt("unlearn", canvas_config, *arguments, ranks=2, code=2)
    assert printed.count("ModelError:") == 1 and "00003-of-00004.safetensors: is cut short" in printed


# The hub, and the cache of its client

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A cache with one revision of somebody/model, named `v2`."""
    home = tmp_path / "hub"
    repository = home / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text(REVISION)
    shutil.copytree(ASSETS / "sd15", repository / "snapshots" / REVISION)
    return home


def find(cache: Path, name: str, revision: str | None, **environment: str) -> tuple[str, float]:
    """(result or error of find_folder in a fresh process, seconds it took)."""
    code = (
        "import sys, time\n"
        "from sculpt_dist.backbones.io.find import find_folder\n"
        "from sculpt_dist.core.errors import ModelError\n"
        f"began = time.monotonic()\ntry: print(find_folder({name!r}, 'sd15', {revision!r}))\n"
        "except ModelError as error: print('ModelError', error)\nprint(time.monotonic() - began)"
    )
    env = (
        rank_environment()
        | {"HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        | environment
    )
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    *lines, seconds = printed.stdout.strip().splitlines()
    return "\n".join(lines), float(seconds)


def test_offline_the_cached_revision_is_used(cache):
    found, _ = find(cache, "somebody/model", "v2", HF_HUB_OFFLINE="1")
    assert found == str(cache / "models--somebody--model" / "snapshots" / REVISION)
    found, _ = find(cache, "somebody/model", "v3", HF_HUB_OFFLINE="1")
    assert found.startswith("ModelError") and "network (HF_HUB_OFFLINE is set)" in found


def test_a_hub_that_does_not_answer_is_given_up_within_10_seconds_and_the_cache_still_works(cache):
    with socket.socket() as mute:  # accepts connections and never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{mute.getsockname()[1]}"}
        found, seconds = find(cache, "nobody/nothing", None, **endpoint)
        assert (
            "is neither a local folder nor in the cache, and the hub does not answer: network (ReadTimeout" in found
            and seconds < 10
        )
        found, seconds = find(cache, "somebody/model", "v2", **endpoint)
        assert found.endswith(REVISION) and seconds < 10


class Faltering(http.server.BaseHTTPRequestHandler):
    """A hub that lists the model's files, and then stops answering."""

    def do_GET(self):
        if "/tree/" in self.path or "/resolve/" in self.path:
            time.sleep(60)
            return
        files = [{"rfilename": "model_index.json"}, {"rfilename": "unet/config.json"}]
        content = json.dumps(
            {"id": "a/b", "modelId": "a/b", "sha": REVISION, "siblings": files, "private": False, "tags": []}
        ).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_a_hub_that_stops_answering_is_given_up(cache):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faltering)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found, seconds = find(cache, "a/b", None, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert found.startswith("ModelError") and "network" in found and seconds < 20


class Giving(Faltering):
    """A hub with a small model."""

    files = {
        "model_index.json": b"{}",
        "unet/config.json": b'{"a": 1}',
        "unet/model.bin": b"pickled",
        "README.md": b"---\nlicense: mit\n---\n",  # an exported model's card names the licence
        "notes.md": b"text",
    }

    def do_GET(self):
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if not name:
            content = json.dumps(
                {
                    "id": "a/b",
                    "sha": REVISION,
                    "siblings": [{"rfilename": file} for file in self.files],
                    "private": False,
                    "tags": [],
                }
            ).encode()
        else:
            content = self.files[name]
        self.send_response(200)
        for header, value in {
            "X-Repo-Commit": REVISION,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Content-Length": len(content),
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


def test_the_files_of_a_pipeline_are_fetched_and_found_again_offline(cache):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Giving)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found, _ = find(cache, "a/b", None, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    folder = cache / "models--a--b" / "snapshots" / REVISION
    assert found == str(folder) and (folder / "unet" / "config.json").read_text() == '{"a": 1}'
    fetched = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert fetched == ["README.md", "config.json", "model_index.json"]
    assert find(cache, "a/b", None, HF_HUB_OFFLINE="1")[0] == str(folder)


def test_a_hub_that_refuses_connections_is_reported_as_a_network_error(cache):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    found, seconds = find(cache, "nobody/nothing", None, HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert "network (ConnectError" in found and seconds < 10


def test_large_files_of_the_cache_are_checked_against_their_names(cache):
    from sculpt_dist.core.files import file_sha256

    snapshot = cache / "models--somebody--model" / "snapshots" / REVISION
    file, blobs = snapshot / "unet" / PLAIN, snapshot.parent.parent / "blobs"
    blobs.mkdir()
    blob = blobs / file_sha256(file)
    os.replace(file, blob)
    file.symlink_to(blob)
    before = base_fingerprint(snapshot)
    content = bytearray(blob.read_bytes())
    content[-1000] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged or was changed"):
        base_fingerprint(snapshot)
    content[-1000] ^= 1
    blob.write_bytes(content)
    assert base_fingerprint(snapshot) == before
