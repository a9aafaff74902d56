"""Methods with parts of their own (a discriminator, ranks of an adapter, refined weights) stop, go on and export."""

from __future__ import annotations

import pytest
import torch
from harness import PROJECT, TINY_RUN, sculpt, weights
from safetensors.torch import load_file

BASE = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15" / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["doco", "mace"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, method):
    config = str(PROJECT / "configs" / "canvas" / f"{method}.yaml")
    own = ["method.warmup=0.2"] if method == "doco" else []
    long = [*TINY_RUN, "train.steps=60"]  # so that the request comes before the end
    arguments = [config, *long, *own, "evaluate.enabled=false", f"prepare.folder={tmp_path / 'shared'}"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    sculpt("unlearn", *arguments, f"run.folder={straight}")
    stopped.mkdir()
    (stopped / "STOP").touch()
    sculpt("unlearn", *arguments, f"run.folder={stopped}", code=75)
    (stopped / "STOP").unlink()
    sculpt("unlearn", *arguments, f"run.folder={stopped}")
    expected, found = weights(straight), weights(stopped)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sculpt("export", *arguments, f"run.folder={stopped}")  # again, from the checkpoint
    again = weights(stopped)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_each_concept_of_mace_trains_its_own_rank_between_two_closed_forms(tmp_path):
    config = str(PROJECT / "configs" / "canvas" / "mace.yaml")
    arguments = [config, *TINY_RUN, "evaluate.enabled=false", "train.lr=1e-2", f"prepare.folder={tmp_path / 'shared'}"]
    sculpt("unlearn", *arguments, f"run.folder={tmp_path / 'both'}")
    sculpt("unlearn", *arguments, "train.lr=1e-12", f"run.folder={tmp_path / 'refined'}")  # the closed form alone
    base, both, refined = load_file(BASE), weights(tmp_path / "both"), weights(tmp_path / "refined")
    changed = [name for name in base if not torch.equal(base[name].float(), refined[name])]
    assert changed and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    ranks = [int(torch.linalg.matrix_rank(both[name] - refined[name], atol=1e-4)) for name in changed if "to_k" in name]
    assert max(ranks) == 2  # one for each of two concepts
    refused = sculpt(
        "unlearn", *arguments, "mask.keep=0.5", "run.fresh=true", f"run.folder={tmp_path / 'both'}", code=2
    )
    assert "mask.keep=0.5: method.name=mace opens each concept's own ranks of its adapter; set it to 1" in refused
