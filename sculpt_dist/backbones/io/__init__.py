"""Pipeline folders on disk: `find` locates them, `checking` refuses damaged ones, `folders` loads, `writing` exports.

`scheduler` loads the noise scheduler; `tensorfile` reads the headers of safetensors files. Every layer above may import
these.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.backbones.io.checking import check_folder
    from sculpt_dist.backbones.io.find import find_folder, find_settings
    from sculpt_dist.backbones.io.folders import stored_entries, stored_weights, weight_files
    from sculpt_dist.backbones.io.tensorfile import entries
    from sculpt_dist.backbones.io.writing import write_pipeline

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "checking": ["check_folder"],
        "find": ["find_folder", "find_settings"],
        "folders": ["stored_entries", "stored_weights", "weight_files"],
        "tensorfile": ["entries"],
        "writing": ["write_pipeline"],
    },
)
