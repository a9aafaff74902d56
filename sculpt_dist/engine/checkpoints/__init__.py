"""Checkpoints of a run: sharded safetensors with a sealed manifest, restored on any number of ranks.

`save` writes them in the background, and `timer` decides when; `restore` finds, verifies and reads them. No pickle is
involved. The trainer and the run's stages import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.checkpoints.restore import load, load_named, newest, set_aside_later, verify
    from sculpt_dist.engine.checkpoints.save import Saver
    from sculpt_dist.engine.checkpoints.timer import CheckpointTimer

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "restore": ["load", "load_named", "newest", "set_aside_later", "verify"],
        "save": ["Saver"],
        "timer": ["CheckpointTimer"],
    },
)
