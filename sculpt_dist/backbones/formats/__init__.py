"""Models in forms that other programs read, made from pipeline folders.

`original` is a single file in Stability's layout (`original_names` maps the names). `delta` holds only the changed
tensors (`delta_file` is its format), `adapter` a LoRA of the change (`adapter_names` names it); `stored_net` reads a
folder's denoiser for these. `about` is what the files say of themselves. `run` and `cli` import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.backbones.formats.adapter import Lost, check_adapter, read_lost, write_adapter, write_adapter_of
    from sculpt_dist.backbones.formats.delta import apply_delta, write_delta
    from sculpt_dist.backbones.formats.delta_file import read_delta
    from sculpt_dist.backbones.formats.original import check_single_file, read_single_file, write_single_file

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "adapter": ["Lost", "check_adapter", "read_lost", "write_adapter", "write_adapter_of"],
        "delta": ["apply_delta", "write_delta"],
        "delta_file": ["read_delta"],
        "original": ["check_single_file", "read_single_file", "write_single_file"],
    },
)
