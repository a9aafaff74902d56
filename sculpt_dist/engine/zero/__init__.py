"""DeepSpeed ZeRO stages 0 to 3 behind a small interface.

`engine` is the Engine that trains a net; `settings` its settings and the DeepSpeed configuration made from them;
`loading` builds a net for stage 3 tensor by tensor, `drawing` gathers it; `frozen_weights` keeps earlier states of the
net (the teacher). The run, its preflight checks and the planner import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.zero.engine import Engine, StepResult
    from sculpt_dist.engine.zero.frozen_weights import FrozenWeights
    from sculpt_dist.engine.zero.loading import check_fit, return_free_memory, sharded_net
    from sculpt_dist.engine.zero.settings import DTYPES, PERSISTENT, REDUCE_BUCKET, EngineSettings, fetched_ahead

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "engine": ["Engine", "StepResult"],
        "frozen_weights": ["FrozenWeights"],
        "loading": ["check_fit", "return_free_memory", "sharded_net"],
        "settings": ["DTYPES", "PERSISTENT", "REDUCE_BUCKET", "EngineSettings", "fetched_ahead"],
    },
)
