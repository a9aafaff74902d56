"""Importing the engine's modules is cheap: deepspeed and triton wait for the first group, engine or kernel."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("deepspeed", "triton", "accelerate", "diffusers", "transformers")
IMPORT_ALL = f"""
import importlib, pkgutil, sys
import sculpt_dist.engine as engine
for module in pkgutil.walk_packages(engine.__path__, "sculpt_dist.engine."):
    if not module.name.endswith("_triton"):
        importlib.import_module(module.name)
for name in dir(engine):
    getattr(engine, name)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_importing_the_engine_imports_no_heavy_library():
    child = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert child.stdout.strip() == "[]", child.stdout + child.stderr
