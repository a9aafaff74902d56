"""What a run would do, found out without weights and without a GPU.

`check` tries one step as shapes on the meta device. `plan` computes memory, traffic and time, from a `subject` (model
and method, counted by `rehearsal`), a `variant` (a configuration that may be changed) and `rates` of a machine.
Imported by `bench` and `cli`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.planning.check import check_run
    from sculpt_dist.planning.plan import plan_run, step_flops
    from sculpt_dist.planning.rates import read_rates

__getattr__, __dir__ = lazy_exports(
    __name__, {"check": ["check_run"], "plan": ["plan_run", "step_flops"], "rates": ["read_rates"]}
)
