"""The words that all rooms share. Everybody may import this; it imports nothing of the project.

`errors` for users, `types` that cross rooms (batches, conditions, losses), `files` (atomic writes, checksums, seeds),
`plugins` (a file name is a name in a configuration), `progress` bars, `signals` that ask a run to stop.
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
        "errors": "ConfigError LaunchError ModelError NonFiniteError RunFolderError SculptError ShardError StopRequested "
        "SubmitError".split(),
        "types": "ConceptBatch Denoiser Losses Stream TextCond".split(),
    },
)
