"""Runs a method defined in this file: with an adapter, with two loss groups, or a closed-form edit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from sculpt_dist.config.load import load_config
from sculpt_dist.core.types import Losses
from sculpt_dist.methods.base import Editor
from sculpt_dist.methods.dm_cal import Config, Method
from sculpt_dist.run import setup
from sculpt_dist.run.sequence import run_sequence

combined: list[int] = []


class Adapted(Method):
    def adapter(self, groups):
        return {"r": 2, "lora_alpha": 4, "target_modules": r".*attn2\.to_[kv]", "init_lora_weights": False}


class Grouped(Method):
    def loss_groups(self):
        def part(name: str):
            return lambda step: Losses(
                {k: v for k, v in self.losses(step).terms.items() if (k == "forget") == (name == "forget")}
            )

        return part("forget"), part("rest")

    def combine(self, gradients):
        assert len(gradients) == 2
        combined.append(1)
        return super().combine(gradients)


class Halved(Editor):
    def edit(self, backbone, concepts):
        assert [prompts.target[0] for prompts in concepts] == ["a photo of a bird", "a photo of a boat"]
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
        return {name: backbone.net.get_parameter(name) / 2}


kind, config, *overrides = sys.argv[1:]
made = {"adapter": Adapted, "groups": Grouped, "editor": lambda _: Halved()}[kind](
    Config(retain_weight=0.1, distill_weight=1.0)
)
setup.load_method = lambda options: made
run_sequence(load_config(Path(config), overrides))
if os.environ["RANK"] == "0":
    print(json.dumps({"combined": len(combined)}))
