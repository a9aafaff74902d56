"""The command line. It starts quickly, because commands import heavy libraries only when they run."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
import time
from importlib.metadata import version
from types import TracebackType
from typing import NoReturn

import typer

from sculpt_dist.cli import experiments, plan, reference, run, worlds
from sculpt_dist.cli.bench import bench_app
from sculpt_dist.cli.options import is_first, num_ranks
from sculpt_dist.core.errors import LaunchError, NonFiniteError, SculptError, StopRequested, WriteError
from sculpt_dist.core.messages import redacted

DONE, CRASHED, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

REFUSED_BY_DISK = (  # what a user mends: room, permissions, a file where a folder should be
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)

OF_ONE_RANK = (LaunchError, NonFiniteError, WriteError)

app = typer.Typer(
    help="Make a text-to-image diffusion model forget concepts.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sculpt-dist {version('sculpt-dist')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Make a text-to-image diffusion model forget concepts."""


COMMANDS = {
    "A run and its stages": (
        run.unlearn,
        run.prepare,
        run.evaluate,
        run.attack,
        run.export,
        run.report,
        run.audit,
        run.verify,
        run.apply,
        run.merge,
    ),
    "Before a run": (plan.check, plan.plan, plan.folder, run.submit),
    "Many runs": (experiments.compare, experiments.sweep, experiments.localize),
    "What there is": (
        reference.config,
        reference.configs,
        reference.methods,
        reference.models,
        reference.attacks,
        reference.metrics,
    ),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(bench_app, name="bench", rich_help_panel="Tools")
app.add_typer(worlds.canvas_app, name="canvas", rich_help_panel="Tools")
app.add_typer(worlds.gallery_app, name="gallery", rich_help_panel="Tools")


def main() -> NoReturn:
    """The entry point. Exit codes: 0 done, 75 stopped for requeue, 2 the user's error, 130 interrupted, 1 crash."""
    sys.excepthook = _crash
    _use_utf8()
    try:
        run_command()
    except SculptError as error:
        if is_first() or isinstance(error, OF_ONE_RANK):  # other errors are the same on every rank
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when one ends, and the first rank prints the message
        _end(USER_ERROR)
    except StopRequested as stop:
        if is_first():
            print(stop, file=sys.stderr, flush=True)
        _end(STOPPED)
    except OSError as error:
        if error.errno not in REFUSED_BY_DISK:
            raise
        place = redacted(str(error.filename or "the run folder"))
        print(f"WriteError: {place}: {error.strerror}; run the same command again once that is mended", file=sys.stderr)
        _end(USER_ERROR)
    except KeyboardInterrupt:  # before the run listens, or for the second time
        print("interrupted", file=sys.stderr, flush=True)
        _end(INTERRUPTED)
    except SystemExit as ended:  # typer's own way to end
        _end(int(ended.code or DONE))
    _end(DONE)


def _use_utf8() -> None:
    """Names and prompts are UTF-8 whatever the locale: start again in Python's UTF-8 mode where this is another one.

    What cannot be shown is escaped.
    """
    if sys.getfilesystemencoding() != "utf-8" and sys.platform != "win32":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "sculpt_dist", *sys.argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # one that was replaced beneath Python
                stream.reconfigure(errors="backslashreplace")


def run_command() -> None:
    """Run the command that the arguments name. `app()` would replace our hook for exceptions by typer's."""
    typer.main.get_command(app)()


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr = sys.__stderr__  # torch wraps it, collects what is printed, and would not get to print it
    sys.__excepthook__(kind, error, trace)
    if num_ranks() > 1:
        _end(CRASHED)


def _end(code: int) -> NoReturn:
    """End with this exit code; one of several ranks does so without tearing Python down.

    gloo's threads may turn the teardown into an abort (pytorch issue 190489): references to the process group that
    DeepSpeed holds outlive `destroy_process_group`.
    """
    if num_ranks() > 1:
        if code != CRASHED:  # leaving a group with a dead rank may wait for it
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
