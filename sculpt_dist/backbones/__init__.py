"""The kinds of models: each file beside `base` is one, and its name is a `model.arch`; `base` is their contract.

`parts` holds what a backbone is composed of (components, embeddings, schedules, guidance, groups), `io` reads and
writes pipeline folders, `formats` converts them to single files, deltas and adapters. Every layer above may import this
one, and no other imports diffusers or peft. A new kind is one new file here.
"""

import os
from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.backbones.parts.options import Options
    from sculpt_dist.backbones.parts.trajectory import Trajectory

for library in ("DIFFUSERS", "TRANSFORMERS"):  # before their import, or they hint at packages that nobody needs
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

__getattr__, __dir__ = lazy_exports(
    __name__, {"base": ["Backbone"], "parts.options": ["Options"], "parts.trajectory": ["Trajectory"]}
)
