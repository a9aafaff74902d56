"""Merging the deltas of one base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import sculpt
from safetensors.torch import load_file
from test_delta import NAMES, WEIGHTS, pair, tiny

from sculpt_dist.backbones.formats.delta import write_delta
from sculpt_dist.backbones.formats.merging import merge_deltas
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.run.verify import verify_place


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base in fp32, and two deltas: the first doubles one tensor, the second halves it and changes another one."""
    base, _ = pair(torch.float32)
    first, second = base[NAMES[0]], base[NAMES[1]]
    models = [base | {NAMES[0]: 2 * first}, base | {NAMES[0]: first / 2, NAMES[1]: second + 1}]
    folder = tiny(tmp_path / "base", base)
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, model in enumerate(models):
        write_delta(folder, tiny(tmp_path / f"model-{i}", model), files[i])
    return folder, files


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / WEIGHTS)


@pytest.mark.parametrize(("how", "first", "second"), [("mean", 1.25, 0.5), ("task", 1.5, 1.0)])
def test_the_change_is_merged_and_scaled(parts, tmp_path, how, first, second):
    folder, files = parts
    base = merged(folder)
    assert merge_deltas(folder, files, tmp_path / "out", how) == 2
    found = merged(tmp_path / "out")
    assert torch.allclose(found[NAMES[0]], first * base[NAMES[0]]) and torch.equal(found[NAMES[2]], base[NAMES[2]])
    assert torch.allclose(found[NAMES[1]], base[NAMES[1]] + second)
    merge_deltas(folder, files, tmp_path / "none", how, scale=0.0)
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged(tmp_path / "none").items())


def test_ties_of_a_delta_and_its_copy_is_its_trimmed_change(parts, tmp_path):
    folder, (file, _) = parts
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    merge_deltas(folder, [file, copy], tmp_path / "out", "ties", density=0.25)
    base, found = merged(folder)[NAMES[0]], merged(tmp_path / "out")[NAMES[0]]
    moved = found != base  # three of twelve, the largest
    assert moved.sum() == 3 and torch.allclose(found[moved], 2 * base[moved])
    assert base[moved].abs().min() > base[~moved].abs().max()


def test_the_command_writes_a_folder_with_checksums_and_a_card(parts, tmp_path):
    folder, files = parts
    out = tmp_path / "out"
    assert "2 tensors changed" in sculpt("merge", str(folder), str(out), *map(str, files), "--how", "task")
    assert verify_place(out).num_files > 0
    assert "- 0.safetensors" in (out / "README.md").read_text()
    assert "exists already" in sculpt("merge", str(folder), str(out), *map(str, files), code=2)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(parts, tmp_path):
    folder, files = parts
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--how slerp: choose mean, task, ties"):
        merge_deltas(folder, files, out, "slerp")
    for density, scale in ((0.0, 1.0), (1.5, 1.0), (0.2, float("nan"))):
        with pytest.raises(ConfigError, match="the density is above 0"):
            merge_deltas(folder, files, out, density=density, scale=scale)
    with pytest.raises(ConfigError, match="two deltas or more, each once"):
        merge_deltas(folder, [files[0], files[0]], out)
    with pytest.raises(ModelError, match="is of another base"):
        merge_deltas(tmp_path / "model-0", files[::-1], out)
    with pytest.raises(ModelError, match="too large for torch.float32; give a smaller --scale"):
        merge_deltas(folder, files, out, "task", scale=1e39)
    assert not out.exists() and not list(tmp_path.glob(".*"))
