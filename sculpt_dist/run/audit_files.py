"""Reads an audit bundle, a folder or a zip: its files against its list, and its signature."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sculpt_dist.core.errors import ConfigError, RunFolderError

LIST, SIGNATURE, NAMESPACE = "SHA256SUMS", "SHA256SUMS.sig", "sculpt-dist"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
LARGEST = 1 << 30  # bytes of one file
Finding = tuple[Path, str | None]


def is_bundle(place: Path) -> bool:
    return (place / LIST).is_file() or (place.suffix == ".zip" and zipfile.is_zipfile(place))


def bundle_findings(place: Path) -> Iterator[Finding]:
    """Every file of a bundle, with what is wrong with it; those that the list lacks are faults, too."""
    with _opened(place) as bundle:
        listed = _listed(bundle)
        for name, sha256 in sorted(listed.items()):
            if name not in bundle.names:
                yield place / name, "is missing"
            else:
                yield place / name, None if bundle.sha256(name) == sha256 else "differs from its checksum"
        for name in sorted(bundle.names - set(listed) - {LIST, SIGNATURE}):
            yield place / name, f"is not in {LIST}"


def check_signature(place: Path, signers: Path | None) -> str | None:
    """Who signed a bundle, in words; None where nobody did.

    `signers`: a file of allowed signers, as ssh-keygen reads it. Without one, the signature is checked against the key
    that it names itself. Raises RunFolderError for a signature that is wrong, or of nobody in the file.
    """
    with _opened(place) as bundle, tempfile.TemporaryDirectory() as folder:
        if SIGNATURE not in bundle.names:
            if signers is not None:
                raise RunFolderError(f"{place}: is not signed, but --signers is given")
            return None
        signature = Path(folder) / SIGNATURE
        signature.write_bytes(bundle.read(SIGNATURE))
        content, common = bundle.read(LIST), ["-n", NAMESPACE, "-s", str(signature)]
        who = None
        if signers is not None:
            found = _keygen(["find-principals", "-s", str(signature), "-f", str(signers)], b"")
            who = found.stdout.decode(errors="replace").split("\n")[0].strip()
            if found.returncode or not who:
                raise RunFolderError(f"{place}: is signed by nobody in {signers}")
            done = _keygen(["verify", "-f", str(signers), "-I", who, *common], content)
        else:
            done = _keygen(["check-novalidate", *common], content)
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        if done.returncode:
            raise RunFolderError(f"{place}: its signature is wrong ({said[-300:]})")
        return said.splitlines()[0]


def _keygen(arguments: list[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", *arguments], input=content, capture_output=True)
    except FileNotFoundError as error:
        raise ConfigError("the bundle is signed: ssh-keygen, which checks that, is not installed") from error


class _Bundle:
    """The files of a bundle by name."""

    def __init__(self, place: Path, packed: zipfile.ZipFile | None) -> None:
        self.place, self.packed = place, packed
        if packed is None:
            self.names = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
        else:
            self.names = {info.filename for info in packed.infolist() if not info.is_dir()}

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with (self.place / name).open("rb") if self.packed is None else self.packed.open(name) as file:
            yield file

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise RunFolderError(f"{self.place / name}: has more than {LARGEST:,} bytes")
        return content

    def sha256(self, name: str) -> str:
        digest, size = hashlib.sha256(), 0
        with self.open(name) as file:
            while part := file.read(1 << 20):
                digest.update(part)
                size += len(part)
                if size > LARGEST:  # a zip may hold far more than its size tells
                    raise RunFolderError(f"{self.place / name}: has more than {LARGEST:,} bytes")
        return digest.hexdigest()


@contextmanager
def _opened(place: Path) -> Iterator[_Bundle]:
    if place.is_dir():
        yield _Bundle(place, None)
        return
    try:
        with zipfile.ZipFile(place) as packed:
            yield _Bundle(place, packed)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise RunFolderError(f"{place}: is a damaged zip ({error})") from error


def _listed(bundle: _Bundle) -> dict[str, str]:
    if LIST not in bundle.names:
        raise RunFolderError(f"{bundle.place}: is no audit bundle (no {LIST})")
    found = {}
    for line in bundle.read(LIST).decode(errors="replace").splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            raise RunFolderError(f"{bundle.place / LIST}: is damaged: {line[:80]!r}")
        found[match[2]] = match[1]
    return found
