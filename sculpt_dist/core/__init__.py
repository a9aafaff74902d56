"""What every other package shares. Any package may import this one; it imports nothing else of the project.

`types` holds the batches, conditions and losses that packages exchange; `errors` the errors for users; `files` atomic
writes, checksums and seeds; `tensorfile` writes safetensors; `locks` are those between processes. `plugins` finds
modules by file name, `exports` makes package exports lazy, `progress` shows bars, and `signals` catches a stop signal
that arrives before a run listens.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.core.errors import (
        ConfigError,
        LaunchError,
        ModelError,
        NonFiniteError,
        RunFolderError,
        SculptError,
        ShardError,
        StopRequested,
        SubmitError,
    )
    from sculpt_dist.core.types import ConceptBatch, Denoiser, Losses, Stream, TextCond

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "errors": (
            "ConfigError LaunchError ModelError NonFiniteError RunFolderError SculptError ShardError StopRequested "
            "SubmitError"
        ).split(),
        "types": "ConceptBatch Denoiser Losses Stream TextCond".split(),
    },
)
