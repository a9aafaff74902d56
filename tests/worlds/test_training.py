"""The training of a world's models: one that was stopped ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sculpt_dist.worlds import training
from sculpt_dist.worlds.training import Descent, descend

PLAN = Descent(steps=12, peak=0.1, warmup=3, average=0.9)


class Stopped(Exception):
    pass


def train(file: Path | None, stop_at: int | None = None, plan: Descent = PLAN, width: int = 4) -> dict[str, Tensor]:
    """A small net with a batch norm, whose running mean is no weight; stopped while it computes update `stop_at`."""
    torch.manual_seed(0)
    net, rng, calls = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width)), torch.Generator().manual_seed(1), []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise Stopped
        return net(torch.randn(8, 3, generator=rng)).square().sub(torch.rand(8, width, generator=rng)).square().mean()

    descend({"net": net}, loss, plan, rng, "small", file)
    return {**net.state_dict(), "calls": torch.tensor(len(calls))}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first if name != "calls")


def test_a_stopped_training_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    whole, file = train(None), tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        train(file, stop_at=6)
    again = train(file)
    assert int(again["calls"]) == 7 and equal(whole, again)
    assert int(train(file)["calls"]) == 0, "a finished training computes nothing"
    assert equal(whole, train(file))


def test_a_file_of_another_plan_or_net_or_a_damaged_one_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    file = tmp_path / "state.safetensors"
    train(file)
    assert int(train(file, plan=Descent(steps=5, peak=0.1))["calls"]) == 5
    assert int(train(file)["calls"]) == 12
    assert int(train(file, width=5)["calls"]) == 12
    file.write_bytes(file.read_bytes()[:-40])
    assert int(train(file, width=5)["calls"]) == 12


def test_the_rate_rises_and_falls_to_nothing():
    rates = [Descent(steps=100, peak=2.0, warmup=10).rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[100] == pytest.approx(0) and rates[50] == pytest.approx(1.0)
