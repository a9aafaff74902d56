"""Many runs from one file: comparisons of methods, sweeps over hyperparameters, and the choice of blocks to train.

`compare` runs the cells of a comparison; `tables` computes its numbers and `table_files` writes them. `sweep` runs the
trials of a W&B sweep file; `trials` reads the file, `ledger` keeps the sweep's folder and `summary` writes its report.
`localize` scores the blocks of a model. All of them run their jobs through `jobs`. Only `cli` may import this package.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.experiments.compare import read_comparison, run_comparison
    from sculpt_dist.experiments.jobs import Failure, Job, run_jobs
    from sculpt_dist.experiments.localize import run_localization
    from sculpt_dist.experiments.sweep import run_sweep, trial_arguments
    from sculpt_dist.experiments.trials import Sweep, Trial, read_sweep

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "compare": ["read_comparison", "run_comparison"],
        "jobs": ["Failure", "Job", "run_jobs"],
        "localize": ["run_localization"],
        "sweep": ["run_sweep", "trial_arguments"],
        "trials": ["Sweep", "Trial", "read_sweep"],
    },
)
