"""`sculpt-dist verify` finds a changed byte in every kind of file, and changes none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import PROJECT, sculpt

from sculpt_dist.backbones.formats.delta import write_delta
from sculpt_dist.core.errors import SculptError
from sculpt_dist.run.verify import verify_place

BASE = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
KINDS = (
    "config.yaml manifest.json costs.json report/report.json metrics.jsonl data/embeddings.safetensors "
    "delta.safetensors data/*/target/index.json data/*/superclass/*.tar evaluation/before/scores.json "
    "evaluation/after-00/answers.json "
    "evaluation/after-00/images.csv evaluation/before/images/boat--neon.png checkpoints/step-*/manifest.json "
    "checkpoints/step-*/rank-0.safetensors model/CHECKSUMS model/unet/*.safetensors model/tokenizer/tokenizer.json"
).split()


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "run"
    shutil.copytree(finished_run, folder)
    write_delta(BASE, folder / "model", folder / "delta.safetensors")
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_an_untouched_run_model_and_delta_are_verified_and_left_alone(run: Path) -> None:
    before = snapshot(run)
    found = verify_place(run)
    assert {path.relative_to(run).as_posix() for path in found.without} == {"model/README.md"}
    assert found.num_files > 30 and verify_place(run / "model").num_files > 8
    assert verify_place(run / "delta.safetensors").num_files == 1
    assert snapshot(run) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_found_in_every_kind_of_file(run: Path, kind: str) -> None:
    file = sorted(run.glob(kind))[-1]
    whole = file.read_bytes()
    digits = [at for at, byte in enumerate(whole) if byte in b"2345678"]
    at = digits[-1] if kind.endswith((".json", ".jsonl", ".yaml", ".csv", "SUMS")) else len(whole) - 2
    if kind.endswith((".safetensors", ".tar", ".png")):
        at = len(whole) // 2
    try:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SculptError) as error:
            verify_place(run)
    finally:
        file.write_bytes(whole)
    named = str(error.value)
    assert named.startswith(f"{file.parent if file.parent.parent.name == 'checkpoints' else file}") or (
        kind == "model/CHECKSUMS" and named.startswith(str(run / "model"))
    )
    assert "\n" not in named


def test_a_line_cut_out_of_the_steps_and_a_missing_file_are_found(run: Path) -> None:
    file = run / "metrics.jsonl"
    whole = file.read_text()
    try:
        file.write_text(whole.partition("\n")[2])
        with pytest.raises(SculptError, match=r"metrics\.jsonl: 1 of its lines are missing"):
            verify_place(run)
    finally:
        file.write_text(whole)
    image = run / "evaluation" / "before" / "images" / "bird--neon.png"
    kept = image.read_bytes()
    try:
        image.unlink()
        with pytest.raises(SculptError, match=r"bird--neon\.png: is missing"):
            verify_place(run)
    finally:
        image.write_bytes(kept)


def test_the_command_ends_with_2_where_nothing_has_a_checksum_or_a_file_differs(run: Path, tmp_path: Path) -> None:
    assert "files are as they were written\nnot compared, for lack of a checksum: " in sculpt("verify", str(run))
    shutil.copytree(BASE, tmp_path / "foreign")
    for place in (tmp_path / "foreign", tmp_path / "foreign" / "unet" / "diffusion_pytorch_model.safetensors"):
        printed = sculpt("verify", str(place), code=2)
        assert f"RunFolderError: {place}: holds no checksums of sculpt-dist" in printed
    assert "is no run folder, model folder, delta file or audit bundle" in sculpt("verify", str(tmp_path), code=2)
