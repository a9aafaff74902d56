"""Guards: inference-time removal. Each file beside `base` is one, and its name is a `method.name`.

A guard is fitted to a model once, and then acts while images are drawn; no weight changes. `base` is the contract,
`parts` what the guards share. `apply` and `remove` work on a plain diffusers pipeline. Imported by `methods` and above;
guards import `backbones`, `data` and below.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.guards.base import Fitting, Guard
    from sculpt_dist.guards.parts.acting import apply, guard_backbone, remove
    from sculpt_dist.guards.parts.folder import GUARD, Fitted, read_guard, write_guard

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "base": ["Fitting", "Guard"],
        "parts.acting": ["apply", "guard_backbone", "remove"],
        "parts.folder": ["GUARD", "Fitted", "read_guard", "write_guard"],
    },
)
