"""The commands of `sculpt-dist bench`."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional
from typing import List, Optional

import typer

bench_app = typer.Typer(help="What things cost on this machine, at real sizes.", no_args_is_help=True)
AS_JSON = typer.Option(False, "--json", help="The last line of stdout is one JSON object.")


@bench_app.command("mask")
def bench_mask(
    preset: str = typer.Option("sd15", help="Whose matrices: sd15, sdxl or sana."),
    scope: str = typer.Option("matrix", help="matrix or global, as mask.scope."),
    weights: Optional[int] = typer.Option(None, help="At most so many weights: only the first matrices."),
    as_json: bool = AS_JSON,
) -> None:
    """Refresh and masked step on random data, against the ways of published code. On several ranks only its own figures."""
    from sculpt_dist.bench.mask import bench_mask as run
    from sculpt_dist.engine.group import Group
    from sculpt_dist.tell import print_figures

    group = Group()
    found = run(preset, scope, group, weights)
    if group.is_first:
        print_figures(found, as_json)


from pathlib import Path
from typing import List, Optional
    if group.is_first:
        print_figures(found, as_json)
