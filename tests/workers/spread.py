"""Run by test_track.py: saliency quantiles of real shards against torch.quantile, update norm against moves."""

from __future__ import annotations

import sys

import torch
from engine_laws import gather
from setups import backbone_of, setup_of

from sculpt_dist.config.load import load_config
from sculpt_dist.maths.losses import mse
from sculpt_dist.run.build import build_engine


def main(stage: str) -> None:
    config = load_config(None, [f"engine.stage={stage}", "train.batch=4", "train.weight_decay=0.1", "mask.keep=0.3"])
    group = setup_of(config).join_ranks()
    backbone = backbone_of(config, group)
    engine = build_engine(setup_of(config), backbone, group)
    engine.begin_concept(0)
    spreads = []
    for kind in ("smooth", "tied", "zero"):
        for shard in engine.shards:
            for f in shard.fragments:
                rng = torch.Generator().manual_seed(f.index)
                draw = torch.randn(engine.sizes[f.name], generator=rng)[f.start : f.start + f.numel]
                shard.saliency[f.here] = {"smooth": draw**5, "tied": (draw * 3).round(), "zero": draw * 0}[kind]
        values = torch.cat(list(gather(engine, "saliency").values())).abs().double()
        assert len(values) == engine.num_trained
        engine.mask.build()
        found = engine.mask.spread
        for share, value in found.items():
            true = float(torch.quantile(values, share, interpolation="lower"))
            assert 0 <= true - value <= true / 8, (kind, share, value, true)
        assert len(set(group.to_all(tuple(found.values())))) == 1
        spreads.append(found)
    assert 0 < spreads[0][0.1] < spreads[0][0.5] < spreads[0][0.99] and not any(spreads[2].values())

    before = torch.cat(list(gather(engine, "flat").values()))
    noise = torch.randn(4 // group.size, *backbone.latent_shape, generator=torch.Generator().manual_seed(group.rank))
    time = backbone.sample_time(torch.full((len(noise),), 0.5))
    loss = mse(backbone.denoise(engine.net, noise, time, backbone.embed(["a cat"] * len(noise))), noise)
    engine.backward(loss)
    engine.step("train", 1e-2)
    moved = torch.cat(list(gather(engine, "flat").values())) - before
    norm = engine.optimizer.update_norm()
    assert norm > 0
    assert abs(norm - float(moved.double().norm())) < 1e-4 * norm, (norm, float(moved.norm()))
    print("spread is right", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
