"""Adapters: a run's change to the denoiser's matrices, as a LoRA file for diffusers and peft, or ComfyUI and A1111.

For each changed matrix W [out, in] (a convolution's kernel flattened to [out, in * kh * kw]) the file holds B [out, r]
and A [r, in] in fp32: W' - W ~ (alpha / r) B A with alpha = r (Hu et al., arXiv 2106.09685, section 4.1), the best
factors of that rank, by singular value decomposition. A run that trained a LoRA of rank r made a change of that rank,
which rank r holds up to rounding. Of a run that trained the weights themselves a part is lost; the file says how much.
There are two forms:

    lora    unet.MODULE.lora_A.weight, .lora_B.weight (SANA: transformer.MODULE...), peft's settings in the metadata
    kohya   lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha, dots of the module as underscores. As kohya's
            trainer does: diffusers' names for Stable Diffusion 1.x and 2.x, those of the original layout for SDXL

All pairs of a file have one rank, smaller ones padded with zeros: under kohya's names, diffusers misreads alphas that
differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sculpt_dist.backbones.formats.about import About, metadata
from sculpt_dist.backbones.formats.adapter_names import (
    KOHYA,
    kohya_about,
    kohya_keys,
    lora_about,
    lora_keys,
    peft_options,
)
from sculpt_dist.backbones.formats.stored_net import StoredNet
from sculpt_dist.backbones.io.folders import component_config, empty_component
from sculpt_dist.backbones.parts.components import model_class
from sculpt_dist.backbones.parts.lora import write_lora_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import make_folder, writing
from sculpt_dist.core.progress import progress
from sculpt_dist.core.tensorfile import Entry, raw_bytes, write_tensors
from sculpt_dist.maths.low_rank import low_rank_factors

FORMS = ("lora", "kohya")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # the file that diffusers looks for in a folder
ABOUT = "sculpt_dist"  # our key of the metadata
ENOUGH = 0.05  # a share of the change that may be lost


class Lost(NamedTuple):
    """What an adapter lacks of the change: Frobenius norm of the rest, divided by that of the change."""

    rank: int
    share: float  # of all matrices together
    worst: float  # of the matrix that loses most
    name: str  # of that matrix
    enough: int | None = None  # the smallest rank that would lose at most ENOUGH; earlier versions did not write it

    def __str__(self) -> str:
        share, worst = 100 * self.share, 100 * self.worst
        text = f"rank {self.rank}: {share:.2g} % of the change is lost (worst: {self.name} {worst:.2g} %)"
        more = self.share > ENOUGH and self.enough is not None
        return text + (f"; --rank {self.enough} would lose at most {100 * ENOUGH:.0f} %" if more else "")


class Pair(NamedTuple):
    """The factors of one matrix, as the spool holds them."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the parameter
    rank: int  # at most the requested one, and the matrix's own
    change: float  # squared Frobenius norms
    rest: float
    squares: Tensor  # [min(out, in * kh * kw)] squared singular values of the change, largest first


def check_adapter(base: Path, form: str, rank: int, file: Path) -> None:
    """Raises ConfigError when no such adapter fits the pipeline folder, or `file` has a wrong name; reads headers."""
    with ExitStack() as stack:
        _check(StoredNet(base, stack), form, rank, file)


def write_adapter(
    base: Path,
    model: Path,
    file: Path,
    form: str = "lora",
    rank: int = 16,
    about: About | None = None,
    shown: bool = False,
) -> Lost:
    """Write how the denoiser of the pipeline folder `model` differs from that of `base`, as an adapter.

    The change is between the stored values, both in the dtype of `model`. A folder in half precision has rounded its
    weights; the rounding is part of the change, and has full rank. `write_adapter_of` takes fp32 weights instead. About
    one matrix is in memory at a time; the file is absent, as before, or complete. `about`: goes into the metadata;
    `shown`: whether to show the progress.

    Raises ModelError when the folders hold different models, nothing differs, or a parameter differs that no adapter
    can carry (a bias, a norm, a grouped convolution), ConfigError as `check_adapter`.
    """
    with ExitStack() as stack:
        before, after = StoredNet(base, stack), StoredNet(model, stack)
        if (before.pipeline, before.name, before.held.keys()) != (after.pipeline, after.name, after.held.keys()):
            raise ModelError(
                f"{after.part}: is the {after.name} of a {after.pipeline} with {len(after.held)} tensors, "
                f"{before.part} is the {before.name} of a {before.pipeline} with {len(before.held)}, or their names "
                "differ; give the base that the model was made from"
            )
        if file.resolve() in {weights.resolve() for weights in after.files}:
            raise ConfigError(f"{file}: is a weight file of the model; name another file")
        return _write(before, ((name, after[name]) for name in after.held), file, form, rank, about, shown)


def write_adapter_of(
    base: Path,
    weights: Iterable[tuple[str, Tensor]],
    file: Path,
    form: str = "lora",
    rank: int = 16,
    about: About | None = None,
    shown: bool = False,
) -> Lost:
    """As `write_adapter`, from whole parameters under their names in the folder; unchanged ones are left out."""
    with ExitStack() as stack:
        return _write(StoredNet(base, stack), weights, file, form, rank, about, shown)


def read_lost(file: Path) -> Lost:
    """What one of our adapters lacks, from its metadata."""
    with safe_open(file, "pt") as content:
        return Lost(**json.loads(content.metadata()[ABOUT]))


def _check(net: StoredNet, form: str, rank: int, file: Path) -> None:
    if form not in FORMS:
        raise ConfigError(f"there is no adapter {form!r}; choose one of {', '.join(FORMS)}")
    if rank < 1:
        raise ConfigError(f"--rank {rank}: an adapter has a rank of 1 or more")
    if form == "kohya" and net.pipeline not in KOHYA:
        raise ConfigError(
            f"--as kohya: no such layout exists for a {net.pipeline}, only for {' and '.join(KOHYA)}; use --as lora"
        )
    if file.suffix != ".safetensors" or file.is_dir():
        raise ConfigError(f"{file}: other programs know an adapter by its ending; let it end in .safetensors")
    if file.resolve() in {weights.resolve() for weights in net.files}:
        raise ConfigError(f"{file}: is a weight file of the base; name another file")


def _write(
    net: StoredNet,
    weights: Iterable[tuple[str, Tensor]],
    file: Path,
    form: str,
    rank: int,
    about: About | None,
    shown: bool,
) -> Lost:
    """Factorise matrix by matrix into a spool, then write the file: its header comes first, and says what is lost."""
    _check(net, form, rank, file)
    make_folder(file.parent)
    carried = _carried(net)
    with writing(file), TemporaryFile(dir=file.parent) as spool:
        changes = progress(_changes(net, carried, weights), "factorise", shown)
        pairs = [_spooled(spool, name, change, rank) for name, change in changes]
        if not pairs:
            raise ModelError(f"{net.part}: nothing changed, so there is nothing to write; give the unlearned model")
        rank = max(pair.rank for pair in pairs)
        lost = _lost(pairs, rank)
        names = [pair.name for pair in pairs]
        keys = kohya_keys(net, names) if form == "kohya" else lora_keys(net, names)
        planned = [
            Entry(key, torch.float32, shape)
            for pair in pairs
            for key, shape in zip(keys[pair.name], _shapes(pair.shape, rank))
        ]
        options = peft_options(names, rank)
        own = kohya_about(net, rank) if form == "kohya" else lora_about(net, options)
        spec = metadata(about, net.folder, "diffusers", "lora")
        header = {"format": "pt", ABOUT: json.dumps(lost._asdict())} | spec | own
        spool.seek(0)
        write_tensors(file, planned, _padded(spool, pairs, keys, rank), header)
    if file.name == WEIGHT_NAME:
        write_lora_config(file.parent, options, about.base if about else None)
    return lost


def _carried(net: StoredNet) -> set[str]:
    """Names of the parameters that a pair can change: weights of linear layers, and of ungrouped convolutions."""
    kind = model_class(f"diffusers.{component_config(net.folder, net.name)['_class_name']}")
    layers = empty_component(kind, net.folder, net.name, torch.float32).named_modules()
    return {
        f"{name}.weight"
        for name, layer in layers
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def _changes(net: StoredNet, carried: set[str], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that differ, each with W' - W in fp32, of the parameter's shape."""
    for name, after in weights:
        if name not in net.held or net.held[name].shape != tuple(after.shape):
            stored = net.held[name].shape if name in net.held else "missing"
            raise ModelError(
                f"{net.part}: {name} is {stored}, not {tuple(after.shape)}; give the base that the model was made from"
            )
        before = net[name].to(after.dtype)
        if torch.equal(before, after):
            continue
        if name not in carried:
            raise ModelError(
                f"{name} was changed, which no adapter can carry: adapters hold the weights of linear layers and of "
                "ungrouped convolutions; use --as delta"
            )
        change = after.float() - before.float()
        if not torch.isfinite(change).all():
            raise ModelError(f"{name} was changed to, or from, values that are not finite; the model is damaged")
        yield name, change


def _spooled(spool: IO[bytes], name: str, change: Tensor, rank: int) -> Pair:
    """Factorise a change [out, in] or [out, in, kh, kw]; append B [out, r] and A [r, in * kh * kw] to the spool."""
    matrix = change.flatten(1)
    *factors, singular = low_rank_factors(matrix, rank)
    up, down = (factor.float().contiguous() for factor in factors)
    for factor in (up, down):
        spool.write(raw_bytes(factor))
    rest = matrix.double() - up.double() @ down.double()
    whole, left = (part.double().square().sum().item() for part in (matrix, rest))
    return Pair(name, tuple(change.shape), len(down), whole, left, singular)


def _lost(pairs: list[Pair], rank: int) -> Lost:
    worst = max(pairs, key=lambda pair: pair.rest / pair.change)
    whole = sum(pair.change for pair in pairs)
    share = sum(pair.rest for pair in pairs) / whole
    return Lost(rank, share**0.5, (worst.rest / worst.change) ** 0.5, worst.name, _enough(pairs, whole))


def _enough(pairs: list[Pair], whole: float) -> int:
    """The smallest rank at which the singular values that are cut off are at most ENOUGH of the change."""
    cut = torch.zeros(max(len(pair.squares) for pair in pairs), dtype=torch.float64)  # by rank, what it would lose
    for pair in pairs:
        kept = pair.squares.cumsum(0)
        cut[: len(kept)] += (kept[-1] - kept).cpu()
    return int((cut > ENOUGH**2 * whole).sum()) + 1


def _shapes(shape: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
    """Of B, A and alpha for a parameter; of a convolution, A has the kernel, and B is 1 x 1 after it."""
    return [(shape[0], rank, *(1 for _ in shape[2:])), (rank, *shape[1:]), ()]


def _padded(
    spool: IO[bytes], pairs: list[Pair], keys: dict[str, tuple[str, ...]], rank: int
) -> Iterator[tuple[str, Tensor]]:
    """The factors in the order of the spool, padded with zeros to the rank of the file."""
    for pair in pairs:
        width = torch.Size(pair.shape[1:]).numel()
        up = nn.functional.pad(_read(spool, pair.shape[0], pair.rank), (0, rank - pair.rank))  # [out, rank]
        down = nn.functional.pad(_read(spool, pair.rank, width), (0, 0, 0, rank - pair.rank))  # [rank, in * kh * kw]
        tensors = (up, down, torch.tensor(float(rank)))
        for key, shape, tensor in zip(keys[pair.name], _shapes(pair.shape, rank), tensors):
            yield key, tensor.reshape(shape)


def _read(spool: IO[bytes], rows: int, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(spool.read(4 * rows * columns)), dtype=torch.float32).view(rows, columns)
