"""Tracking: what each step records, and which tracker receives it.

W&B runs are real and offline; the tests read them with W&B's own command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import PROJECT, SMALL, Ranks, launch, rank_environment, sculpt
from runs import LONGER, lines, wait_for_step

from sculpt_dist.config.load import load_config, plain_values, to_yaml
from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.maths.comparison import harmonic
from sculpt_dist.run.sequence import run_sequence
from sculpt_dist.track import Tracker, check_tracking

WANDB = shutil.which("wandb", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
CANARY, KEY, TOKEN = "canary-hunter2", "b" * 20 + "c" * 20, "hf_" + "d" * 30
pytestmark = pytest.mark.skipif(WANDB is None, reason="the command wandb is not installed")


def records(folder: Path) -> list[dict]:
    """The records of an offline W&B run, from `wandb leet inspect`."""
    done = subprocess.run([WANDB, "leet", "inspect", "--json", str(folder)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(found: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in found if record["type"] == kind]


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def rows(folder: Path) -> list[dict]:
    """The rows of an offline run's history."""
    return [record["item"] for record in of(records(folder), "history")]


SCORES = ("UA", "IRA", "CRA", "SA")


def read_report(run: Path) -> dict:
    return json.loads((run / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, canvas_config):
    """A finished run with every tracker, its model path taken from the environment; and its output."""
    home = tmp_path_factory.mktemp("tracked")
    shutil.copytree(PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15", home / CANARY / "sd15")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MODELS": str(home / CANARY),
            "WANDB_API_KEY": KEY,
            "HF_TOKEN": TOKEN,
            "WANDB_MODE": "offline",
        }.items():
            patch.setenv(name, value)
        wanted = [
            "track.wandb=true",
            "track.tensorboard=true",
            "track.group=a-sweep",
            "model.path=${oc.env:MODELS}/sd15",
        ]
        printed = sculpt("unlearn", canvas_config, *SMALL, *wanted, f"run.folder={home / 'run'}")
    return home / "run", printed


def test_every_step_records_terms_mask_norms_time_and_memory(tracked):
    recorded = lines(tracked[0])
    assert [entry["global_step"] for entry in recorded] == list(range(16))
    for entry in recorded:
        shares = entry["time_shares"]
        assert set(shares) == {"data", "forward", "backward", "reduce", "step", "refresh"}
        assert all(share >= 0 for share in shares.values()) and 0.5 < sum(shares.values()) <= 1.001
        assert shares["forward"] > 0 and entry["peak_memory_bytes"] > 1e8
        assert ("saliency" in entry) == (entry["step"] in (1, 3, 5))  # the build, and two turnovers
        if entry["phase"] == "train":
            assert entry["grad_norm"] > 0 and entry["update_norm"] > 0 and entry["lr"] > 0
        if "saliency" in entry:
            assert 0 < entry["saliency"]["0.1"] < entry["saliency"]["0.5"] < entry["saliency"]["0.99"]
        if "swapped" in entry:
            assert entry["turnover"] == pytest.approx(entry["swapped"] / 46080) == pytest.approx(1 - entry["overlap"])


def test_wandb_holds_every_step_once_and_scores_and_samples_of_every_stage(tracked):
    (folder,) = offline_runs(tracked[0])
    recorded, found = lines(tracked[0]), rows(folder)
    assert [row["_step"] for row in found] == list(range(17))
    for entry, row in zip(recorded, found):
        assert row["loss"] == pytest.approx(entry["loss"]) and row["global_step"] == entry["global_step"]
        assert row["time/forward"] == entry["time_shares"]["forward"]
    assert "saliency/0.5" in found[1] and found[3]["swapped"] == recorded[3]["swapped"]
    for name in ("score/UA", "score/paraphrased/UA"):
        assert [row["_step"] for row in found if name in row] == [0, 8, 16]
    captions = [row["samples.caption"] for row in found if "samples.caption" in row]
    assert (
        captions == ["before", "after-00", "after-01"]
        and len(list((folder / "files" / "media" / "images").glob("*.png"))) == 3
    )


def test_wandb_ends_with_the_score_table_the_summary_and_the_model_by_reference(tracked):
    run, _ = tracked
    (folder,) = offline_runs(run)
    found, report = records(folder), json.loads((run / "report" / "report.json").read_text())
    (about,) = of(found, "run")
    assert (
        about["run_id"] == (run / "wandb" / "run-id").read_text()
        and about["run_group"] == "a-sweep"
        and about["tags"] == ["dm_cal", "sd15"]
    )
    assert about["config"]["update"]["model"]["path"] == "${oc.env:MODELS}/sd15"
    (table,) = (folder / "files" / "media" / "table").glob("*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["stage", *SCORES, *(f"{name}, paraphrased" for name in SCORES)]
    assert [row[0] for row in table["data"]] == ["before", "after bird", "after boat"]
    assert table["data"][2][5:] == pytest.approx([report["after"]["paraphrased"][name] for name in SCORES])
    summary = {key: value for record in of(found, "summary") for key, value in record["update"].items()}
    assert summary["H"] == pytest.approx(harmonic(report["after"]))
    assert {name: summary[name] for name in ("UA", "IRA", "CRA", "SA")} == pytest.approx(
        {n: report["after"][n] for n in ("UA", "IRA", "CRA", "SA")}
    )
    (model,) = [artifact for artifact in of(found, "artifact") if artifact["type"] == "model"]
    entries = {entry["path"]: entry for entry in model["manifest"]["contents"]}
    weights = entries["model/unet/diffusion_pytorch_model.safetensors"]
    assert (
        weights["ref"] == (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").as_uri()
        and weights["digest"]
    )
    assert not list(folder.rglob("*.safetensors"))  # by reference: no copy
    assert [record["exit_code"] for record in of(found, "exit")] == [0]


def test_tensorboard_holds_every_step_and_the_samples(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked[0] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(16))
    assert [event.step for event in events.Scalars("score/UA")] == [0, 8, 16] and [
        event.step for event in events.Images("samples")
    ] == [0, 8, 16]
    assert events.Scalars("loss/forget")[-1].value == pytest.approx(lines(tracked[0])[-1]["terms"]["forget"])


def test_tensorboard_holds_the_scores_of_paraphrased_prompts_and_the_settings_beside_the_final_scores(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events, after = EventAccumulator(str(tracked[0] / "tensorboard")), read_report(tracked[0])["after"]
    events.Reload()
    assert events.Scalars("score/paraphrased/IRA")[-1].value == pytest.approx(after["paraphrased"]["IRA"])
    assert not {"steps", "sha256"} & set(events.Tags()["scalars"])
    found = [HParamsPluginData.FromString(content) for content in events.PluginTagToContent("hparams").values()]
    (start,) = [one.session_start_info for one in found if one.HasField("session_start_info")]
    (experiment,) = [one.experiment for one in found if one.HasField("experiment")]
    assert start.hparams["train.lr"].number_value == 1e-3 and start.hparams["method.name"].string_value == "dm_cal"
    assert {metric.name.tag for metric in experiment.metric_infos} >= {"score/UA", "score/paraphrased/UA"}


def test_no_file_and_no_output_holds_secrets_or_values_of_the_environment(tracked):
    run, printed = tracked
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"config.yaml", "manifest.json", "report.html", "README.md", "metrics.jsonl", "log.txt"} <= {
        file.name for file in files
    }
    assert any(file.suffix == ".wandb" and file.stat().st_size > 10_000 for file in files)
    for secret in (CANARY, KEY, TOKEN):
        assert [file for file in files if secret.encode() in file.read_bytes()] == [] and secret not in printed
    assert "path: ${oc.env:MODELS}/sd15" in (run / "config.yaml").read_text()


REFUSED = {
    "track.name=${oc.env:MODELS}": "track.name",
    "train.lr=${oc.env:MODELS}": "train.lr",
    "concepts=[{target: cat, superclass: animal, prompts: ['a {concept} ${oc.env:MODELS}']}]": "concepts[0].prompts[0]",
    "method.note=${oc.env:MODELS}": "method.note",
    "track.group=${model.path}": "track.group",
    "track.group=${oc.decode:${oc.env:MODELS}}": "are resolved",
    "track.group='\\${oc.env:MODELS}'": "are resolved",
    "track.group=${own.resolver:x}": "are resolved",
}


@pytest.mark.parametrize("override", REFUSED, ids=str)
def test_a_variable_is_refused_in_a_key_whose_value_is_written(override, monkeypatch):
    monkeypatch.setenv("MODELS", CANARY)
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.path=${oc.env:MODELS}", override])
    assert REFUSED[override] in str(caught.value) and CANARY not in str(caught.value)


def test_a_path_from_the_environment_is_used_but_written_as_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELS", CANARY)
    config = load_config(
        None,
        [
            "model.path=${oc.env:MODELS}/sd15",
            "prepare.images=${model.path}/mine",
            "run.folder=${oc.env:NO_SUCH,runs/x}",
        ],
    )
    assert (config.model.path, config.prepare.images, config.run.folder) == (
        f"{CANARY}/sd15",
        f"{CANARY}/sd15/mine",
        "runs/x",
    )
    assert CANARY not in to_yaml(config) and "images: ${oc.env:MODELS}/sd15/mine" in to_yaml(config)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run_starts(name, monkeypatch, tmp_path):
    from importlib.metadata import PackageNotFoundError, distribution

    import sculpt_dist.track.tracker

    def missing(package: str):
        if package == name:
            raise PackageNotFoundError(package)
        return distribution(package)

    monkeypatch.setattr(sculpt_dist.track.tracker, "distribution", missing)
    config = load_config(
        None, ["concepts=[{target: cat, superclass: animal}]", f"track.{name}=true", f"run.folder={tmp_path / 'run'}"]
    )
    with pytest.raises(ConfigError, match=rf"track.{name}=true: .* pip install 'sculpt-dist\[{name}\]'"):
        run_sequence(config)
    assert not (tmp_path / "run").exists()


MEMORY = """
import json
from sculpt_dist.track.sinks import base

class Sink(base.Sink):
    replays = True
    def __init__(self, track, values, folder, step):
        self.file, self.found = folder / "memory.json", [track.project, values["method"]["name"], step]
    def log(self, entry):
        self.found.append(entry["global_step"])
    def stage(self, step, stage, scores, picture): ...
    def finish(self, step, report, model): ...
    def close(self, outcome):
        self.file.write_text(json.dumps([*self.found, outcome]))
"""


def test_a_tracker_is_one_new_file_that_the_configuration_names(monkeypatch, tmp_path):
    import sculpt_dist.track.sinks

    (tmp_path / "memory.py").write_text(MEMORY)
    monkeypatch.setattr(sculpt_dist.track.sinks, "__path__", [*sculpt_dist.track.sinks.__path__, str(tmp_path)])
    config = load_config(None, ["track.sinks=[memory, memory]", "evaluate.enabled=false"])
    check_tracking(config.track)
    for step in range(2):
        with Tracker(config.track, plain_values(config), tmp_path, True) as tracker:
            tracker.start(0, step, step)
            tracker.log({"concept": 0, "step": step, "global_step": step, "loss": 1.0})
    assert json.loads((tmp_path / "memory.json").read_text()) == [None, "dm_cal", 1, 0, 1, "done"]
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1]


def test_the_project_is_that_of_the_key_then_of_the_environment_then_ours(monkeypatch):
    from sculpt_dist.track.sinks.wandb import project_name

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert project_name(load_config(None, []).track) == "sculpt-dist"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert project_name(load_config(None, []).track) == "theirs"
    assert project_name(load_config(None, ["track.project=mine"]).track) == "mine"


def test_an_unknown_tracker_is_refused_with_the_names_that_exist():
    with pytest.raises(ConfigError, match="track.sinks=memory: .* There are: jsonl, tensorboard, usage, wandb"):
        check_tracking(TrackConfig(sinks=["memory"]))


@pytest.mark.slow
def test_a_killed_run_resumes_under_the_same_wandb_id_and_records_each_step_once(canvas_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    arguments = [
        "unlearn",
        canvas_config,
        *SMALL,
        *LONGER,
        "track.wandb=true",
        "track.tensorboard=true",
        f"run.folder={folder}",
    ]
    started = Ranks(1, "-m", "sculpt_dist", *arguments, output=tmp_path / "out.txt")
    wait_for_step(folder, started, 1, 4)
    os.kill(started.pids[0], signal.SIGKILL)
    assert started.wait(60) == [-signal.SIGKILL]
    with (folder / "metrics.jsonl").open("a") as file:  # a step after the last checkpoint, and a partial line
        file.write(
            json.dumps(lines(folder)[-1] | {"step": 31, "global_step": 63, "loss": 99.0}) + '\n{"concept": 1, "st'
        )
    before = lines_of_the_first_concept(folder)
    sculpt(*arguments)
    recorded = lines(folder)
    assert [(entry["concept"], entry["step"]) for entry in recorded] == [(c, s) for c in range(2) for s in range(32)]
    assert recorded[:32] == before and all(entry["loss"] < 99 for entry in recorded)
    first, second = offline_runs(folder)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (folder / "wandb" / "run-id").read_text()
    found = [row for row in rows(second) if "loss" in row]
    assert [row["_step"] for row in found] == list(range(64))  # the newest folder holds the whole run
    assert [row["loss"] for row in found] == pytest.approx([entry["loss"] for entry in recorded])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(64))


def lines_of_the_first_concept(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:32]]


def children(pid: int, name: str) -> list[int]:
    """Ids of the child processes of `pid` with this name."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        text = status.read_text() if status.exists() else ""
        if f"PPid:\t{pid}\n" in text and f"Name:\t{name}" in text:
            found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="finds W&B's process in /proc")
def test_the_training_survives_the_death_of_wandbs_service(canvas_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    arguments = ["unlearn", canvas_config, *SMALL, *LONGER, "track.wandb=true", f"run.folder={folder}"]
    started = Ranks(1, "-m", "sculpt_dist", *arguments, output=tmp_path / "out.txt")
    wait_for_step(folder, started, 0, 4)
    (core,) = children(started.pids[0], "wandb-core")
    os.kill(core, signal.SIGKILL)
    codes, printed = started.wait(200), (tmp_path / "out.txt").read_text()
    assert codes == [0], printed
    assert (
        printed.count("W&B failed and is off for the rest of this session") == 1
        and len(lines(folder)) == 64
        and (folder / "model").is_dir()
    )


ONE_STEP = """
import faulthandler, sys, time
from pathlib import Path
faulthandler.dump_traceback_later(90, exit=True)  # where W&B hangs, if it does
from sculpt_dist.config.load import load_config, plain_values
from sculpt_dist.track import Tracker
config = load_config(None, ["track.wandb=true", "evaluate.enabled=false"])
began = time.monotonic()
with Tracker(config.track, plain_values(config), Path(sys.argv[1]), True) as tracker:
    tracker.start()
    print("seconds", time.monotonic() - began)
    tracker.log({"concept": 0, "step": 0, "global_step": 0, "loss": 1.0})
"""


def track_one_step(folder: Path, **environment: str) -> tuple[str, float]:
    """The output of a process that tracks one step, and the seconds that the start of the trackers took."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP, str(folder)],
        env=rank_environment() | {"WANDB_API_KEY": KEY, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(folder)) == 1
    return done.stdout, float(done.stdout.partition("seconds ")[2].split()[0])


class WantsAnotherKey(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.two_ranks
def test_a_run_is_offline_if_the_server_refuses_the_key(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WantsAnotherKey)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    printed, seconds = track_one_step(
        tmp_path / "run", WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", WANDB_MODE="online"
    )
    server.shutdown()
    assert seconds <= 10 and "W&B is offline for this run" in printed and "401" in printed and KEY not in printed
    assert [row["loss"] for row in rows(offline_runs(tmp_path / "run")[0])] == [1.0]


@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_without_a_server_wandb_goes_offline_within_ten_seconds_and_reports_it(server, tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1] if server == "is silent" else 9
        printed, seconds = track_one_step(
            tmp_path / "run", WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_MODE="online"
        )
    assert seconds <= 10 and "W&B is offline for this run" in printed and f"127.0.0.1:{port}" in printed
    (folder,) = offline_runs(tmp_path / "run")
    assert [row["loss"] for row in rows(folder)] == [1.0]
    assert "W&B is offline for this run" in (tmp_path / "run" / "log.txt").read_text()


def test_wandb_mode_disabled_disables_wandb(tmp_path):
    printed, _ = track_one_step(tmp_path / "run", WANDB_MODE="disabled")
    assert "W&B" not in printed and not offline_runs(tmp_path / "run")


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "stage"), [(2, 3), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(1, 0, marks=pytest.mark.slow)]
)
def test_saliency_quantiles_and_update_norm_are_correct_over_shards(ranks, stage):
    printed = launch(ranks, str(PROJECT / "tests" / "workers" / "spread.py"), str(stage))
    assert printed.count("spread is right") == ranks
