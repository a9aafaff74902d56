"""The words that every other room shares. Everybody may import this; it imports nothing of the project.

`errors` for users, `types` that cross rooms (batches, conditions, losses), `files` (atomic writes, checksums, seeds),
`plugins` (a file name is a name in a configuration), `progress` bars, `signals` that ask a run to stop.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.core.errors import ConfigError as ConfigError
    from sculpt_dist.core.errors import LaunchError as LaunchError
    from sculpt_dist.core.errors import ModelError as ModelError
    from sculpt_dist.core.errors import NonFiniteError as NonFiniteError
    from sculpt_dist.core.errors import RunFolderError as RunFolderError
    from sculpt_dist.core.errors import SculptError as SculptError
    from sculpt_dist.core.errors import ShardError as ShardError
    from sculpt_dist.core.errors import StopRequested as StopRequested
    from sculpt_dist.core.errors import SubmitError as SubmitError
    from sculpt_dist.core.types import ConceptBatch as ConceptBatch
    from sculpt_dist.core.types import Denoiser as Denoiser
    from sculpt_dist.core.types import Losses as Losses
    from sculpt_dist.core.types import Stream as Stream
    from sculpt_dist.core.types import TextCond as TextCond

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ConfigError": "errors",
        "LaunchError": "errors",
        "ModelError": "errors",
        "NonFiniteError": "errors",
        "RunFolderError": "errors",
        "SculptError": "errors",
        "ShardError": "errors",
        "StopRequested": "errors",
        "SubmitError": "errors",
        "ConceptBatch": "types",
        "Denoiser": "types",
        "Losses": "types",
        "Stream": "types",
        "TextCond": "types",
    },
)
