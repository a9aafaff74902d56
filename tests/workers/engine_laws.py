"""Run by test_engine.py for each kind, stage and precision: a short training of the shipped net; saves its outcome."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from setups import backbone_of, method_of, setup_of

from sculpt_dist.config.load import load_config
from sculpt_dist.engine.checkpoints import restore as checkpoint
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.maths.losses import mse
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.export import export_model

STEPS, BATCH = 8, 24  # a batch that 1 to 4 and 8 ranks share evenly, 1 to 4 also in two micro-batches


def gather(engine, kind: str) -> dict[str, torch.Tensor]:
    """One kind of per-weight state, gathered from all ranks' shards."""
    whole = {name: torch.zeros(size) for name, size in engine.sizes.items()}
    for shard in engine.shards:
        for f in shard.fragments:
            whole[f.name][f.start : f.start + f.numel] = getattr(shard, kind)[f.here].float()
    return {
        f"{kind}|{name}": tensor if engine.replicated else engine.group.sum(tensor) for name, tensor in whole.items()
    }


def give_saliency(engine, round_: int) -> None:
    """Set a saliency with many ties that depends only on parameter and position."""
    for shard in engine.shards:
        for f in shard.fragments:
            position = torch.arange(f.start, f.start + f.numel)
            shard.saliency[f.here] = ((position * (7919 + round_) + f.index * 31) % 97 - 48).float()


def state_of(shard) -> dict[str, torch.Tensor]:
    momentum, variance = shard.moments.flat(shard.opened)
    kept = {
        "flat": shard.flat,
        "momentum": momentum,
        "variance": variance,
        "opened": shard.opened,
        "saliency": shard.saliency,
    }
    return {kind: tensor.clone() for kind, tensor in kept.items()}


def main(out: Path, arch: str, stage: str, precision: str, accumulate: str, moments: str) -> None:
    torch.set_num_threads(1)
    overrides = [
        f"model.arch={arch}",
        f"engine.stage={stage}",
        f"engine.precision={precision}",
        f"train.batch={BATCH}",
        f"train.accumulate={accumulate}",
    ]
    overrides.append(f"engine.moments={moments}")
    config = load_config(None, [*overrides, "train.weight_decay=0.1", "train.clip=0.5", "mask.keep=0.3"])
    group = Group(60)
    backbone, method = backbone_of(config, group), method_of(config)
    biases = [name for name in method.trainable(backbone.groups()) if not name.endswith("weight")]
    assert not biases, biases
    engine = build_engine(setup_of(config), backbone, group)
    saved: dict[str, torch.Tensor] = {}
    notes: dict[str, object] = {"trained": engine.num_trained}

    sent = group.bytes_communicated()
    # The same saliency gives the same mask in every stage and on any number of ranks; ties go to the lowest positions.
    for scope in ("matrix", "global"):
        engine.mask.settings = type(engine.mask.settings)(0.3, scope, "abs_sum", 0)
        engine.begin_concept(0)
        give_saliency(engine, 0)
        engine.mask.build()
        saved |= {f"built {scope} {k}": v for k, v in gather(engine, "opened").items()}
        give_saliency(engine, 1)
        before = engine.mask.num_open()
        engine.mask.turn_over(0.2, 0)
        assert engine.mask.num_open() == before == engine.mask.open_count
        saved |= {f"turned {scope} {k}": v for k, v in gather(engine, "opened").items()}
    notes["mask_bytes"] = group.bytes_communicated() - sent  # including 4 x 16 gathered masks

    # Training.
    engine.mask.settings = type(engine.mask.settings)(0.3, "matrix", "abs_sum", 0)
    engine.begin_concept(0)
    rng = torch.Generator().manual_seed(5)
    clean, noise = torch.randn(2, STEPS, BATCH, *backbone.latent_shape, generator=rng)
    time = torch.stack([backbone.sample_time(torch.rand(BATCH, generator=rng)) for _ in range(STEPS)])
    cond = backbone.embed(["a photo of a cat", "a photo of a car"] * (BATCH // 2))
    share = BATCH // group.size // config.train.accumulate

    def loss(step: int, micro: int = 0) -> torch.Tensor:
        first = (micro * group.size + group.rank) * share
        samples = slice(first, first + share)
        noisy = backbone.corrupt(clean[step, samples], noise[step, samples], time[step, samples])
        goal = backbone.goal(clean[step, samples], noise[step, samples], time[step, samples])
        return mse(backbone.denoise(engine.net, noisy, time[step, samples], cond[samples]), goal)

    def step(number: int, phase: str, lr: float) -> float:
        for micro in range(config.train.accumulate):
            value = loss(number, micro)
            engine.record({"loss": value})
            engine.backward(value)
            engine.step(phase, lr)
        return engine.end_step().terms["loss"]

    start = engine.masters()
    stored = dict(backbone.stored_weights())
    for shard in engine.shards:  # masters start from the stored values, not from rounded copies
        for f in shard.fragments:
            assert torch.equal(shard.flat[f.here], stored[f.name].float().view(-1)[f.start : f.start + f.numel]), f.name
    for number in range(2):
        step(number, "collect", 0.0)
    assert all(torch.equal(a, b) for a, b in zip(start, engine.masters())), "a weight moved while collecting"
    saved |= gather(engine, "saliency")
    engine.mask.build()
    assert all(not shard.saliency.any() for shard in engine.shards)
    ever_open = [shard.opened > 0 for shard in engine.shards]
    teacher, teacher_loss = engine.snapshot(), float(loss(0))
    losses, norms = [], []
    for number in range(STEPS):
        losses.append(step(number, "train", 1e-3))
        norms.append(engine.optimizer.grad_norm)
        if number == 3:
            engine.mask.turn_over(0.2, engine.optimizer.updates)
            ever_open = [was | (shard.opened > 0) for was, shard in zip(ever_open, engine.shards)]
            newly = [(shard.opened == 2) for shard in engine.shards]
            before_first = engine.masters()
        if number == 4:  # the first step of newly opened weights is at most lr, plus decay
            for shard, fresh, was in zip(engine.shards, newly, before_first):
                moved = (shard.flat - was).abs()[fresh]
                assert float((moved - 1e-3 - 1e-4 * was.abs()[fresh]).max()) <= 1e-7, (
                    "a newly opened weight took too large a step"
                )
    notes |= {"losses": losses, "norms": norms}
    closed_moved = sum(int((shard.flat != a)[~was].sum()) for shard, a, was in zip(engine.shards, start, ever_open))
    open_moved = sum(int((shard.flat != a)[was].sum()) for shard, a, was in zip(engine.shards, start, ever_open))
    assert closed_moved == 0, f"{closed_moved} closed weights moved"
    assert open_moved > 0
    saved |= gather(engine, "flat") | gather(engine, "opened")

    # The teacher computes with the earlier weights; afterwards the student is unchanged.
    now = float(loss(0))
    with teacher():
        assert float(loss(0)) == teacher_loss != now
    assert float(loss(0)) == now

    # A checkpoint restores weights, moments and mask; publish copies them into the net.
    state = [state_of(shard) for shard in engine.shards]
    with Saver(out.parent / f"{out.stem}-checkpoints", group) as saver:
        saver.save((0, 7), engine.shards, {"teacher": start}, {"note": 1})
        engine.mask.turn_over(0.5, engine.optimizer.updates)  # while the checkpoint is being written
        step(0, "train", 1e-2)
    assert float(loss(0)) != now
    path, note = checkpoint.newest(out.parent / f"{out.stem}-checkpoints", group)
    filled = checkpoint.load(path, engine.shards, ["teacher"])
    engine.publish()
    assert note == {"note": 1} and float(loss(0)) == now
    for shard, kinds, teacher_shard, was in zip(engine.shards, state, filled["teacher"], start):
        padding = shard.padding if shard.padding is not None else torch.zeros_like(shard.opened, dtype=torch.bool)
        assert all(torch.equal(tensor[~padding], kinds[kind][~padding]) for kind, tensor in state_of(shard).items())
        assert torch.equal(teacher_shard[~padding], was[~padding])

    # An inner product over all shards.
    vector = ShardedVector([shard.flat for shard in engine.shards], None if engine.replicated else group)
    notes["squared"] = vector.dot(vector)

    # The export loads in plain diffusers and predicts the same as the student.
    student = backbone.denoise(engine.net, clean[0], time[0], cond)
    folder = export_model(
        config.model.dtype,
        backbone,
        engine.full_weights(backbone.in_stored_order(engine.sizes)),
        out.parent / f"{out.stem}-model",
        group,
    )
    if group.is_first:
        from diffusers import DiffusionPipeline

        plain = getattr(DiffusionPipeline.from_pretrained(folder), backbone.net_name)
        predicted = backbone.denoise(plain, clean[0], time[0], cond)
        notes["export_difference"] = float((predicted - student.float()).abs().max())
        save_file({k: v.contiguous() for k, v in saved.items()}, out)
        out.with_suffix(".json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:7])
