"""Attacks: attempts to bring a forgotten concept back, and probes of what is left of it.

One attack per file, found by its name; `base.py` is the contract and `parts/` what they share. `run/attacking/` runs
them, over all ranks. Imported by run and above.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.attacks.base import Attack, Attempt, Case, attack_names, load_attack
    from sculpt_dist.attacks.parts.victim import Model, Victim

__all__ = ["Attack", "Attempt", "Case", "Model", "Victim", "attack_names", "load_attack"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "base": ("Attack", "Attempt", "Case", "attack_names", "load_attack"),
        "parts.victim": ("Model", "Victim"),
    },
)
