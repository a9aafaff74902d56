"""Delta files: applied and removed bit for bit, in every dtype and sharding; refused for any other base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.formats.delta import apply_delta, write_delta
from sculpt_dist.backbones.formats.delta_file import BITS, FORMAT, read_delta
from sculpt_dist.backbones.io.folders import CHECKSUMS, stored_weights, weight_files
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.tensorfile import DTYPES
from sculpt_dist.run.model import base_fingerprint

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["a.weight", "b.weight", "steps"]
Tensors = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def same(left: Tensors, right: Tensors) -> bool:
    """Equal in names, dtypes, and every bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(bits(left[name]), bits(right[name])) for name in left
    )


def weights(folder: Path, net: str = "unet") -> Tensors:
    return dict(stored_weights(folder, net))


def files(folder: Path) -> dict[str, bytes]:
    """All but the checksums, which every folder that is written gets."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if name != CHECKSUMS}


def unlearned(tensors: Tensors) -> tuple[Tensors, set[str]]:
    """(the tensors with the keys and values of the cross-attention changed, the names of those)."""
    rng = torch.Generator().manual_seed(0)
    names = {name for name in tensors if "attn2.to_k" in name or "attn2.to_v" in name}
    moved = {
        name: (tensors[name] + 0.02 * torch.randn(tensors[name].shape, generator=rng)).to(tensors[name].dtype)
        for name in names
    }
    return tensors | moved, names


def tiny(
    folder: Path, tensors: Tensors, net: str = "unet", shards: int = 1, pipeline: str = "StableDiffusionPipeline"
) -> Path:
    """A pipeline folder with only a denoiser; its tensors need not form a model."""
    part = folder / net
    part.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, net: ["diffusers", "Net"]}))
    (part / "config.json").write_text("{}")
    if shards == 1:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % shards == i}
        save_file(held, part / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (part / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def pair(dtype: torch.dtype = torch.float16) -> tuple[Tensors, Tensors]:
    """A tiny base and a model in which one of its three tensors differs."""
    rng = torch.Generator().manual_seed(1)
    first, second = (torch.randn(shape, generator=rng).to(dtype) for shape in ((4, 3), (5,)))
    base = dict(zip(NAMES, (first, second, torch.arange(3))))
    return base, base | {"a.weight": (first.float() * 1.5).to(dtype)}


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, set[str]]:
    """(the shipped fp16 model, a changed one in fp16, the same as a run exports it in fp32, the changed names)."""
    folder = tmp_path_factory.mktemp("canvas")
    changed, names = unlearned(weights(ASSETS))
    half, single = folder / "half", folder / "single"
    shutil.copytree(ASSETS, half)
    save_file(changed, half / "unet" / WEIGHTS, metadata={"format": "pt"})
    rng = torch.Generator().manual_seed(2)  # a run's result has more digits than the base's dtype holds
    finer = {
        name: changed[name].float() * (1 + 1e-5 * torch.rand(changed[name].shape, generator=rng)) for name in names
    }
    whole = {name: finer.get(name, tensor.float()) for name, tensor in reversed(changed.items())}
    write_pipeline(ASSETS, single, "unet", torch.float32, iter(whole.items()))
    return ASSETS, half, single, names


@pytest.mark.parametrize("precision", ["half", "single"])
def test_a_delta_of_the_shipped_model_applies_and_comes_off_bit_for_bit(canvas, tmp_path, precision):
    base, half, single, names = canvas
    model = half if precision == "half" else single
    file = tmp_path / "deltas" / "bird.safetensors"
    assert write_delta(base, model, file) == len(names) > 0
    assert set(read_delta(file).changes) == names
    expected = {name: tensor.half() for name, tensor in weights(model).items()}
    assert not same(expected, weights(base))
    raw = sum(tensor.nbytes for name, tensor in expected.items() if name in names)
    assert raw < file.stat().st_size < raw + 600 * len(names) + 1000 < (base / "unet" / WEIGHTS).stat().st_size / 2

    apply_delta(base, file, tmp_path / "applied")
    assert same(weights(tmp_path / "applied"), expected)
    before, after = files(base), files(tmp_path / "applied")
    assert {path for path in before if before[path] != after.get(path)} == {
        f"unet/{WEIGHTS}"
    } and before.keys() == after.keys()
    with safe_open(tmp_path / "applied" / "unet" / WEIGHTS, "pt") as content:
        assert content.metadata() == {"format": "pt"}

    apply_delta(tmp_path / "applied", file, tmp_path / "removed", remove=True)
    assert same(weights(tmp_path / "removed"), weights(base))
    assert not list(tmp_path.glob(".*"))


def test_the_applied_folder_loads_in_plain_diffusers(canvas, tmp_path):
    from diffusers import StableDiffusionPipeline

    base, _, single, names = canvas
    write_delta(base, single, tmp_path / "delta.safetensors")
    apply_delta(base, tmp_path / "delta.safetensors", tmp_path / "applied")
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "applied", local_files_only=True, torch_dtype=torch.float16
    )
    loaded = pipeline.unet.state_dict()
    assert same({name: loaded[name] for name in names}, {name: weights(single)[name].half() for name in names})


def test_a_sharded_denoiser_keeps_its_shards(canvas, tmp_path):
    from diffusers import UNet2DConditionModel

    base, half, _, names = canvas
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float16).save_pretrained(
        folder / "unet", max_shard_size="1MB"
    )
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    shards = weight_files(folder / "unet")
    assert len(shards) > 2
    file = tmp_path / "delta.safetensors"
    assert write_delta(folder, half, file) == len(names)
    apply_delta(folder, file, tmp_path / "applied")
    assert [path.name for path in weight_files(tmp_path / "applied" / "unet")] == [path.name for path in shards]
    assert sorted(path.name for path in (tmp_path / "applied" / "unet").iterdir()) == sorted(
        ["config.json", f"{WEIGHTS}.index.json", *(path.name for path in shards)]
    )
    for shard in shards:
        assert load_file(shard).keys() == load_file(tmp_path / "applied" / "unet" / shard.name).keys()
    assert same(weights(tmp_path / "applied"), weights(half))
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "applied" / "unet", torch_dtype=torch.float16)
    assert same(dict(loaded.state_dict()), weights(half))
    apply_delta(base, file, tmp_path / "whole")  # the same base in one file
    assert same(weights(tmp_path / "whole"), weights(half))


@pytest.mark.parametrize("label", [label for label, dtype in DTYPES.items() if dtype.is_floating_point])
def test_every_bit_pattern_of_every_dtype_survives(tmp_path, label):
    """Base and result are arbitrary patterns; the stored tensor is their XOR, computed here in plain integers."""
    dtype = DTYPES[label]
    rng = torch.Generator().manual_seed(3)
    left, right = (torch.randint(0, 256, (24 * dtype.itemsize,), generator=rng, dtype=torch.uint8) for _ in range(2))
    # Infinities, quiet and signalling NaN, -0: the sign, exponent and mantissa at their ends.
    ends = bytes([0, 0x80, *[0xFF] * 2, 0, 0x7C, 1, 0x7C, 0x80, 0x7F, 0x81, 0x7F, 0x80, 0xFF, 0xF0, 0x7F])
    left[: len(ends)] = torch.frombuffer(bytearray(ends), dtype=torch.uint8)
    right[8 : 8 + len(ends)] = left[: len(ends)]
    left, right = left.view(dtype), right.view(dtype)
    base = {"w": left.reshape(4, 6), "scalar": left[0].clone(), "none": torch.zeros(0, 3).to(dtype)}
    model = base | {"w": right.reshape(4, 6), "scalar": right[-1].clone()}
    tiny(tmp_path / "base", base), tiny(tmp_path / "model", model)
    file = tmp_path / "delta.safetensors"
    assert write_delta(tmp_path / "base", tmp_path / "model", file) == 2
    stored = bytes(load_file(file)["w"].reshape(-1).view(torch.uint8).tolist())
    assert stored == bytes(a ^ b for a, b in zip(*(side.view(torch.uint8).tolist() for side in (left, right))))
    apply_delta(tmp_path / "base", file, tmp_path / "applied")
    apply_delta(tmp_path / "applied", file, tmp_path / "removed", remove=True)
    assert same(weights(tmp_path / "applied"), model)
    assert same(weights(tmp_path / "removed"), base)


def test_the_xor_of_known_bits():
    """1.0 and 1.5 are 0x3C00 and 0x3E00 in fp16; 0.0 and -0.0 differ by the sign alone."""
    change = bits(torch.tensor([1.0, 0.0]).half()) ^ bits(torch.tensor([1.5, -0.0]).half())
    assert change.tolist() == [0x0200, -0x8000]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exported", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_in_another_dtype_changes_only_what_was_changed(tmp_path, stored, exported):
    """Also in a coarser dtype: tensors that the run did not change keep the base's digits."""
    base, model = pair(stored)
    model = {name: tensor.to(exported) if tensor.is_floating_point() else tensor for name, tensor in model.items()}
    tiny(tmp_path / "base", base, "transformer", shards=2, pipeline="SanaPipeline")
    tiny(tmp_path / "model", model, "transformer", pipeline="SanaPipeline")
    file = tmp_path / "delta.safetensors"
    assert write_delta(tmp_path / "base", tmp_path / "model", file) == 1
    apply_delta(tmp_path / "base", file, tmp_path / "applied")
    assert same(weights(tmp_path / "applied", "transformer"), base | {"a.weight": model["a.weight"].to(stored)})
    apply_delta(tmp_path / "applied", file, tmp_path / "removed", remove=True)
    assert files(tmp_path / "removed").keys() == files(tmp_path / "base").keys()
    assert same(weights(tmp_path / "removed", "transformer"), base)


def test_a_tensor_is_changed_when_its_bits_differ_in_the_dtype_of_the_base(tmp_path):
    """The sign of a zero is a change; an equal NaN is none, and neither are digits that the dtype cannot hold."""
    base = {
        "nan": torch.tensor([float("nan"), 1.0]).half(),
        "zero": torch.zeros(2).half(),
        "fine": torch.ones(2).half(),
    }
    model = {"nan": base["nan"].float(), "zero": torch.tensor([0.0, -0.0]), "fine": torch.tensor([1.0, 1.0 + 1e-5])}
    tiny(tmp_path / "base", base), tiny(tmp_path / "model", model)
    assert write_delta(tmp_path / "base", tmp_path / "model", tmp_path / "delta.safetensors") == 1
    assert load_file(tmp_path / "delta.safetensors")["zero"].tolist() == [0, -0x8000]


def test_a_variant_keeps_its_name_and_pickles_are_not_copied(tmp_path):
    base, model = pair()
    folder = tiny(tmp_path / "base", base)
    tiny(tmp_path / "model", model)
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    index = json.loads((folder / "model_index.json").read_text()) | {
        "tokenizer": ["transformers", "T"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    kept = [
        "README.md",
        "LICENSE",
        "extra.json",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "tokenizer/vocab.json",
    ]
    left = [
        "whole.ckpt",
        "whole.safetensors",
        "unet/optimizer.bin",
        "unet/notes.txt",
        "tokenizer/cache.pt",
        "vae/a.json",
        "logs/a.json",
    ]
    for path in kept + left:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(path)
    write_delta(folder, tmp_path / "model", tmp_path / "delta.safetensors")
    apply_delta(folder, tmp_path / "delta.safetensors", tmp_path / "applied")
    own = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert sorted(files(tmp_path / "applied")) == sorted(kept + own)
    assert all((tmp_path / "applied" / path).read_text() == path for path in kept)
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "V"]}))
    for path in ("vae/config.json", "vae/diffusion_pytorch_model.bin"):
        (folder / path).write_text("{}")
    with pytest.raises(ModelError, match="vae/diffusion_pytorch_model.bin: holds pickled weights"):
        apply_delta(folder, tmp_path / "delta.safetensors", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_no_delta_is_written_for_models_that_are_equal_or_incomparable(tmp_path):
    base, model = pair()
    folder = tiny(tmp_path / "base", base)
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    other = {"a.weight": model["a.weight"], "c": model["b.weight"], "steps": base["steps"]}
    huge = {name: tensor.float() * 1e5 if tensor.is_floating_point() else tensor for name, tensor in model.items()}
    cases = {
        "equals that of": tiny(tmp_path / "same", wide),
        "holds a SanaPipeline with a unet": tiny(tmp_path / "other", model, pipeline="SanaPipeline"),
        "holds a StableDiffusionPipeline with a transformer": tiny(tmp_path / "net", model, "transformer"),
        "missing b.weight; unknown c": tiny(tmp_path / "names", other),
        r"b.weight is \(2,\), not \(5,\)": tiny(tmp_path / "shape", model | {"b.weight": torch.zeros(2).half()}),
        "steps differs from .* no float": tiny(tmp_path / "integer", model | {"steps": base["steps"] + 1}),
        "too large for torch.float16": tiny(tmp_path / "huge", huge),
        "no model_index.json": tmp_path,
    }
    for text, where in cases.items():
        with pytest.raises(ModelError, match=text):
            write_delta(folder, where, tmp_path / "out" / "delta.safetensors")
    assert not (tmp_path / "out").exists()
    good = tiny(tmp_path / "model", model)
    with pytest.raises(ModelError, match="weight file of one of the two models"):
        write_delta(folder, good, folder / "unet" / WEIGHTS)
    (good / "unet" / WEIGHTS).rename(good / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        write_delta(folder, good, tmp_path / "delta.safetensors")
    (good / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="no denoiser"):
        write_delta(folder, good, tmp_path / "delta.safetensors")


def test_a_delta_of_another_base_is_refused(tmp_path):
    base, model = pair()
    model["b.weight"] = -base["b.weight"]
    folder = tiny(tmp_path / "base", base)
    file, output = tmp_path / "delta.safetensors", tmp_path / "output"
    write_delta(folder, tiny(tmp_path / "model", model), file)
    apply_delta(folder, file, tmp_path / "applied")
    wider = {name: tensor.float() for name, tensor in base.items()}
    moved = base | {"a.weight": base["a.weight"] * 2}
    mixed = {"a.weight": base["a.weight"], "b.weight": model["b.weight"], "steps": base["steps"]}
    lacking = {"b.weight": base["b.weight"], "steps": base["steps"]}
    cases = [
        ("is already applied to it", tmp_path / "applied", False),
        ("is not applied to it", folder, True),
        (r"another base: .* 1 of its 2 tensors hold other values \(a.weight\)", tiny(tmp_path / "b", moved), False),
        (r"another base: .* 1 of its 2 tensors hold other values \(b.weight\)", tiny(tmp_path / "m", mixed), False),
        (
            r"another base: .* \(a.weight\); give the model that it was applied to; if another delta",
            tmp_path / "m",
            True,
        ),
        (r"another base: a.weight is F16 \(4, 3\) there, F32 \(4, 3\) in", tiny(tmp_path / "w", wider), False),
        ("another base: .* lacks a.weight", tiny(tmp_path / "l", lacking), False),
        (
            "another base: of the unet of a StableDiffusionPipeline",
            tiny(tmp_path / "x", base, pipeline="StableDiffusionXLPipeline"),
            False,
        ),
        ("no model_index.json", tmp_path / "nowhere", False),
    ]
    for text, where, remove in cases:
        with pytest.raises(ModelError, match=text):
            apply_delta(where, file, output, remove)
    with pytest.raises(ModelError, match="exists already"):
        apply_delta(folder, file, tmp_path / "applied")
    assert not output.exists() and not list(tmp_path.glob(".*"))


def untouched_differs(base: Path, folder: Path, part: str) -> Path:
    """A copy of the base in which one value differs that no delta of the cross-attention changes."""
    shutil.copytree(base, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if tensors[name].is_floating_point() and "attn2" not in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_that_differs_where_the_delta_changes_nothing_is_refused(canvas, tmp_path, part):
    base, half, _, _ = canvas
    file = tmp_path / "delta.safetensors"
    write_delta(base, half, file)
    other = untouched_differs(base, tmp_path / "other", part)
    with pytest.raises(ModelError, match=f"another base: in .*other, {part} hold other values where"):
        apply_delta(other, file, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    old = {key: metadata[key] for key in ("format", "version", "net", "pipeline", "tensors")}
    save_file(load_file(file), tmp_path / "old.safetensors", old)  # as earlier versions wrote it
    apply_delta(other, tmp_path / "old.safetensors", tmp_path / "output")
    assert (tmp_path / "output" / CHECKSUMS).is_file()


def test_the_written_folder_has_the_card_of_the_unlearned_model_and_whole_checksums(canvas, tmp_path):
    base, half, _, _ = canvas
    shutil.copytree(base, tmp_path / "base"), shutil.copytree(half, tmp_path / "model")
    (tmp_path / "base" / "README.md").write_text("the base")
    (tmp_path / "model" / "README.md").write_text("without a bird")
    file = tmp_path / "delta.safetensors"
    write_delta(tmp_path / "base", tmp_path / "model", file)
    apply_delta(tmp_path / "base", file, tmp_path / "applied")
    apply_delta(tmp_path / "applied", file, tmp_path / "removed", remove=True)
    assert (tmp_path / "applied" / "README.md").read_text() == "without a bird"
    assert (tmp_path / "applied" / "README-base.md").read_text() == "the base"
    assert files(tmp_path / "removed") == files(tmp_path / "base")
    for folder in (tmp_path / "applied", tmp_path / "removed"):
        lines = (folder / CHECKSUMS).read_text().splitlines()
        assert {line.partition("  ")[2] for line in lines} == files(folder).keys()
        base_fingerprint(folder)  # compares them


def test_damaged_files_and_files_of_other_formats_are_no_delta(tmp_path):
    base, model = pair()
    folder = tiny(tmp_path / "base", base)
    good, file, output = tmp_path / "good.safetensors", tmp_path / "bad.safetensors", tmp_path / "output"
    write_delta(folder, tiny(tmp_path / "model", model), good)
    held = load_file(good)
    with safe_open(good, "pt") as content:
        good_metadata = content.metadata()
    flipped = {"a.weight": held["a.weight"] ^ 1}
    cases = [
        ("is no delta .*'pt'", held, {"format": "pt"}),
        ("is no delta .*None", held, None),
        ("version 2, this program reads version 1; update", held, good_metadata | {"version": "2"}),
        ("metadata is damaged", held, good_metadata | {"tensors": "{"}),
        ("metadata is damaged", held, good_metadata | {"tensors": '{"a.weight": {"base": ""}}'}),
        ("metadata is damaged", held, {"format": FORMAT, "version": "1"}),
        ("its tensors are not those of its metadata", held | {"more": torch.zeros(2)}, good_metadata),
        ("a.weight does not give what its metadata promises", flipped, good_metadata),
    ]
    for text, tensors, metadata in cases:
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(ModelError, match=text):
            apply_delta(folder, file, output)
    file.write_bytes(good.read_bytes()[:-3])
    with pytest.raises(ModelError, match="is cut short"):
        apply_delta(folder, file, output)
    with pytest.raises(ModelError, match="no such file"):
        apply_delta(folder, tmp_path / "none.safetensors", output)
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    base, model = pair()
    folder = tiny(tmp_path / "base", base)
    write_delta(folder, tiny(tmp_path / "model", model), tmp_path / "delta.safetensors")
    before = files(folder)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sculpt_dist.backbones.formats.delta.write_tensors", full)
    with pytest.raises(OSError):  # noqa: PT011 (any OSError)
        apply_delta(folder, tmp_path / "delta.safetensors", tmp_path / "output")
    assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".*")) and files(folder) == before


def test_deltas_stack_and_are_removed_in_reverse_order(tmp_path):
    base, first = pair()
    second = first | {"b.weight": -base["b.weight"], "a.weight": first["a.weight"] * 2}
    folders = [tiny(tmp_path / name, tensors) for name, tensors in (("0", base), ("1", first), ("2", second))]
    deltas = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for i, file in enumerate(deltas):
        write_delta(folders[i], folders[i + 1], file)
    with pytest.raises(ModelError, match="remove that one first"):
        apply_delta(folders[2], deltas[0], tmp_path / "out", remove=True)
    apply_delta(folders[2], deltas[1], tmp_path / "one", remove=True)
    apply_delta(tmp_path / "one", deltas[0], tmp_path / "none", remove=True)
    assert same(weights(tmp_path / "one"), first) and same(weights(tmp_path / "none"), base)
