"""An audit bundle: what someone needs to check a claim of unlearning, in one folder or zip, with a list of checksums.

BUNDLE/README.md         the model card, with the scores and what attacks found
BUNDLE/config.yaml       the configuration; manifest.json: checksums of the base and of what was trained on, versions
BUNDLE/report/           the report
BUNDLE/evaluation/       scores, answers, and the list of all images, of the base and of the result
BUNDLE/attacks/          every attempt, with its image; vectors and latents that bring a concept back are left out
BUNDLE/model/CHECKSUMS   the checksums of the result's files
BUNDLE/SHA256SUMS        of all the others, as `sha256sum -c` reads it; SHA256SUMS.sig if it is signed
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.files import file_sha256, written_aside
from sculpt_dist.report.record import read_run
from sculpt_dist.report.report import write_report
from sculpt_dist.run.audit_files import LIST, NAMESPACE, SIGNATURE
from sculpt_dist.run.verify import verify_place

MOMENT = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that the same run gives the same zip


def write_audit(run: Path, output: Path | None = None, sign: Path | None = None) -> Path:
    """Write the audit bundle of a finished run, a zip where `output` ends so; returns its place.

    `sign`: a private key for ssh-keygen. Raises RunFolderError for a run that is not finished, or whose files differ
    from their checksums; ConfigError for a place that is taken, or a key that cannot sign.
    """
    place = output or run / "audit"
    if place.exists() and not (place / LIST).is_file() and not (place.is_file() and zipfile.is_zipfile(place)):
        raise ConfigError(f"{place}: is there, and is no audit bundle: give another --output")
    record = read_run(run, with_steps=False)
    if not record.manifest.get("finished") or not (run / "model" / CHECKSUMS).is_file():
        raise RunFolderError(f"{run}: is not finished, or its model is gone: finish the run first")
    verify_place(run)  # a bundle of damaged files would only certify the damage
    write_report(run)
    with written_aside(place) as aside:
        folder = aside.with_name(f"{aside.name}.d") if place.suffix == ".zip" else aside
        try:
            _fill(folder, run, record.last, sign)
            if folder != aside:
                _pack(folder, aside)
        finally:
            if folder != aside:
                shutil.rmtree(folder, ignore_errors=True)
        if place.is_dir():
            shutil.rmtree(place)
    return place


def _fill(folder: Path, run: Path, last: str | None, sign: Path | None) -> None:
    for file in _sources(run, last):
        target = folder / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    shutil.copyfile(run / "model" / "README.md", folder / "README.md")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = "".join(f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    (folder / LIST).write_text(listed, encoding="utf-8")
    if sign is not None:
        _sign(folder / LIST, sign)


def _sources(run: Path, last: str | None) -> Iterator[Path]:
    for name in ("config.yaml", "manifest.json", "costs.json", f"model/{CHECKSUMS}"):
        if (run / name).is_file():
            yield run / name
    for stage in ("before", last):
        for name in ("scores.json", "answers.json", "images.csv") if stage else ():
            if (run / "evaluation" / str(stage) / name).is_file():
                yield run / "evaluation" / str(stage) / name
    for pattern in ("report/*.*", "attacks/*.json", "attacks/*/*.json", "attacks/*/*.png"):
        yield from sorted(file for file in run.glob(pattern) if file.is_file() and not file.is_symlink())


def _pack(folder: Path, place: Path) -> None:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.writestr(zipfile.ZipInfo(file.relative_to(folder).as_posix(), MOMENT), file.read_bytes())


def _sign(file: Path, key: Path) -> None:
    command = ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file)]
    _run(command, f"--sign {key}")
    assert file.with_name(SIGNATURE).is_file()


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: needs ssh-keygen, which is not installed") from error
    if done.returncode:
        raise ConfigError(f"{what}: ssh-keygen could not sign ({done.stderr.strip()[-300:]})")
