"""Running on a Slurm cluster.

`submit` fills in and sends `unlearn.sbatch`. The other batch scripts run comparisons and sweeps as job arrays, and
`chain.sh` submits the phases of a run one after another. All source `job.sh`, which launches, stops and requeues; a
site adapts `env.sh`. Only `cli` may import this package.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.slurm.submit import Request, compose, send

__getattr__, __dir__ = lazy_exports(__name__, {"submit": ["Request", "compose", "send"]})
