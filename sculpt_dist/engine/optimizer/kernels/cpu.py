"""The masked step on a CPU: masked_adamw.c, compiled where it runs and called from as many threads as torch uses."""

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
Result = TypeVar("Result")


class _Rule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("scale", "lr", "beta1", "beta2", "epsilon", "decay")]
    _fields_ += [(name, ctypes.c_int32) for name in ("statistic", "packed", "generations")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("first", "second")]


class _Sums(ctypes.Structure):
    _fields_ = [("squares", ctypes.c_double), ("moves", ctypes.c_double)]


class CompiledKernel:
    """Calls the functions of masked_adamw.c, one span at a time."""

    def __init__(self, library: Path) -> None:
        code, pointer, integer = ctypes.CDLL(str(library)), ctypes.c_void_p, ctypes.c_int64
        self._collect, self._update, self._repack = code.collect, code.update, code.repack
        self._collect.argtypes = [integer, pointer, pointer, pointer, ctypes.c_int32]
        self._collect.restype = ctypes.c_double
        self._update.argtypes = [integer, *[pointer] * 8]
        self._update.restype = None
        self._repack.argtypes = [integer, *[pointer] * 4]
        self._repack.restype = None
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        code, addresses = STATISTICS[statistic], _Addresses(gradient, shard.opened, shard.saliency)

        def collect(where: slice) -> float:
            return self._collect(where.stop - where.start, *addresses.at(where.start), code)

        return torch.tensor(sum(self._map(collect, shard.spans)), dtype=torch.float64)

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        scale = float(rule.scale)
        if scale != scale:
            return torch.zeros(2, dtype=torch.float64)
        constants = _Rule(
            scale, rule.lr, rule.beta1, rule.beta2, rule.epsilon, rule.decay,
            STATISTICS[statistic], shard.moments.packed, len(rule.first), rule.first.data_ptr(), rule.second.data_ptr(),
        )  # fmt: skip
        before = _Addresses(gradient, shard.opened, shard.saliency)
        weights, constants_address = _Addresses(shard.flat), ctypes.byref(constants)

        def update(piece: Piece) -> tuple[float, float]:
            where, momentum, variance = piece
            sums = _Sums()
            addresses = [*before.at(where.start), momentum.data_ptr(), variance.data_ptr(), *weights.at(where.start)]
            self._update(where.stop - where.start, *addresses, constants_address, ctypes.byref(sums))
            return sums.squares, sums.moves

        # An empty list when this rank holds no trained weight.
        sums = list(self._map(update, shard.moments.pieces(shard.opened)))
        return torch.tensor(sums, dtype=torch.float64).view(-1, 2).sum(0)

    def repack(self, swapped: Tensor, opened: Tensor, moment: Tensor, room: Tensor) -> None:
        self._repack(len(opened), *(tensor.data_ptr() for tensor in (swapped, opened, moment, room)))

    def _map(self, work: Callable[[Work], Result], pieces: Iterable[Work]) -> Iterable[Result]:
        """Results in the order of the pieces, whatever the threads' timing. ctypes releases the GIL during a call."""
        return self._pool.map(work, pieces) if self._threads > 1 else map(work, pieces)


class _Addresses:
    """Memory addresses inside flat tensors: computing them is faster than slicing the tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        assert all(tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.uint8) for tensor in tensors)
        self._tensors = [(tensor.data_ptr(), tensor.element_size()) for tensor in tensors]

    def at(self, start: int) -> list[int]:
        return [address + start * size for address, size in self._tensors]


@lru_cache(maxsize=1)
def find_kernel() -> tuple[CompiledKernel | None, str]:
    """(the kernel, "") or (None, why there is none)."""
    try:
        return CompiledKernel(build_library(FLAGS)), ""
    except (BuildError, OSError, RuntimeError) as error:  # no compiler, a folder mounted noexec, no home directory
        return None, str(error)


class BuildError(Exception):
    """Why masked_adamw.c could not be compiled."""


def build_library(flags: Sequence[str]) -> Path:
    """Compile masked_adamw.c, or return the library compiled earlier. Raises BuildError."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    library = _cache_folder() / f"masked-{_fingerprint(compiler, flags)}.so"
    if not library.is_file():
        partial = library.with_name(f"{library.name}.{platform.node()}.{os.getpid()}.tmp")
        build = subprocess.run([compiler, str(SOURCE), "-o", str(partial), *flags], capture_output=True, text=True)
        if build.returncode:
            raise BuildError(f"{compiler} could not compile {SOURCE.name}: {' '.join(build.stderr.split())[:300]}")
        os.replace(partial, library)
    return library


def _cache_folder() -> Path:
    """Where compiled libraries are kept; private to this user, because they are executed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sculpt-dist"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sculpt-dist-"))
    return home if os.access(home, os.W_OK) else Path(tempfile.mkdtemp(prefix="sculpt-dist-"))


def _fingerprint(compiler: str, flags: Sequence[str]) -> str:
    """Of source, flags, compiler and processor: machines with different processors may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    inputs = [SOURCE.read_text(), *flags, version, platform.machine(), platform.processor(), *features]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
