"""A run, from its configuration to its report.

`sequence` is the whole run, `stages` its parts one by one. `setup` resolves a configuration once; `session` opens
folder, ranks and model; `kinds` chooses `trainer` or `editor` by the method's kind; `prepare` draws samples, whose
shards `shard_notes` keeps; `training_loop` is the loop, `plan` its steps, `state` its checkpoints; `folder`,
`fingerprint` and `costs` keep the books; `verify` compares checksums; `export` and `export_forms` write the result.
Imported by `planning`, `experiments`, `slurm`, `bench` and `cli`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.run.fingerprint import config_fingerprint
    from sculpt_dist.run.sequence import Run, run_sequence
    from sculpt_dist.run.setup import RunSetup, resolve
    from sculpt_dist.run.stages import evaluate_only, export_only, prepare_only

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "fingerprint": ["config_fingerprint"],
        "sequence": ["Run", "run_sequence"],
        "setup": ["RunSetup", "resolve"],
        "stages": ["evaluate_only", "export_only", "prepare_only"],
    },
)
