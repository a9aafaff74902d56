"""The commands about the embedded worlds: what is in them, and how their models are trained."""

from __future__ import annotations

from pathlib import Path

import typer

canvas_app = typer.Typer(help="The drawn world: what is in it, and its tiny models.", no_args_is_help=True)
gallery_app = typer.Typer(help="The world of real pictures: what is in it, and its models.", no_args_is_help=True)

ARCH = typer.Option("sd15", help="Kind of model to train.")
SEED = typer.Option(0, help="Seed of everything random.")
SUPERCLASS = typer.Argument("", help="Only the objects of this superclass.")


@canvas_app.command("build")
def canvas_build(
    arch: str = ARCH,
    output: Path = typer.Option(Path("runs/canvas"), help="Folder for the model and the classifier."),
    seed: int = SEED,
    without: str | None = typer.Option(None, help="An object that it never sees: a control for attacks."),
) -> None:
    """Train a tiny model on the drawn world, and report how well its samples are recognised."""
    from sculpt_dist.worlds.pretrain import build

    build("canvas", arch, output, seed, without=without)


@canvas_app.command("list")
def canvas_list(superclass: str = SUPERCLASS) -> None:
    """List the styles, the superclasses and their objects."""
    _list("canvas", superclass)


@gallery_app.command("build")
def gallery_build(
    sets: Path = typer.Option(
        ..., help="Folder with six unpacked npm packages: noto, noto-v1, twemoji, fluent-emoji, ..."
    ),
    arch: str = ARCH,
    output: Path = typer.Option(Path("runs/gallery"), help="Folder for the model and the classifiers."),
    seed: int = SEED,
) -> None:
    """Train a model on the gallery's pictures; takes hours, and goes on where it was when it is called again."""
    from sculpt_dist.worlds.gallery.sets import other_versions
    from sculpt_dist.worlds.pretrain import build

    for difference in other_versions(sets):
        typer.echo(f"warning: {difference}: the pictures may differ from those of the shipped models", err=True)
    build("gallery", arch, output, seed, sets)


@gallery_app.command("list")
def gallery_list(superclass: str = SUPERCLASS) -> None:
    """List the styles, the superclasses and their objects."""
    _list("gallery", superclass)


def _list(name: str, superclass: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from sculpt_dist.core.errors import ConfigError
    from sculpt_dist.worlds.find import world

    found = world(name)
    if superclass and superclass not in found.superclasses:
        raise ConfigError(f"{superclass}: no superclass of the {name}. There are: {', '.join(found.superclasses)}.")
    table = Table("superclass", "objects")
    for known, members in found.superclasses.items():
        if superclass in ("", known):
            table.add_row(known, ", ".join(members))
    Console().print(table)
    Console().print(f"styles: {', '.join(found.styles)}", highlight=False)
