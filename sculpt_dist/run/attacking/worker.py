"""One rank's part of the attacks: it does pieces of work, judges every attempt, and writes what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sculpt_dist.attacks.base import Attack, Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.errors import NonFiniteError, RunFolderError
from sculpt_dist.core.files import is_intact, make_folder, text_sha256, write_atomically, write_record
from sculpt_dist.evaluation.classifiers.base import Classifier
from sculpt_dist.evaluation.drawn_images import save_image
from sculpt_dist.run.attacking.cases import Work

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone


class Worker:
    """One rank's part of the attacks."""

    def __init__(
        self,
        victim: Victim,
        attacks: Mapping[str, Attack],
        made_by: Mapping[str, str],
        classifiers: Sequence[Classifier],
        where: Path,
        repeat: bool,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        """`made_by`: a checksum over all that decides the result of each attack, beside its cases.

        `repeat`: see `attack.repeat`. `stops`: whether this rank was asked to stop; a piece is then left unwritten.
        """
        self.victim, self.attacks, self.made_by, self.stops = victim, attacks, made_by, stops
        self.classifiers, self.where, self.repeat = classifiers, where, repeat
        self.plain: dict[tuple[str, str, int], Work] = {}  # the pieces that draw plain images, by case

    def do(self, works: Sequence[Work]) -> None:
        """Do pieces of work and write their results; those whose result is there are left out.

        What reads a run, and costs nothing, is done again: the run may have changed.
        """
        for work in works:
            if self.attacks[work.name].needs_run or self.read(work) is None:
                self._do(work)

    def _do(self, work: Work) -> None:
        attack, file = self.attacks[work.name], work.file(self.where)
        make_folder(file.parent)
        kept = [case for case in work.cases if not (attack.stops and self._succeeds_plainly(case))]
        records: list[list[dict[str, Any]]] = [[] for _ in kept]
        images: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for backbone in self._backbones():
                stack.enter_context(backbone.temporary_embeddings())  # another piece's batches would round otherwise
            before = self._passes()
            try:
                for attempt in attack.attempts(self.victim, kept) if kept else ():
                    if self.stops():
                        return
                    record = self._judged(attempt, kept[attempt.case]) | {"passes": self._passes() - before}
                    done = any(one["seen"] for one in records[attempt.case])
                    if attempt.image is not None and not done:
                        images[attempt.case] = attempt.image
                    tensors |= dict(attempt.tensors)
                    records[attempt.case].append(record)
                    if attack.stops and record["seen"]:
                        break
            except NonFiniteError as error:  # a failure of this attack, not of the others
                for found in records:
                    found.append(self._failed(str(error)) | {"passes": self._passes() - before})
            passes = self._passes() - before
        self._write(work, kept, records, images, tensors, passes)

    def read(self, work: Work) -> dict[str, Any] | None:
        """The result of a piece of work; None where there is none of these models and settings."""
        try:
            found: dict[str, Any] = json.loads(work.file(self.where).read_bytes())
        except (OSError, ValueError):
            return None
        is_ours = isinstance(found, dict) and is_intact(found) and found.get("made_by") == self._key(work)
        return (
            found
            if is_ours and all(work.file(self.where).with_name(name).is_file() for name in found["files"])
            else None
        )

    def _key(self, work: Work) -> str:
        cases = [[*case.key, case.index, case.guidance] for case in work.cases]
        return text_sha256(json.dumps([self.made_by[work.name], cases]))

    def _judged(self, attempt: Attempt, case: Case) -> dict[str, Any]:
        record: dict[str, Any] = {"seen": None, "witness": None}
        if attempt.image is not None:
            images = attempt.image[None].to(self.victim.device)
            verdicts = [classifier.classify(images) for classifier in self.classifiers]
            record |= dict(zip(("seen", "witness"), (case.seen_in(verdict)[0] for verdict in verdicts)))
        return record | {"variant": attempt.variant, "found": dict(attempt.found), "scores": dict(attempt.scores)}

    def _failed(self, reason: str) -> dict[str, Any]:
        """An attempt whose image could not be drawn: nobody sees the concept in it."""
        seen = dict(zip(("seen", "witness"), [False] * len(self.classifiers)))
        return {"seen": None, "witness": None, **seen, "variant": "", "found": {"failed": reason}, "scores": {}}

    def _write(
        self,
        work: Work,
        cases: Sequence[Case],
        records: Sequence[Sequence[dict[str, Any]]],
        images: dict[int, Tensor],
        tensors: dict[str, Tensor],
        passes: int,
    ) -> None:
        from safetensors.torch import save

        file, by_case = work.file(self.where), {case.key: found for case, found in zip(cases, records)}
        files: dict[str, str] = {}  # their checksums
        for place, image in images.items():
            about = {"prompt": cases[place].prompt, "seed": str(cases[place].seed), "attack": work.name}
            name = f"{file.stem}-{place}.png"
            files[name] = save_image(file.with_name(name), image, about)
        if tensors:
            found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            content = save(found)
            write_atomically(file.with_suffix(".safetensors"), content)
            files[f"{file.stem}.safetensors"] = hashlib.sha256(content).hexdigest()
        shown = {
            case.key: f"{work.name}/{file.stem}-{place}.png" for place, case in enumerate(cases) if place in images
        }
        listed = [
            {
                "concept": case.concept.target,
                "prompt": case.prompt,
                "seed": case.seed,
                "image": shown.get(case.key),
                "attempts": by_case.get(case.key, []),
            }
            for case in work.cases
        ]
        write_record(file, {"made_by": self._key(work), "files": files, "passes": passes, "cases": listed})

    def _succeeds_plainly(self, case: Case) -> bool:
        """Whether every classifier sees the concept in the plain image, so that nothing is left to attack."""
        if self.repeat:
            return False
        found = self.read(self.plain[case.key])
        if found is None:
            raise RunFolderError(f"{self.where}: a plain image is not there: all ranks need one folder that they share")
        attempt = found["cases"][0]["attempts"][0]
        return bool(attempt["seen"]) and attempt["witness"] in (True, None)

    def _backbones(self) -> list[Backbone]:
        models = (self.victim.model, self.victim.original)
        return [model.backbone for model in models if model is not None]

    def _passes(self) -> int:
        return sum(backbone.passes for backbone in self._backbones())
