"""The commands of a run and of its stages, and those that use its result."""

from __future__ import annotations

from pathlib import Path

import typer

from sculpt_dist.cli.options import CONFIG, OVERRIDES, is_first, load
from sculpt_dist.core.signals import catch_early_signals

FRESH = typer.Option(False, "--fresh", help="Start over: discard what the run folder holds, except drawn samples.")
OVERRIDE = typer.Option(
    False, "--override", help="Continue although the configuration has changed since; the changes are shown."
)


def unlearn(
    config: Path = CONFIG, overrides: list[str] | None = OVERRIDES, fresh: bool = FRESH, override: bool = OVERRIDE
) -> None:
    """Forget the concepts of CONFIG one by one: prepare, train, score, export, report. Resumes what was stopped."""
    catch_early_signals()
    flags = ["run.fresh=true"] * fresh + ["run.override=true"] * override
    loaded = load(config, [*(overrides or []), *flags])
    from sculpt_dist.cli.console import print_run
    from sculpt_dist.run.sequence import run_sequence

    run = run_sequence(loaded)
    if is_first():
        print_run(run.folder, run.report)


def prepare(config: Path = CONFIG, overrides: list[str] | None = OVERRIDES) -> None:
    """Draw and store the training samples of CONFIG, and stop there; unlearn then starts at once."""
    catch_early_signals()
    loaded = load(config, overrides)
    from sculpt_dist.run.stages import prepare_only

    folder = prepare_only(loaded)
    if is_first():
        print(f"samples are in {folder}")


def evaluate(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    model: Path | None = typer.Option(None, help="Model folder to score; default: the run's export."),
    output: Path | None = typer.Option(None, help="Folder for scores.json and images; default: RUN/evaluation/model."),
) -> None:
    """Score a model folder on the concepts of CONFIG."""
    catch_early_signals()
    loaded = load(config, overrides)
    from sculpt_dist.run.stages import evaluate_only

    scores, where = evaluate_only(loaded, model, output)
    if is_first():
        for kind in ("plain", "paraphrased", "witness"):
            if part := scores.get(kind):
                named = ((name, part[name]) for name in ("UA", "IRA", "CRA", "SA"))
                print(kind, *(f"{name} {value:.3f}" for name, value in named if value is not None))
        print(f"scores: {where / 'scores.json'}")


def attack(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    model: Path | None = typer.Option(None, help="Model folder to attack; default: the run's export."),
    original: Path | None = typer.Option(None, help="The model from before; default: that of CONFIG."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: RUN/attacks."),
) -> None:
    """Try to bring the concepts of CONFIG back; goes on where it was stopped."""
    catch_early_signals()
    loaded = load(config, overrides)
    from sculpt_dist.cli.console import print_attacks
    from sculpt_dist.run.attacking import attack_only

    found, where = attack_only(loaded, model, original, output)
    if is_first():
        print_attacks(found)
        print(f"attacks: {where / 'attacks.json'}")


def export(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    form: str = typer.Option(
        "folder",
        "--as",
        help="folder; single: one .safetensors file for ComfyUI and A1111; delta: the changed tensors; "
        "lora: an adapter for diffusers and peft; kohya: one for ComfyUI and A1111.",
    ),
    output: Path | None = typer.Option(None, help="File to write (not for a folder); default: in the run folder."),
    rank: int = typer.Option(16, help="Rank of the adapter, for lora and kohya."),
) -> None:
    """Write the model of CONFIG's run from its newest checkpoint, finished or not."""
    loaded = load(config, overrides)
    from sculpt_dist.run.stages import export_only

    model = export_only(loaded, form, output, rank)
    if is_first():
        if form in ("lora", "kohya"):
            from sculpt_dist.backbones.formats.adapter import read_lost

            print(read_lost(model))
        print(f"model: {model}")


def apply(
    delta: Path = typer.Argument(help="A file that export --as delta wrote."),
    model: Path = typer.Argument(help="The pipeline folder to change; it stays as it is."),
    output: Path = typer.Argument(help="The new pipeline folder."),
    remove: bool = typer.Option(False, help="Take the delta out again; the base's weights return bit for bit."),
) -> None:
    """Apply a delta to the base model that it was made from."""
    from sculpt_dist.backbones.formats.delta import apply_delta

    apply_delta(model, delta, output, remove)
    print(f"model: {output}")


def merge(
    model: Path = typer.Argument(help="The pipeline folder that the deltas were made from."),
    output: Path = typer.Argument(help="The new pipeline folder."),
    deltas: list[Path] = typer.Argument(help="Two or more files that export --as delta wrote."),
    how: str = typer.Option("ties", help="mean, task (their sum) or ties."),
    density: float = typer.Option(0.2, help="ties: the share of each delta's weights that count."),
    scale: float = typer.Option(1.0, help="Factor on the merged change."),
) -> None:
    """Merge the deltas of several runs into one model."""
    from sculpt_dist.backbones.formats.merging import merge_deltas

    number = merge_deltas(model, deltas, output, how, density, scale)
    print(f"model: {output} ({number} tensors changed)")


def report(folder: Path = typer.Argument(help="A run folder.")) -> None:
    """Rewrite the report of a run folder."""
    from sculpt_dist.core.errors import RunFolderError
    from sculpt_dist.report.report import write_report

    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"{folder}: is not a run folder (no config.yaml)")
    print(f"report: {write_report(folder)}")


def audit(
    folder: Path = typer.Argument(help="A finished run folder."),
    output: Path | None = typer.Option(None, help="Folder or .zip to write; default: RUN/audit."),
    sign: Path | None = typer.Option(None, help="Private key with which ssh-keygen signs the list of checksums."),
) -> None:
    """Write what someone needs to check the claims of a run: card, scores, attacks, checksums."""
    from sculpt_dist.run.audit import write_audit

    print(f"audit bundle: {write_audit(folder, output, sign)}")


def verify(
    place: Path = typer.Argument(help="A run folder, a model folder, a delta file or an audit bundle."),
    signers: Path | None = typer.Option(None, help="Allowed signers of an audit bundle, as ssh-keygen reads them."),
    images: int = typer.Option(0, min=0, help="Images of an audit bundle to draw and judge again; needs --model."),
    model: Path | None = typer.Option(None, help="The model folder that an audit bundle is about."),
) -> None:
    """Compare the files of a run, model, delta or bundle with their checksums; changes nothing."""
    from sculpt_dist.run.verify import verify_place

    found = verify_place(place)
    _print_bundle(place, signers, images, model)
    print(f"{found.num_files:,} file{'s are as they were' if found.num_files > 1 else ' is as it was'} written")
    if found.without:
        named = ", ".join(str(file) for file in found.without[:5])
        more = f" and {len(found.without) - 5:,} more" if len(found.without) > 5 else ""
        print(f"not compared, for lack of a checksum: {named}{more}")


def _print_bundle(place: Path, signers: Path | None, images: int, model: Path | None) -> None:
    """Check and print what only an audit bundle has: its signature, and verdicts that can be reproduced."""
    from sculpt_dist.core.errors import ConfigError
    from sculpt_dist.run.audit_files import check_signature, is_bundle

    if not is_bundle(place):
        if signers is not None or images:
            raise ConfigError(f"{place}: --signers and --images are for audit bundles")
        return
    if (who := check_signature(place, signers)) is not None:
        print(who)
    if images:
        from sculpt_dist.run.rescore import rescore

        if model is None:
            raise ConfigError("--images: needs --model, the folder that the bundle is about")
        same, drawn = rescore(place, model, images)
        print(f"{same:,} of {drawn:,} images drawn again are judged as recorded")


def submit(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    nodes: int = typer.Option(1, help="Nodes of the job."),
    gpus_per_node: int = typer.Option(0, help="GPUs, and ranks, of each node; 0: one rank per node, on the CPU."),
    time: str | None = typer.Option(
        None, help="Time limit in Slurm's format, such as 4:00:00 or 2-12. At its end the job is requeued."
    ),
    partition: str | None = typer.Option(None, help="Slurm partition."),
    option: list[str] = typer.Option([], help="Further option of sbatch, such as account=vision; repeatable."),
    launch: str = typer.Option("srun", help="srun: one task per rank; torchrun: one launcher per node."),
    show: bool = typer.Option(False, "--print", help="Print the script instead of sending it."),
) -> None:
    """Check CONFIG and send it to Slurm as a job that is requeued until it is done."""
    from sculpt_dist.slurm.submit import Request, compose, send

    request = Request(config, tuple(overrides or ()), nodes, gpus_per_node, time, partition, tuple(option), launch)
    script = compose(request)
    print(script if show else f"job: {send(script)}", end="" if show else "\n")
