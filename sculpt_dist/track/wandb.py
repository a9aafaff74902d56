"""Weights & Biases: one run per unlearning, under an id kept in RUN/wandb/run-id; without a server the same run offline.

The step is ours. A requeued run is told anew what metrics.jsonl holds: a server that has a step already keeps its own (steps only
rise), and gets those that a kill had lost; offline, where every sitting leaves a folder, the newest one holds the whole run.
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
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.load import plain_values
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.files import append_line
from sculpt_dist.maths.comparison import harmonic
from sculpt_dist.track import base

if TYPE_CHECKING:
    from PIL.Image import Image

PATIENCE = 5.0  # seconds for the server's first answer
FINISH = 30.0  # seconds for sending the rest at the end; what is left stays in RUN/wandb
UPLOAD = 3600  # seconds for the files of an artifact


class Sink(base.Sink):
    replays = True

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self._config, self._folder = config, folder
        self._run: Any = self._open()
        self._first = (
            self._run.step if self._run is not None else 0
        )  # a server that knows this run has the steps before

    def log(self, entry: Mapping[str, Any]) -> None:
        self._log(base.numbers(entry), entry["global_step"])

    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        import wandb

        shown = {} if picture is None else {"samples": wandb.Image(picture, caption=stage)}
        self._log(base.score_numbers(scores) | shown, step)

    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        import wandb

        stages = {"before": report["before"]} | {
            f"after {concept['target']}": concept for concept in report["concepts"]
        }
        rows = [[stage, *(scores.get(name) for name in base.SCORES)] for stage, scores in stages.items()]
        self._log({"scores": wandb.Table(columns=["stage", *base.SCORES], data=rows)}, step)
        final = {name: report["after"][name] for name in base.SCORES if report["after"][name] is not None}
        balance = harmonic(final)  # what sweeps look at
        final |= {} if balance is None else {"H": balance}
        self._guarded(lambda run: run.summary.update(final))
        if self._config.track.artifact != "none":
            self._guarded(lambda run: _log_model(run, model, self._config.track.artifact, final))

    def close(self, outcome: str) -> None:
        if outcome == base.STOPPED:
            self._guarded(lambda run: run.mark_preempting())
        self._guarded(lambda run: run.finish(exit_code=int(outcome != base.DONE)))

    def _log(self, content: Mapping[str, Any], step: int) -> None:
        if step >= self._first and content:
            self._guarded(lambda run: run.log(dict(content), step=step))

    def _guarded(self, act: Callable[[Any], Any]) -> None:
        """Tell W&B, and do without it from the first failure on."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # its service's errors have no common base, and no failure of it may end a training
            self._run = None
            _end_service()
            self._say(f"W&B failed and is told no more ({type(error).__name__}: {error}); metrics.jsonl goes on")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        append_line(self._folder / "log.txt", text)

    def _open(self) -> Any:
        """The run: online where the server answers in time, else offline; None where not even that works."""
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # its service would wait for a server at the end, even offline
        import wandb

        self._folder.joinpath("wandb").mkdir(exist_ok=True)
        kept = self._folder / "wandb" / "run-id"
        settings = wandb.setup().settings  # of the environment and of `wandb offline`
        identity = (kept.read_text() if kept.is_file() else None) or settings.run_id or secrets.token_hex(6)
        kept.write_text(identity)
        reason = None
        if settings.mode == "online":
            reason = _unreachable(settings.base_url)
        for mode in (None, "offline") if reason is None else ("offline",):
            if mode == "offline":
                self._say(
                    f"W&B is offline for this run ({reason}); it is kept in {self._folder / 'wandb'}: send it with wandb sync"
                )
            try:
                run = self._init(identity, mode)
            except Exception as error:  # as in _guarded
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                _end_service()  # it would hold on to the id
                continue
            kept.write_text(run.id)  # under a sweep's agent, the agent's
            return run
        self._say(f"W&B does not start and is told nothing ({reason}); metrics.jsonl goes on")
        return None

    def _init(self, identity: str, mode: str | None) -> Any:
        import wandb

        track = self._config.track
        return wandb.init(
            id=identity,
            resume="allow",
            mode=mode,
            project=track.project,
            name=track.name,
            group=track.group,
            job_type="unlearn",
            tags=[str(self._config.method["name"]), self._config.model.arch],
            config=plain_values(self._config),
            dir=str(self._folder),
            settings=wandb.Settings(console="off", quiet=True, init_timeout=PATIENCE, finish_timeout=FINISH),
        )


def _end_service() -> None:
    """Let the next start have a service of its own, and this process end without waiting for the old one."""
    import wandb

    with suppress(Exception):  # a service that is gone already says so in several ways
        wandb.teardown()


def _log_model(run: Any, model: Path, how: str, scores: Mapping[str, float]) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(scores))
    if how == "reference":
        artifact.add_reference(model.absolute().as_uri(), name="model")  # its files by path, size and checksum
    else:
        artifact.add_dir(str(model), policy="immutable")  # uploaded from where they lie, not from a copy
    logged = run.log_artifact(artifact)
    if how == "files" and not run.offline:
        logged.wait(timeout=UPLOAD)


def _unreachable(url: str) -> str | None:
    """Why the server at `url` gives no answer to the simplest question within PATIENCE, or None. wandb itself would wait much longer."""
    outcome: list[str | None] = []

    def reach() -> None:
        request = urllib.request.Request(f"{url.rstrip('/')}/graphql", json.dumps({"query": "{__typename}"}).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                outcome.append(None)
        except urllib.error.HTTPError as error:  # an answer, even if it wants a key
            outcome.append(None if error.code < 500 else f"{url}: {error}")
        except (OSError, ValueError) as error:
            outcome.append(f"{url}: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=reach, daemon=True)  # a name server that does not answer heeds no timeout
    thread.start()
    thread.join(PATIENCE)
    return outcome[0] if outcome else f"{url}: no answer within {PATIENCE:g} s"
