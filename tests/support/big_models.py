"""Model folders of real size for tests: a shipped tiny pipeline with a larger denoiser of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from harness import PROJECT

UNET = {  # 106 M parameters
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 4],
    "attention_head_dim": [2, 4, 8],
    "norm_num_groups": 32,
    "sample_size": 16,
    "cross_attention_dim": 64,
}
SANA = {
    "num_layers": 8,
    "num_attention_heads": 32,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 1024,
    "mlp_ratio": 2.5,
    "sample_size": 16,
}


def write_model(folder: Path, arch: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> int:
    """Write the pipeline folder; returns the number of parameters of its denoiser."""
    from sculpt_dist.core.tensorfile import Entry, write_tensors

    shutil.copytree(PROJECT / "sculpt_dist" / "assets" / "canvas" / arch, folder)
    part = folder / ("transformer" if arch == "sana" else "unet")
    config = json.loads((part / "config.json").read_text()) | settings
    shutil.rmtree(part)
    part.mkdir()
    (part / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    planned = [Entry(name, dtype, tuple(p.shape)) for name, p in net.named_parameters()]
    rng = torch.Generator().manual_seed(0)
    values = ((e.name, torch.empty(e.shape, dtype=dtype).normal_(std=0.02, generator=rng)) for e in planned)
    write_tensors(part / "diffusion_pytorch_model.safetensors", planned, values, {"format": "pt"})
    return sum(p.numel() for p in net.parameters())
