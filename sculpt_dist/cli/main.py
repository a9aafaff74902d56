"""The command line: thin, and quick to start; everything heavy is imported inside the commands."""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import typer

from sculpt_dist.cli.bench import bench_app
from sculpt_dist.cli.plan import check, folder, plan
from sculpt_dist.core.errors import ConfigError, LaunchError, NonFiniteError, SculptError, StopRequested
from sculpt_dist.core.signals import catch_early_signals

if TYPE_CHECKING:
    from sculpt_dist.config.schema import RunConfig

DONE, CRASHED, USER_ERROR, STOPPED = 0, 1, 2, 75

app = typer.Typer(
    help="Make a text-to-image diffusion model forget concepts.", no_args_is_help=True, pretty_exceptions_enable=False
)
canvas_app = typer.Typer(
    help="The embedded benchmark: a drawn world and tiny models trained on it.", no_args_is_help=True
)
app.add_typer(canvas_app, name="canvas")
app.add_typer(bench_app, name="bench")
app.command()(check)
app.command()(plan)
app.command()(folder)

CONFIG = typer.Argument(help="A yaml file, for example configs/canvas/dm_cal.yaml.")
OVERRIDES = typer.Argument(None, help="key=value, for example train.lr=1e-5.")


@app.command()
def unlearn(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    fresh: bool = typer.Option(
        False, "--fresh", help="Start over: discard what the run folder holds, but for drawn samples."
    ),
    override: bool = typer.Option(
        False, "--override", help="Go on although the configuration was changed since; what changed is shown."
    ),
) -> None:
    """Forget the concepts of CONFIG, one after another; prepares, scores, exports and reports. Called again it goes on."""
    catch_early_signals()
    from sculpt_dist.cli.console import print_run
    from sculpt_dist.run.sequence import run_sequence

    flags = ["run.fresh=true"] * fresh + ["run.override=true"] * override
    run = run_sequence(_load(config, [*(overrides or []), *flags]))
    if _is_first():
        print_run(run.folder, run.report)


@app.command()
def submit(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    nodes: int = typer.Option(1, help="Nodes of the job."),
    gpus_per_node: int = typer.Option(0, help="GPUs, and ranks, of each node; 0: one rank per node, on the CPU."),
    time: str | None = typer.Option(
        None, help="Time limit, as Slurm writes it: 4:00:00 or 2-12. At its end the job is requeued."
    ),
    partition: str | None = typer.Option(None, help="Slurm partition."),
    option: list[str] = typer.Option(
        [], help="A further option of sbatch, such as account=vision; may be given again."
    ),
    launch: str = typer.Option("srun", help="srun: one task per rank; torchrun: one launcher per node."),
    show: bool = typer.Option(False, "--print", help="Print the script instead of sending it."),
) -> None:
    """Send CONFIG to Slurm as a job that is requeued until it is done; checks the configuration first."""
    from sculpt_dist.slurm.submit import Request, compose, send

    request = Request(config, tuple(overrides or ()), nodes, gpus_per_node, time, partition, tuple(option), launch)
    script = compose(request)
    print(script if show else f"job: {send(script)}", end="" if show else "\n")


@app.command()
def prepare(config: Path = CONFIG, overrides: list[str] | None = OVERRIDES) -> None:
    """Only draw and store the training samples of CONFIG; unlearn then starts at once."""
    catch_early_signals()
    from sculpt_dist.run.stages import prepare_only

    folder = prepare_only(_load(config, overrides))
    if _is_first():
        print(f"samples are in {folder}")


@app.command()
def evaluate(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    model: Path | None = typer.Option(None, help="The model folder to score; default: the run's export."),
    output: Path | None = typer.Option(None, help="Where scores.json and images go; default: RUN/evaluation/model."),
) -> None:
    """Score a model folder on the concepts of CONFIG."""
    catch_early_signals()
    from sculpt_dist.run.stages import evaluate_only

    scores, where = evaluate_only(_load(config, overrides), model, output)
    if _is_first():
        for kind, part in scores.items():
            if part:
                named = ((name, part[name]) for name in ("UA", "IRA", "CRA", "SA"))
                print(kind, *(f"{name} {value:.3f}" for name, value in named if value is not None))
        print(f"scores: {where / 'scores.json'}")


@app.command()
def export(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    form: str = typer.Option(
        "folder",
        "--as",
        help="folder; single: one .safetensors file for ComfyUI and A1111; delta: the changed tensors; "
        "lora: an adapter for diffusers and peft; kohya: one for ComfyUI and A1111.",
    ),
    output: Path | None = typer.Option(None, help="The file of all but a folder; default: in the run folder."),
    rank: int = typer.Option(16, help="Of the adapter of lora and kohya."),
) -> None:
    """Write the model of CONFIG's run from its newest checkpoint, finished or not."""
    from sculpt_dist.run.stages import export_only

    model = export_only(_load(config, overrides), form, output, rank)
    if _is_first():
        if form in ("lora", "kohya"):
            from sculpt_dist.backbones.formats.adapter import read_lost

            print(read_lost(model))
        print(f"model: {model}")


@app.command()
def apply(
    delta: Path = typer.Argument(help="A file that export --as delta wrote."),
    model: Path = typer.Argument(help="The pipeline folder to change; it stays as it is."),
    output: Path = typer.Argument(help="The new pipeline folder."),
    remove: bool = typer.Option(False, help="Take the delta out again, which gives the base model back bit for bit."),
) -> None:
    """Apply a delta to the base model that it was made from."""
    from sculpt_dist.backbones.formats.delta import apply_delta

    apply_delta(model, delta, output, remove)
    print(f"model: {output}")


@app.command()
def report(folder: Path = typer.Argument(help="A run folder.")) -> None:
    """Write the report of a run folder anew."""
    from sculpt_dist.core.errors import RunFolderError
    from sculpt_dist.report.report import write_report

    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"{folder}: is no run folder (no config.yaml)")
    print(f"report: {write_report(folder)}")


@app.command()
def compare(
    config: Path = typer.Argument(help="A comparison, for example configs/compare/canvas.yaml."),
    overrides: list[str] | None = OVERRIDES,
    jobs: int = typer.Option(1, help="Cells that run at a time on this machine."),
    ranks: int = typer.Option(1, help="Processes of each cell."),
    shard: str | None = typer.Option(
        None, help="i/n: run every n-th cell from the i-th (0 on); no tables. For a job array."
    ),
    run: bool = typer.Option(True, help="Run what is missing; --no-run only writes the tables of what is done."),
) -> None:
    """Run methods x models x concept sequences x seeds, each in a run folder of its own, and write one table and one page. Goes on."""
    from sculpt_dist.experiments.compare import run_comparison

    print(f"comparison: {run_comparison(config, overrides or [], jobs, ranks, _shard(shard), run)}")


@app.command()
def localize(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    best: int = typer.Option(2, help="How many blocks to choose."),
    index: int | None = typer.Option(
        None, help="Run this block alone, as a task of a job array; call once more without it to rank."
    ),
    jobs: int = typer.Option(1, help="Blocks that run at a time on this machine."),
    ranks: int = typer.Option(1, help="Processes of each run."),
) -> None:
    """Find the blocks that erase and retain best: a short run for each, judged by its images. For methods with `blocks`, as surgun."""
    from sculpt_dist.experiments.localize import run_localization

    folder, ranked = run_localization(config, overrides or [], best, index, jobs, ranks)
    for scores in ranked:
        print(
            f"block {scores['block']}:",
            *(f"{name} {scores[name]:.3f}" for name in ("score", "UA", "IRA", "CRA") if scores[name] is not None),
        )
    if ranked:
        print(f"best: method.blocks={sorted(scores['block'] for scores in ranked[:best])}")
    print(f"runs: {folder}")


@app.command()
def sweep(
    file: Path = typer.Argument(help="A sweep in W&B's schema, for example configs/sweeps/canvas-grid.yaml."),
    overrides: list[str] | None = OVERRIDES,
    backend: str = typer.Option(
        "local", help="local: no server; with one use `wandb sweep FILE` and `wandb agent --count 1 SWEEP_ID`."
    ),
    folder: Path | None = typer.Option(None, help="Where the trials and the summary go; default: runs/sweeps/NAME."),
    seed: int = typer.Option(0, help="Of random and bayes."),
    index: int | None = typer.Option(
        None, help="Run this trial alone, as a task of a job array; call once more without it."
    ),
    jobs: int = typer.Option(1, help="Trials that run at a time on this machine."),
    ranks: int = typer.Option(1, help="Processes of each trial."),
    run: bool = typer.Option(True, help="Run what is missing; --no-run only writes the summary of what is done."),
    show: bool = typer.Option(
        False, "--print", help="With --index: print the trial's arguments, one a line, for a launcher of your own."
    ),
) -> None:
    """Run the trials of a sweep file that are not done, each in a run folder of its own, and summarise them. Goes on."""
    from sculpt_dist.experiments.sweep import run_sweep, trial_arguments

    if backend != "local":
        raise ConfigError(
            f"--backend {backend}: with W&B's server run `wandb sweep {file}`, then `wandb agent --count 1 SWEEP_ID` in each job"
        )
    if show:
        if index is None:
            raise ConfigError("--print: say of which trial, with --index")
        print("\n".join(trial_arguments(file, overrides or [], folder, seed, index)))
        return
    where = run_sweep(file, overrides or [], folder, seed, index, jobs, ranks, run)
    print(f"trials: {where / 'trials'}" if index is not None else f"sweep: {where / 'sweep.html'}")


@canvas_app.command("build")
def canvas_build(
    arch: str = typer.Option("sd15", help="Which kind of model to train."),
    output: Path = typer.Option(Path("runs/canvas"), help="Where the model folder and the classifier go."),
    seed: int = typer.Option(0, help="Of all that is random."),
) -> None:
    """Train a tiny model of a kind on the drawn world, and say how well its samples are recognised."""
    from sculpt_dist.canvas.pretrain import build_canvas

    build_canvas(arch, output, seed)


def main() -> NoReturn:
    """The entry point; exit codes: 0 done, 75 stopped for requeue, 2 the user's error, 1 crash."""
    sys.excepthook = _crash
    try:
        run_command()
    except SculptError as error:
        if _is_first() or isinstance(error, (LaunchError, NonFiniteError)):  # other errors are the same on every rank
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when the first one ends, and the message is the first rank's
        _end(USER_ERROR)
    except StopRequested as stop:
        if _is_first():
            print(stop, file=sys.stderr, flush=True)
        _end(STOPPED)
    except SystemExit as ended:  # typer's own way to end
        _end(int(ended.code or DONE))
    _end(DONE)


def run_command() -> None:
    """The command that the arguments name; not by `app()`, which puts typer's own hook for exceptions in the place of ours."""
    typer.main.get_command(app)()


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr = (
        sys.__stderr__
    )  # torch's hook around this one collects what is printed, and would never come to print it
    sys.__excepthook__(kind, error, trace)
    if _num_ranks() > 1:
        _end(CRASHED)


def _end(code: int) -> NoReturn:
    """End with this exit code; one of several ranks ends without tearing Python down, which gloo's threads may turn into an abort.

    That is pytorch issue 190489: references to the process group that DeepSpeed holds outlive `destroy_process_group`.
    """
    if _num_ranks() > 1:
        if code != CRASHED:  # leaving a group with a dead rank may wait for it
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _load(config: Path, overrides: list[str] | None) -> RunConfig:
    from sculpt_dist.config.load import load_config

    return load_config(config, overrides or [])


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit()):
        raise ConfigError(f"--shard {text}: write i/n, for example 0/4")
    return int(first), int(second)


def _is_first() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
