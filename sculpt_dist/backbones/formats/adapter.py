"""Adapters: the change that a run made to the denoiser's matrices, as a LoRA file for diffusers and peft, or for ComfyUI and A1111.

For each changed matrix W [out, in] (a convolution's kernel flattened to [out, in * kh * kw]) the file holds B [out, r] and A [r, in] in
fp32, W' - W ~ (alpha / r) B A with alpha = r (Hu et al., arXiv 2106.09685, section 4.1): the best factors of that rank, by singular value
decomposition. The change of a run that trained a LoRA of rank r has that rank, so that r loses nothing of it but rounding; of a run that
trained the weights themselves a part is lost, and the file says how much. Two forms:

    lora    unet.MODULE.lora_A.weight, .lora_B.weight (SANA: transformer.MODULE...), and peft's settings in the metadata
    kohya   lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha, the module's dots as underscores: diffusers' names for Stable
            Diffusion 1.x and 2.x, those of the original layout for SDXL, which is how kohya's trainer names each of them

All pairs of a file have one rank, the smaller ones filled up with zeros: diffusers reads alphas that differ wrongly from kohya's names.
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

from sculpt_dist.backbones.formats.delta import Net
from sculpt_dist.backbones.formats.original_names import unet_originals
from sculpt_dist.backbones.io.folders import component_config, empty_component, read_json
from sculpt_dist.backbones.io.tensorfile import Entry, write_tensors
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.maths.low_rank import low_rank_factors

FORMS = ("lora", "kohya")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
ABOUT = "sculpt_dist"  # our key of the metadata
KOHYA = {
    "StableDiffusionPipeline": "sd_v1",
    "StableDiffusionXLPipeline": "sdxl_base_v1-0",
}  # its name for the base's version


class Lost(NamedTuple):
    """What an adapter lacks of the change: the Frobenius norm of the rest, as a share of the change's own."""

    rank: int
    share: float  # of all matrices together
    worst: float  # of the matrix that lost most
    name: str  # of that matrix

    def __str__(self) -> str:
        return f"rank {self.rank}: {100 * self.share:.2g} % of the change is lost (worst: {self.name} {100 * self.worst:.2g} %)"


class Pair(NamedTuple):
    """The factors of one matrix, as they lie in the spool, and what they are to become."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the parameter
    rank: int  # at most that asked for, and that which the matrix can have
    change: float  # squared Frobenius norms
    rest: float


def check_adapter(base: Path, form: str, rank: int, file: Path) -> None:
    """Raises ConfigError when no such adapter can be of this pipeline folder, or `file` is not named as one; reads headers only."""
    with ExitStack() as stack:
        _check(Net(base, stack), form, rank, file)


def write_adapter(base: Path, model: Path, file: Path, form: str = "lora", rank: int = 16) -> Lost:
    """Write what the denoiser of `model` changes in that of `base`, two pipeline folders, as an adapter of this form.

    The change is that between the stored values, both in the dtype of `model`: a folder in half precision has rounded its weights, and
    the rounding is part of the change and has every rank. `write_adapter_of` takes weights in fp32. About one matrix is in memory at a
    time; the file is absent, as before, or complete.
    Raises ModelError when the folders hold different models, nothing differs, or a parameter differs that no adapter can carry (a bias,
    a norm, a grouped convolution), ConfigError as `check_adapter`.
    """
    with ExitStack() as stack:
        ours, theirs = Net(base, stack), Net(model, stack)
        if (ours.pipeline, ours.name, ours.held.keys()) != (theirs.pipeline, theirs.name, theirs.held.keys()):
            raise ModelError(
                f"{theirs.part}: is the {theirs.name} of a {theirs.pipeline} with {len(theirs.held)} tensors, {ours.part} the {ours.name} "
                f"of a {ours.pipeline} with {len(ours.held)}, or their names differ; give the base that the model was made from"
            )
        if file.resolve() in {weights.resolve() for weights in theirs.files}:
            raise ConfigError(f"{file}: is a weight file of the model; name another file")
        return _write(ours, ((name, theirs[name]) for name in theirs.held), file, form, rank)


def write_adapter_of(
    base: Path, weights: Iterable[tuple[str, Tensor]], file: Path, form: str = "lora", rank: int = 16
) -> Lost:
    """As `write_adapter`, from the changed parameters one by one, whole and by their names in the folder; equal ones are left out."""
    with ExitStack() as stack:
        return _write(Net(base, stack), weights, file, form, rank)


def read_lost(file: Path) -> Lost:
    """What an adapter that we wrote says it lacks."""
    with safe_open(file, "pt") as content:
        return Lost(**json.loads(content.metadata()[ABOUT]))


def _check(net: Net, form: str, rank: int, file: Path) -> None:
    if form not in FORMS:
        raise ConfigError(f"there is no adapter {form!r}; choose one of {', '.join(FORMS)}")
    if rank < 1:
        raise ConfigError(f"--rank {rank}: an adapter has a rank of 1 or more")
    if form == "kohya" and net.pipeline not in KOHYA:
        raise ConfigError(
            f"--as kohya: no such layout exists for a {net.pipeline}, only for {' and '.join(KOHYA)}; use --as lora"
        )
    if file.suffix != ".safetensors" or file.is_dir():
        raise ConfigError(f"{file}: an adapter is one file that is known by its name; let it end in .safetensors")
    if file.resolve() in {weights.resolve() for weights in net.files}:
        raise ConfigError(f"{file}: is a weight file of the base; name another file")


def _write(net: Net, weights: Iterable[tuple[str, Tensor]], file: Path, form: str, rank: int) -> Lost:
    """Factorise matrix by matrix into a spool, as the header that comes first says what was lost; then write it out."""
    _check(net, form, rank, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    carried = _carried(net)
    with TemporaryFile(dir=file.parent) as spool:
        pairs = [_spooled(spool, name, change, rank) for name, change in _changes(net, carried, weights)]
        if not pairs:
            raise ModelError(
                f"{net.part}: nothing of it was changed, so there is nothing to write; give the unlearned model"
            )
        rank = max(pair.rank for pair in pairs)
        lost = _lost(pairs, rank)
        keys = _kohya_keys(net, pairs) if form == "kohya" else _lora_keys(net, pairs)
        planned = [
            Entry(key, torch.float32, shape)
            for pair in pairs
            for key, shape in zip(keys[pair.name], _shapes(pair.shape, rank))
        ]
        about = _kohya_about(net, rank) if form == "kohya" else _lora_about(net, pairs, rank)
        metadata = {"format": "pt", ABOUT: json.dumps(lost._asdict())} | about
        spool.seek(0)
        write_tensors(file, planned, _filled(spool, pairs, keys, rank), metadata)
    return lost


def _carried(net: Net) -> set[str]:
    """Names of the parameters that a pair can change: weights of linear layers, and of convolutions from all channels to all."""
    import diffusers

    kind = getattr(diffusers, component_config(net.folder, net.name)["_class_name"])
    layers = empty_component(kind, net.folder, net.name, torch.float32).named_modules()
    return {
        f"{name}.weight"
        for name, layer in layers
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def _changes(net: Net, carried: set[str], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that differ, each with W' - W in fp32, of the parameter's shape."""
    for name, after in weights:
        if name not in net.held or net.held[name].shape != tuple(after.shape):
            there = net.held[name].shape if name in net.held else "missing"
            raise ModelError(
                f"{net.part}: {name} is {there}, not {tuple(after.shape)}; give the base that the model was made from"
            )
        before = net[name].to(after.dtype)
        if torch.equal(before, after):
            continue
        if name not in carried:
            raise ModelError(
                f"{name} was changed, which no adapter can carry: it holds the weights of linear layers and of ungrouped convolutions; "
                "use --as delta"
            )
        change = after.float() - before.float()
        if not torch.isfinite(change).all():
            raise ModelError(f"{name} was changed to, or from, values that are not finite; the model is damaged")
        yield name, change


def _spooled(spool: IO[bytes], name: str, change: Tensor, rank: int) -> Pair:
    """Factorise a change [out, in] or [out, in, kh, kw], and append B [out, r] and A [r, in * kh * kw] to the spool."""
    matrix = change.flatten(1)
    up, down = (factor.float().contiguous() for factor in low_rank_factors(matrix, rank))
    for factor in (up, down):
        spool.write(memoryview(factor.numpy()))
    squares = [
        matrix.double().square().sum().item() for matrix in (matrix, matrix.double() - up.double() @ down.double())
    ]
    return Pair(name, tuple(change.shape), len(down), *squares)


def _lost(pairs: list[Pair], rank: int) -> Lost:
    worst = max(pairs, key=lambda pair: pair.rest / pair.change)
    share = sum(pair.rest for pair in pairs) / sum(pair.change for pair in pairs)
    return Lost(rank, share**0.5, (worst.rest / worst.change) ** 0.5, worst.name)


def _shapes(shape: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
    """Of B, A and alpha for a parameter: of a convolution, B is one of 1 x 1 behind A, which keeps the kernel."""
    return [(shape[0], rank, *(1 for _ in shape[2:])), (rank, *shape[1:]), ()]


def _filled(
    spool: IO[bytes], pairs: list[Pair], keys: dict[str, tuple[str, ...]], rank: int
) -> Iterator[tuple[str, Tensor]]:
    """The factors as the spool holds them, one after another, filled up with zeros to the rank of the file."""
    for pair in pairs:
        width = torch.Size(pair.shape[1:]).numel()
        up = nn.functional.pad(_read(spool, pair.shape[0], pair.rank), (0, rank - pair.rank))  # [out, rank]
        down = nn.functional.pad(_read(spool, pair.rank, width), (0, 0, 0, rank - pair.rank))  # [rank, in * kh * kw]
        for key, shape, tensor in zip(
            keys[pair.name], _shapes(pair.shape, rank), (up, down, torch.tensor(float(rank)))
        ):
            yield key, tensor.reshape(shape)


def _read(spool: IO[bytes], rows: int, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(spool.read(4 * rows * columns)), dtype=torch.float32).view(rows, columns)


def _lora_keys(net: Net, pairs: list[Pair]) -> dict[str, tuple[str, ...]]:
    """Of B and A, as diffusers and peft name them; alpha is in the metadata."""
    modules = {pair.name: f"{net.name}.{pair.name.removesuffix('.weight')}" for pair in pairs}
    return {name: (f"{module}.lora_B.weight", f"{module}.lora_A.weight") for name, module in modules.items()}


def _lora_about(net: Net, pairs: list[Pair], rank: int) -> dict[str, str]:
    """The arguments of peft.LoraConfig, under the key and prefix where diffusers' save_lora_weights puts them."""
    modules = [pair.name.removesuffix(".weight") for pair in pairs]
    options = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    return {"lora_adapter_metadata": json.dumps({f"{net.name}.{key}": value for key, value in options.items()})}


def _kohya_keys(net: Net, pairs: list[Pair]) -> dict[str, tuple[str, ...]]:
    """Of B, A and alpha."""
    originals = unet_originals(net.folder) if net.pipeline == "StableDiffusionXLPipeline" else {}
    modules = {
        pair.name: originals.get(pair.name, pair.name).removesuffix(".weight").replace(".", "_") for pair in pairs
    }
    ends = ("lora_up.weight", "lora_down.weight", "alpha")
    return {name: tuple(f"lora_unet_{module}.{end}" for end in ends) for name, module in modules.items()}


def _kohya_about(net: Net, rank: int) -> dict[str, str]:
    """What kohya's trainer would say; A1111 lists a file under the version that it finds here, and hides it from other models."""
    is_second = net.pipeline == "StableDiffusionPipeline" and read_json(net.part / "config.json").get(
        "use_linear_projection"
    )
    version = (
        {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
        if is_second
        else {"ss_base_model_version": KOHYA[net.pipeline]}
    )
    return version | {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
