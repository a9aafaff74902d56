"""The masked step on a CPU: masked_adamw.c, compiled on the machine that runs it, and called span by span from as many threads as torch has."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sculpt_dist.engine.optimizer.kernels import Rule
from sculpt_dist.engine.sharding.moments import Piece
from sculpt_dist.engine.sharding.shards import Shard

SOURCE = Path(__file__).with_name("masked_adamw.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-lm")
STATISTICS = {None: 0, "abs_sum": 1, "sum_abs": 2, "sum_sq": 3}
Work = TypeVar("Work")


class _Rule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("scale", "lr", "beta1", "beta2", "epsilon", "decay")]
    _fields_ += [(name, ctypes.c_int32) for name in ("statistic", "packed", "generations")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("first", "second")]


class _Sums(ctypes.Structure):
    _fields_ = [("squares", ctypes.c_double), ("moves", ctypes.c_double)]


class Compiled:
    """See masked_adamw.c."""

    def __init__(self, library: Path) -> None:
        code, pointer, number = ctypes.CDLL(str(library)), ctypes.c_void_p, ctypes.c_int64
        self._collect, self._update, self._repack = code.collect, code.update, code.repack
        self._collect.restype, self._collect.argtypes = (
            ctypes.c_double,
            [number, pointer, pointer, pointer, ctypes.c_int32],
        )
        self._update.restype, self._update.argtypes = None, [number] + 8 * [pointer]
        self._repack.restype, self._repack.argtypes = None, [number] + 4 * [pointer]
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        kind, flats = STATISTICS[statistic], _Flats(gradient, shard.opened, shard.saliency)

        def collect(where: slice) -> float:
            return self._collect(where.stop - where.start, *flats.at(where.start), kind)

        return torch.tensor(sum(self._each(collect, shard.spans)), dtype=torch.float64)

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        scale = float(rule.scale)
        if scale != scale:
            return torch.zeros(2, dtype=torch.float64)
        told = _Rule(scale, rule.lr, rule.beta1, rule.beta2, rule.epsilon, rule.decay, STATISTICS[statistic])
        told.packed, told.generations, told.first, told.second = (
            shard.moments.packed, len(rule.first), rule.first.data_ptr(), rule.second.data_ptr()
        )  # fmt: skip
        flats, weights, rules = _Flats(gradient, shard.opened, shard.saliency), _Flats(shard.flat), ctypes.byref(told)

        def update(piece: Piece) -> tuple[float, float]:
            where, momentum, variance = piece
            sums, places = (
                _Sums(),
                (*flats.at(where.start), momentum.data_ptr(), variance.data_ptr(), *weights.at(where.start)),
            )
            self._update(where.stop - where.start, *places, rules, ctypes.byref(sums))
            return sums.squares, sums.moves

        sums = list(
            self._each(update, shard.moments.pieces(shard.opened))
        )  # none where no trained weight lives on this rank
        return torch.tensor(sums, dtype=torch.float64).view(-1, 2).sum(0)

    def repack(self, swapped: Tensor, opened: Tensor, moment: Tensor, room: Tensor) -> None:
        self._repack(len(opened), *(flat.data_ptr() for flat in (swapped, opened, moment, room)))

    def _each(self, work: Callable[[Work], object], pieces: Iterable[Work]) -> Iterable:
        """In their order, so that the sums do not depend on the threads. The C routine lets other threads run."""
        return self._pool.map(work, pieces) if self._threads > 1 else map(work, pieces)


class _Flats:
    """Where the numbers of flat tensors lie in memory: slicing a tensor takes longer than asking for this."""

    def __init__(self, *flats: Tensor) -> None:
        assert all(flat.is_contiguous() and flat.dtype in (torch.float32, torch.uint8) for flat in flats)
        self._places = [(flat.data_ptr(), flat.element_size()) for flat in flats]

    def at(self, start: int) -> list[int]:
        return [place + start * size for place, size in self._places]


@lru_cache(maxsize=1)
def found() -> tuple[Compiled | None, str]:
    """(the kernel, "") or (None, why there is none)."""
    try:
        return Compiled(build_library(FLAGS)), ""
    except (BuildError, OSError, RuntimeError) as error:  # no compiler, a folder from which nothing may be run, no home
        return None, str(error)


class BuildError(Exception):
    """Why the routine could not be compiled."""


def build_library(flags: Sequence[str]) -> Path:
    """Compile masked_adamw.c, or find what was compiled before. Raises BuildError."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    library = _folder() / f"masked-{_fingerprint(compiler, flags)}.so"
    if not library.is_file():
        written = library.with_name(f"{library.name}.{platform.node()}.{os.getpid()}.tmp")
        made = subprocess.run([compiler, str(SOURCE), "-o", str(written), *flags], capture_output=True, text=True)
        if made.returncode:
            raise BuildError(f"{compiler} could not compile {SOURCE.name}: {' '.join(made.stderr.split())[:300]}")
        os.replace(written, library)
    return library


def _folder() -> Path:
    """Where compiled routines are kept: of this user alone, as they are run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sculpt-dist"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sculpt-dist-"))
    return home if os.access(home, os.W_OK) else Path(tempfile.mkdtemp(prefix="sculpt-dist-"))


def _fingerprint(compiler: str, flags: Sequence[str]) -> str:
    """Of the source, the compiler and the processor: a home folder may be shared by unlike machines."""
    about = Path("/proc/cpuinfo")
    features = (
        [line for line in about.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
        if about.is_file()
        else []
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    told = [SOURCE.read_text(), *flags, version, platform.machine(), platform.processor(), *features]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
