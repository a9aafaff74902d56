"""Pipeline folders on disk: `find` locates them (folder, hub, shipped), `folders` checks and loads, `writing` exports.

`tensorfile` reads safetensors headers and writes such files tensor by tensor. Rooms above may import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.backbones.io.find import find_folder, find_settings
    from sculpt_dist.backbones.io.folders import stored_entries, stored_weights, weight_files
    from sculpt_dist.backbones.io.tensorfile import Entry, TensorWriter, entries, write_tensors
    from sculpt_dist.backbones.io.writing import write_pipeline

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "find": ["find_folder", "find_settings"],
        "folders": ["stored_entries", "stored_weights", "weight_files"],
        "tensorfile": ["Entry", "TensorWriter", "entries", "write_tensors"],
        "writing": ["write_pipeline"],
    },
)
