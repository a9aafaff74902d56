"""Weights & Biases: one W&B run per run folder, under an id that is kept in RUN/wandb/run-id.

Step numbers are ours. A resumed run sends the content of metrics.jsonl again. An online server keeps the steps that
it already has (its steps only rise) and receives those that a kill lost. Offline, every session writes a folder of its
own, so the newest one holds the whole run.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.files import append_line
from sculpt_dist.maths.comparison import harmonic
from sculpt_dist.track.sinks import base

if TYPE_CHECKING:
    from PIL.Image import Image

PATIENCE = 5.0  # seconds to wait for the server's first answer
FINISH = 30.0  # seconds for sending the rest at the end; unsent data stays in RUN/wandb
UPLOAD = 3600  # seconds for uploading the files of an artifact

Mode = Literal["offline"] | None


def project_name(track: TrackConfig) -> str:
    """An explicit key comes before the environment, and that before our default."""
    return track.project or os.environ.get("WANDB_PROJECT") or "sculpt-dist"


class Sink(base.Sink):
    package, install = "wandb", "pip install 'sculpt-dist[wandb]'"
    replays = True

    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, step: int) -> None:
        self._track, self._values, self._folder = track, values, folder
        self._run: Any = self._open()
        self._first = 0 if self._run is None else self._run.step  # a server that knows this run has earlier steps

    def log(self, entry: Mapping[str, Any]) -> None:
        self._log(base.numbers(entry), entry["global_step"])

    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        import wandb

        samples = {} if picture is None else {"samples": wandb.Image(picture, caption=stage)}
        self._log(base.score_numbers(scores) | samples, step)

    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        import wandb

        stages = {"before": report["before"]} | {
            f"after {concept['target']}": concept for concept in report["concepts"]
        }
        rows = [
            [stage, *(part.get(name) for part in (scores, scores.get("paraphrased") or {}) for name in base.SCORES)]
            for stage, scores in stages.items()
        ]
        columns: list[str | int] = ["stage", *base.SCORES, *(f"{name}, paraphrased" for name in base.SCORES)]
        self._log({"scores": wandb.Table(columns=columns, data=rows)}, step)
        final = {name: report["after"][name] for name in base.SCORES if report["after"][name] is not None}
        balance = harmonic(final)  # the metric of sweeps
        final |= {} if balance is None else {"H": balance}
        self._guarded(lambda run: run.summary.update(final))
        if self._track.artifact != "none":
            self._guarded(lambda run: _log_model(run, model, self._track.artifact, final))

    def close(self, outcome: str) -> None:
        if outcome == base.STOPPED:
            self._guarded(lambda run: run.mark_preempting())
        self._guarded(lambda run: run.finish(exit_code=int(outcome != base.DONE)))

    def _log(self, content: Mapping[str, Any], step: int) -> None:
        if step >= self._first and content:
            self._guarded(lambda run: run.log(dict(content), step=step))

    def _guarded(self, act: Callable[[Any], Any]) -> None:
        """Call W&B; after its first failure, do without it."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # the errors of W&B's service have no common base, and none may end a training
            self._run = None
            _stop_service()
            self._announce(
                f"W&B failed and is off for the rest of this session ({type(error).__name__}: {error}); "
                "metrics.jsonl continues"
            )

    def _announce(self, text: str) -> None:
        print(text, flush=True)
        append_line(self._folder / "log.txt", text)

    def _open(self) -> Any:
        """The run: online if the server answers in time, else offline; None if W&B does not start at all."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits for a server at exit, even offline
        import wandb

        self._folder.joinpath("wandb").mkdir(exist_ok=True)
        id_file = self._folder / "wandb" / "run-id"
        settings = wandb.setup().settings  # from the environment and from `wandb offline`
        identity = (id_file.read_text() if id_file.is_file() else None) or settings.run_id or secrets.token_hex(6)
        id_file.write_text(identity)
        reason = None
        if settings.mode == "online":
            reason = _unreachable(settings.base_url)
        modes: tuple[Mode, ...] = (None, "offline") if reason is None else ("offline",)
        for mode in modes:
            if mode == "offline":
                self._announce(
                    f"W&B is offline for this run ({reason}). It is kept in {self._folder / 'wandb'}: "
                    "upload it with wandb sync"
                )
            try:
                run = self._init(identity, mode)
            except Exception as error:  # as in _guarded
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                _stop_service()  # it would keep the id
                continue
            id_file.write_text(run.id)  # under a sweep agent, the agent chooses the id
            return run
        self._announce(f"W&B does not start ({reason}) and is off for this session; metrics.jsonl continues")
        return None

    def _init(self, identity: str, mode: Mode) -> Any:
        import wandb

        return wandb.init(
            id=identity,
            resume="allow",
            mode=mode,
            project=project_name(self._track),
            name=self._track.name,
            group=self._track.group,
            job_type="unlearn",
            tags=[str(self._values["method"]["name"]), self._values["model"]["arch"]],
            config=dict(self._values),
            dir=str(self._folder),
            settings=wandb.Settings(console="off", quiet=True, init_timeout=PATIENCE, finish_timeout=FINISH),
        )


def _stop_service() -> None:
    """Let the next start have a service of its own, and this process exit without waiting for the old one."""
    import wandb

    with suppress(Exception):  # a dead service raises errors of several unrelated types
        wandb.teardown()


def _log_model(run: Any, model: Path, how: str, scores: Mapping[str, float]) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(scores))
    if how == "reference":
        artifact.add_reference(model.absolute().as_uri(), name="model")  # its files by path, size and checksum
    else:
        artifact.add_dir(str(model), policy="immutable")  # uploads the files in place, without a copy
    logged = run.log_artifact(artifact)
    if how == "files" and not run.offline:
        logged.wait(timeout=UPLOAD)


def _unreachable(url: str) -> str | None:
    """Why the server at `url` does not answer a trivial query within PATIENCE; None if it does.

    wandb itself would wait much longer.
    """
    outcome: list[str | None] = []

    def reach() -> None:
        request = urllib.request.Request(f"{url.rstrip('/')}/graphql", json.dumps({"query": "{__typename}"}).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                outcome.append(None)
        except urllib.error.HTTPError as error:  # still an answer, even if it demands a key
            outcome.append(None if error.code < 500 else f"{url}: {error}")
        except (OSError, ValueError) as error:
            outcome.append(f"{url}: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=reach, daemon=True)  # DNS lookups ignore the timeout
    thread.start()
    thread.join(PATIENCE)
    return outcome[0] if outcome else f"{url}: no answer within {PATIENCE:g} s"
