"""The training loop waits for the device once a step: where it reads what the step measured."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from harness import PROJECT, launch

OURS = {"sculpt_dist/engine/zero/engine.py:end_step": 1}
DEEPSPEED = {"3": {"deepspeed/runtime/utils.py:is_invalid_grad_norm": 1}}  # its own, in stage 3 only
CPU_KERNEL = "sculpt_dist/engine/optimizer/kernels/cpu.py:update"  # the GPU's kernel takes the scale as a tensor


@pytest.fixture(scope="module")
def steps() -> dict[str, list[tuple[str, Counter]]]:
    """For each ZeRO stage, the phase of each step and the places that read from the device."""
    printed = launch(1, str(PROJECT / "tests" / "workers" / "waits.py"), "dm_cal", "0", "1", "2", "3")
    found = json.loads(printed.strip().splitlines()[-1])
    return {stage: [(phase, Counter(places)) for phase, places in of_stage] for stage, of_stage in found.items()}


@pytest.mark.parametrize("stage", "0123")
def test_a_step_waits_once_for_the_device(steps, stage):
    phases = [phase for phase, _ in steps[stage]]
    assert phases == ["collect", "collect", "collect and mask", "train", "train"]
    for phase, places in steps[stage][1:]:  # in the first, the data loader and stage 3 are set up
        del places[CPU_KERNEL]
        assert "mask" in phase or dict(places) == OURS | DEEPSPEED.get(stage, {})
