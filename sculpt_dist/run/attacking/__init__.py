"""Attacks on a model, over all ranks: one result file for each piece of work, so that a killed attack goes on.

WHERE/attacks.json               the rates of every attack
WHERE/NAME/0003.json             piece 3 of attack NAME: for each case what was seen in each attempt
WHERE/NAME/0003-0.png            the image of its first success, or else of its last attempt
WHERE/NAME/0003.safetensors      vectors and latents that it found
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.run.attacking.attack import attack_model, attack_only, check_attacks, check_room, chosen_attacks
    from sculpt_dist.run.attacking.cases import cases_of
    from sculpt_dist.run.attacking.rates import attack_settings

__all__ = [
    "attack_model",
    "attack_only",
    "attack_settings",
    "cases_of",
    "check_attacks",
    "check_room",
    "chosen_attacks",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "attack": ("attack_model", "attack_only", "check_attacks", "check_room", "chosen_attacks"),
        "cases": ("cases_of",),
        "rates": ("attack_settings",),
    },
)
