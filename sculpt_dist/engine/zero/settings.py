"""Settings of the engine, and the DeepSpeed configuration made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

REDUCE_BUCKET = 1 << 25  # elements of gradients that are reduced together
PERSISTENT = 100_000  # stage 3 never partitions tensors of up to this many elements
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EngineSettings:
    """What the engine needs of the configuration: its `engine` section and the optimizer's keys."""

    stage: int  # ZeRO stage, 0 to 3
    precision: str  # fp32 or bf16
    micro_batch: int  # samples per rank, stream and backward
    accumulate: int  # micro-batches per optimizer step
    betas: tuple[float, float]
    weight_decay: float
    clip: float  # largest norm of the masked gradient; 0 does not clip
    packed: bool = False  # hold moments for open weights only
    kernel: str = "auto"  # which kernel computes the masked step (optimizer/kernels/)
    gathered: float = 1e9  # parameters that stage 3 holds gathered at a time
    draw: str = "sharded"  # on stage 3, with which weights to draw images: sharded, whole or auto


def fetched_ahead(gathered: float) -> int:
    """How many of the elements that stage 3 may hold gathered are prefetched."""
    return int(min(5e7, gathered / 2))


def deepspeed_config(settings: EngineSettings, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Its clipping is off: it would scale the saliency and use the unmasked norm."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero: dict[str, Any] = {"stage": settings.stage, "reduce_bucket_size": REDUCE_BUCKET}
    has_norm_switch = "compute_grad_norm" in DeepSpeedZeroConfig.model_fields  # not in earlier versions
    if settings.stage in (1, 2) and has_norm_switch:
        zero["compute_grad_norm"] = False  # MaskedAdamW computes that of the masked gradient
    if settings.stage == 3:
        zero["sub_group_size"] = int(1e15)  # one flat shard per rank, so that one step sees the whole gradient
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = int(settings.gathered)
        zero["stage3_prefetch_bucket_size"] = fetched_ahead(settings.gathered)
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulate,
        "train_batch_size": settings.micro_batch * settings.accumulate * ranks,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
    if settings.precision == "bf16":
        config |= {
            "bf16": {"enabled": True},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return config
