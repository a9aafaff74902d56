"""The architecture as a test: imports go down only, and heavy libraries stay in their place."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, rank_environment

PACKAGE = PROJECT / "sculpt_dist"
FLOORS = [  # a file imports from its own package and from lines above it
    ["types", "errors", "files", "settings", "signals"],
    ["maths", "environment", "progress"], ["config"],
    ["canvas", "data", "backbones", "engine"],
    ["methods", "metrics"],
    ["runfolder"], ["build"], ["pretrain"], ["costs", "clock"], ["prepare"], ["train"], ["check"], ["rehearsal"], ["rates"], ["plan"], ["submit"], ["asks"], ["evaluate"], ["card"], ["export"], ["figures"], ["grid"], ["report"], ["track"], ["jobs"], ["tables"], ["compare"], ["localize"], ["trials"], ["ledger"], ["summary"], ["sweep"], ["sitting"], ["sequence"], ["stages"], ["bench"],
    ["__init__"],
    ["tell"], ["cli_bench"], ["cli_plan"], ["cli"], ["__main__"],
]  # fmt: skip
HOMES = {  # library -> where it may be imported
    "deepspeed": ["engine"],
    "torch.distributed": ["engine"],
    "webdataset": ["data"],
    "diffusers": ["backbones"],
    "transformers": ["backbones", "metrics"],
    "torchmetrics": ["metrics"],
    "wandb": ["track"],
    "optuna": ["ledger"],
    "torch.utils.tensorboard": ["track"],
    "typer": ["cli", "cli_bench", "cli_plan"],
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    mine = place(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sculpt_dist" or len(parts) < 2 or parts[1] in ("__version__", "unlearn"):
            continue
        theirs = parts[1]
        assert theirs == mine or floor(theirs) < floor(mine), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_place(path):
    for name in imports(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert place(path) in homes, f"{path.name} imports {name}; its place is {homes}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_is_read_and_nothing_is_evaluated(path):
    text = path.read_text()
    for call in ("torch.load(", "pickle.load", "allow_pickle=True", "trust_remote_code=True", "WebDataset(", "eval(\"", "exec("):
        assert call not in text, f"{path.name} holds {call}"


def test_maths_knows_no_rank_device_or_configuration():
    for path in (PACKAGE / "maths").glob("*.py"):
        assert not any(name.startswith("sculpt_dist.") and ".maths" not in name for name in imports(path)), path


@pytest.mark.parametrize("arguments", [["-c", "import sculpt_dist"], ["-m", "sculpt_dist", "--help"]])
def test_starts_in_under_a_second(arguments):
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=rank_environment())
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1.0, seconds
