"""What is alive when one concept follows another: as much as within a concept."""

from __future__ import annotations

import weakref

import pytest
import torch

import sculpt_dist
from sculpt_dist.engine.zero import engine


@pytest.mark.parametrize(("method", "teachers"), [("dm_cal", 1), ("salun", 0), ("kscu", 1)])
def test_no_earlier_teacher_and_no_earlier_start_is_alive_when_the_next_are_made(
    monkeypatch, tmp_path, method, teachers
):
    made: dict[str, list[weakref.ref]] = {"teacher": [], "start": []}
    most = {"teacher": 0, "start": 0}

    def count(kind: str, thing: object) -> None:
        made[kind].append(weakref.ref(thing))
        most[kind] = max(most[kind], sum(one() is not None for one in made[kind]))

    class Counted(engine.FrozenWeights):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            count("teacher", self)

    masters = engine.Engine.masters

    def counted_masters(self) -> list[torch.Tensor]:
        found = masters(self)
        count("start", found[0])
        return found

    monkeypatch.setattr(engine, "FrozenWeights", Counted)
    monkeypatch.setattr(engine.Engine, "masters", counted_masters)
    sculpt_dist.unlearn(
        method=method,
        concepts=[{"target": name, "superclass": "animal"} for name in ("cat", "dog", "bird")],
        prepare={"samples": 2, "steps": 2},
        train={"steps": 3, "batch": 2, "checkpoint_every": 0.001},
        mask={"collect": 1, "refresh": 0},
        evaluate={"enabled": False},
        run={"folder": tmp_path / "run"},
    )
    assert len(made["start"]) == 3 and most == {"teacher": teachers, "start": 1}
    assert len(made["teacher"]) == 3 * teachers
