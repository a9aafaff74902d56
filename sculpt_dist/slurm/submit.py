"""Submits a run as a Slurm job: fills in the shipped `slurm/unlearn.sbatch`, then prints it or passes it to sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, SubmitError
from sculpt_dist.run.setup import resolve

SCRIPTS = Path(__file__).parent
WORD = r"[\w.,:@%/+=*\[\]-]*"  # a value in a line of options
TIME = r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}|UNLIMITED|INFINITE"
LAUNCHERS = ("srun", "torchrun")


@dataclass(frozen=True)
class Request:
    """What to run and where: `nodes` x max(1, `gpus_per_node`) ranks.

    `options` are further options of sbatch, `name=value` or `name`.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    time: str | None = None
    partition: str | None = None
    options: tuple[str, ...] = ()
    launch: str = "srun"

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


def compose(request: Request) -> str:
    """The script to submit. Raises ConfigError if the run cannot start on that many ranks; no model is opened."""
    if request.nodes < 1 or request.gpus_per_node < 0:
        raise ConfigError(
            f"--nodes {request.nodes} --gpus-per-node {request.gpus_per_node}: at least 1 node and 0 or more GPUs"
        )
    if request.launch not in LAUNCHERS:
        raise ConfigError(f"--launch {request.launch}: choose one of {', '.join(LAUNCHERS)}")
    resolve(load_config(request.config, request.overrides)).micro_batch(request.nodes * request.ranks_per_node)
    arguments = shlex.join(["set", "--", str(request.config), *request.overrides])
    filled = [f"export SCULPT_SLURM={shlex.quote(str(SCRIPTS))} LAUNCH={request.launch}", arguments]
    return _filled((SCRIPTS / "unlearn.sbatch").read_text(), _options(request), filled)


def send(script: str) -> str:
    """Submit a script with sbatch from the current folder and return the job's id. Raises SubmitError."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise SubmitError(
            "sbatch is not on the PATH: submit from a login node of the cluster, or print the script with --print"
        )
    done = subprocess.run([sbatch, "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]  # the name of the cluster may follow


def _options(request: Request) -> dict[str, str | None]:
    """The options of sbatch by name; None for an option without a value."""
    options: dict[str, str | None] = {"nodes": str(request.nodes), "ntasks-per-node": str(request.ranks_per_node)}
    if request.gpus_per_node:
        options["gpus-per-node"] = str(request.gpus_per_node)
    for name, value, known in (("time", request.time, TIME), ("partition", request.partition, WORD)):
        if value is not None and not re.fullmatch(known, value):
            raise ConfigError(f"--{name} {value!r}: is none that Slurm knows")
        if value is not None:
            options[name] = value
    for option in request.options:
        name, equals, value = option.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not re.fullmatch(WORD, value):
            raise ConfigError(
                f"--option {option!r}: write a long option of sbatch as name=value, for example account=vision"
            )
        options[name] = value if equals else None
    return options


def _filled(template: str, options: dict[str, str | None], body: list[str]) -> str:
    """The template with its options set to these, new options after them, and then the lines of `body`."""
    new = {name: f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()}
    lines = template.splitlines()
    named = {i: re.match(r"#SBATCH --([a-z0-9-]+)", line) for i, line in enumerate(lines)}
    last = max(i for i, match in named.items() if match)
    head = [new.pop(match[1], line) if (match := named[i]) else line for i, line in enumerate(lines[: last + 1])]
    return "\n".join([*head, *new.values(), "", *body, *lines[last + 1 :]]) + "\n"
