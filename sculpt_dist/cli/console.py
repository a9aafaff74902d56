"""The results of commands, printed as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sculpt_dist.core.messages import shortlist

MOST_ROWS = 100


def print_run(folder: Path, report: dict[str, Any]) -> None:
    """Print the scores of a finished run and the paths of its results."""
    from sculpt_dist.report import seen_counts

    concepts = report["concepts"]
    table = Table(title=f"forgotten: {', '.join(shortlist([concept['target'] for concept in concepts]))}")
    for heading in ("", "UA", "IRA", "CRA", "SA"):
        table.add_column(heading)

    def row(label: str, scores: dict | None) -> None:
        cells = [
            "-" if scores is None or scores.get(n) is None else f"{scores[n]:.3f}" for n in ("UA", "IRA", "CRA", "SA")
        ]
        table.add_row(label, *cells)

    if report["after"]["UA"] is not None:
        row("before", report["before"])
        scored = [concept for concept in concepts if concept["UA"] is not None]
        for concept in scored if len(scored) <= MOST_ROWS else scored[-1:]:
            row(f"after {concept['target']}", concept)
        for kind in ("paraphrased", "witness"):
            if (report["after"].get(kind) or {}).get("UA") is not None:
                row(f"after, {kind}", report["after"][kind])
        Console().print(table)
        for name, now, images, then in seen_counts(report)[:MOST_ROWS]:
            print(f"{name} is seen in {now} of {images} images" + ("" if then is None else f", {then} before"))
    print(f"model:  {folder / 'model'}\nreport: {folder / 'report' / 'report.html'}")


def print_attacks(found: dict[str, Any]) -> None:
    """Print the rates of attacks, as `run.attacking.attack_model` returns them."""
    title = f"share of prompts for which the concept is seen ({found['budget']} budget)"
    table = Table(title=title, box=SIMPLE)
    has_witness = found["judges"].get("witness") is not None
    for heading in ("attack", "pre", "post", "95 %", "best", "mean", "passes", *(["judged by"] * has_witness)):
        table.add_column(heading, no_wrap=True)
    console = Console()
    for name, rates in found["attacks"].items():
        judged, interval = rates[rates["judged_by"]], rates["post_ci95"]
        table.add_row(
            name,
            *(_share(value) for value in (rates["pre"], rates["post"])),
            "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}",
            *(_share(judged[key]) for key in ("alone", "mean")),
            f"{rates['passes']:,.0f}",
            *([rates["judged_by"]] * has_witness),
        )
    console.print(table)
    for name, rates in found["attacks"].items():
        beside = {**rates[rates["judged_by"]].get("variants", {}), **rates["scores"]}
        if beside:
            console.print(
                f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in beside.items()), highlight=False
            )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_check(found: dict[str, Any]) -> None:
    """Print the result of `planning.check_run`."""
    table = Table(show_header=False)
    rows = {
        "net": f"{found['net']}, {found['parameters']:,} parameters",
        "stored weights": "fit" if found["compared_weights"] else "not there, so not compared",
        "a rank's latents": found["latents"],
        "a rank's tokens": found["tokens"],
        "image": found["image"],
    }
    if "trainable" in found:  # not of a closed form
        rows |= {
            "trainable": f"{found['trainable']:,} in {found['matrices']} matrices",
            "a rank's optimizer shard": f"{found['shard']:,} elements",
            "micro-batch of a rank": found["micro_batch"],
            "steps per concept": found["steps"],
        }
    for label, value in rows.items():
        table.add_row(label, str(value))
    Console().print(table)


def print_plan(found: dict[str, Any]) -> None:
    """Print the result of `planning.plan_run`."""
    micro = f"micro-batch {found['micro_batch']} x {found['accumulate']}"
    trained = f"{found['trainable']:,} of {found['parameters']:,} parameters train"
    Console().print(f"{found['net']}: {trained}; stage {found['stage']}, {micro}")
    parts = Table(title=f"GB of each of {found['ranks']} ranks at the fullest moment of a step")
    for name, size in [
        *found["bytes"].items(),
        ("all", found["peak"]),
        ("while drawing and scoring", found["drawing"]),
    ]:
        parts.add_row(name, f"{size / 1e9:.2f}")
    Console().print(parts)
    timed = "step_seconds" in found
    table = Table(title="the same micro-batch on more ranks")
    for heading in ("ranks", "GB", "fits", "GB sent per step", *(("s per step", "samples/s") if timed else ())):
        table.add_column(heading, justify="right")
    for row in found["table"]:
        cells = [f"{row['ranks']:,}", f"{max(row['peak'], row['drawing']) / 1e9:.2f}", "yes" if row["fits"] else "no"]
        cells.append(f"{sum(row['payload'].values()) / 1e9:.3f}")
        table.add_row(*cells, *((f"{row['step_seconds']:.3g}", f"{row['samples_per_second']:.3g}") if timed else ()))
    Console().print(table)
    _print_whole_run(found["run"])
    if not timed:
        print("no times: say how fast a rank computes, with --flops or --rates")
    if "assumed" in found:
        print(f"assumed: {found['assumed']}")
    limit = f"{found['memory'] / 1e9:g} GB"
    if found["fits"]:
        print(f"fits into {limit}")
    elif found["change"] is None:
        print(f"does not fit into {limit}, whatever is changed")
    else:
        change = found["change"]
        changes = " ".join(
            [*change["overrides"], *([f"--ranks {change['ranks']}"] if change["ranks"] != found["ranks"] else [])]
        )
        print(f"does not fit into {limit}; with {changes} it does, at {change['peak'] / 1e9:.2f} GB")


def _print_whole_run(run: dict[str, Any]) -> None:
    """Print where the time of a whole run goes, and how many ranks each of its parts can use."""
    counts, rates, timed = run["counts"], run["rates"], run["rates"] is not None
    table = Table(title="the whole run" + (": minutes of each part" if timed else ""))
    parts = list(run["table"][0]["seconds"]) if timed else []
    for heading in ("ranks", *parts, *(["all"] if timed else []), "useful: drawing", "training", "scoring"):
        table.add_column(heading, justify="right")
    for row in run["table"]:
        seconds = [*row["seconds"].values(), row["total_seconds"]] if timed else []
        useful = [row["useful"][part] for part in ("drawing", "training", "scoring")]
        table.add_row(
            f"{row['ranks']:,}", *(f"{value / 60:.3g}" for value in seconds), *(f"{number:,}" for number in useful)
        )
    Console().print(table)
    print(
        f"{counts['concepts']:,} concepts: {counts['drawn_batches']:,} batches to draw, {counts['steps']:,} steps, and "
        f"{counts['scored_batches']:,} batches to score in {counts['scored_stages']:,} stages"
    )
    most = run["table"][-1]
    if most["useful"]["training"] < most["ranks"]:
        print(
            f"train.batch={counts['samples_per_step']}: a rank trains at least one sample, so that at most "
            f"{most['useful']['training']} ranks train, and a run refuses others; raise train.batch, or give prepare, "
            "unlearn and evaluate their own numbers of ranks"
        )
    if timed:
        sampling = rates["sampling"] or rates["flops"]
        links = ", ".join(f"{kind} {value / 1e9:g}" for kind, value in rates["bandwidth"].items())
        print(
            f"computed from: {rates['flops']:.3g} operations/s, {sampling:.3g} while drawing; GB/s: {links}, files "
            f"{rates['disk'] / 1e9:g}, copies {rates['copy'] / 1e9:g}; latency {rates['latency'] * 1e6:g} us, store "
            f"{rates['store'] * 1e6:g} us, imports {rates['start']:g} s"
        )


def print_figures(found: dict[str, Any], as_json: bool) -> None:
    """Print the figures of a benchmark as a table or as one line of JSON."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
