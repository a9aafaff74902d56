"""LoRA adapters on the denoiser: added and described through peft, and merged into the stored weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def add_lora(net: Any, options: Mapping[str, Any], seed: int) -> list[str]:
    """Add an adapter (peft.LoraConfig with these options) to the net; returns the names of its parameters."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]), _whole_kernels(net):
        torch.manual_seed(seed)
        net.add_adapter(LoraConfig(**options))
    return [name for name, _ in net.named_parameters() if ".lora_" in name]


@contextmanager
def _whole_kernels(net: nn.Module) -> Iterator[None]:
    """Within, sharded kernels have their whole shapes, without values: peft reads the number of their dimensions."""
    sharded = {
        module: module.weight
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and hasattr(module.weight, "ds_shape")
    }
    for module, weight in sharded.items():
        shape: Any = weight.ds_shape
        module.weight = nn.Parameter(torch.empty(1, dtype=weight.dtype, device=weight.device).expand(shape), False)
    try:
        yield
    finally:
        for module, weight in sharded.items():
            module.weight = weight


def write_lora_config(folder: Path, options: Mapping[str, Any], base: str | None) -> None:
    """Write adapter_config.json, from which peft builds the layers (peft.LoraConfig with these options)."""
    from peft import LoraConfig

    LoraConfig(**options, base_model_name_or_path=base).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    content["target_modules"] = sorted(content["target_modules"])  # peft keeps a set
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def merged_name(name: str) -> str:
    """The stored parameter that a trained one becomes, or becomes a part of."""
    layer, lora, _ = name.partition(".lora_")
    return f"{layer}.weight" if lora else name


def merged_lora(
    net: Any, weights: Iterable[tuple[str, Tensor | None]], stored: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters under the names of the stored checkpoint; a LoRA pair becomes W + scale B A.

    `stored` gives W: the net's own may be sharded. Source: Hu et al., arXiv 2106.09685, section 4.1.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        assert tensor is not None, "only the first rank merges"
        layer, lora, rest = name.partition(".lora_")
        if not lora:
            yield name, tensor
            continue
        pair = halves.setdefault(layer, {})
        pair[rest[0]] = tensor  # lora_A [r, in, ...] or lora_B [out, r, ...]
        if len(pair) == 2:
            scale = net.get_submodule(layer).scaling["default"]
            before = stored(f"{layer}.weight").float()
            change = (pair["B"].flatten(1) @ pair["A"].flatten(1)).view_as(before) * scale
            yield f"{layer}.weight", before + change
