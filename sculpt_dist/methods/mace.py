"""MACE: closed-form refinement, an adapter of rank 1 for each concept, closed-form fusion.

Lu et al., arXiv 2403.06135.

All three act on the keys and values W of the cross-attention, which receive rows e of a prompt's tokens.

1. Refinement, once: the tokens that a target's prompt shares with its superclass's (rows e and e') lose what the target
   left in them:  W' = (l W + sum W e' e^T + s sum W p p^T) (l I + sum e e^T + s sum p p^T)^-1
2. For each concept, an adapter dW of rank 1 trains on noisy samples of the target, with A the attention to its name
   (and to the end of the prompt) and M its region in the image:  L = sum over layers of || A M ||, the Frobenius norm
3. Fusion of all concepts, with G_i = sum e e^T over all tokens of concept i's prompts:
   W* = W' + sum dW_i G_i (l I + sum_j G_j + s sum p p^T)^-1

p are the rows of prompts to preserve: the superclass's, those of `keep` and the empty one. In step 2 the adapters of
earlier concepts are active (ours; the paper trains each alone). The norm is the published code's; the paper squares it.
M comes from a segmenter in the paper; here it is, in each layer, where the attention to these tokens of the net before
the concept is above half of its maximum (ours), or a folder of `masks`. Times have the density s(50 (t - .2)) -
s(50 (t - .4)), s a sigmoid (`focal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.closed_form import EditSystem, fusion_factors
from sculpt_dist.maths.diffusion import focal_shares
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Setup, Step, matrices
from sculpt_dist.methods.fmn import attention_norm
from sculpt_dist.methods.parts.names import padded, target_tokens
from sculpt_dist.methods.parts.regions import attended, read_masks, within
from sculpt_dist.methods.parts.rows import received, shared_rows

FOCUS, RAMP = (0.2, 0.4), 50.0  # of the density of times, as shares of the schedule


@dataclass(frozen=True)
class Config:
    """The options of mace."""

    name: str = "mace"
    """Name of this method."""
    ridge: float = 10.0
    """Ridge towards the present weights, l: 10 to 1000 for objects. Published for other tasks: 0, with many preserved
    rows; here it must be greater than 0."""
    preserve_scale: float = 0.1
    """Weight of the preserved rows, s."""
    masks: str | None = None
    """Folder with a region for each sample of a target, TARGET/NUMBER.png, white where the concept is; null takes the
    frozen net's attention, and for styles the whole image."""
    focal: bool = True
    """Prefer times at which images take shape; for unsafe content, the paper draws them evenly."""
    end_token: bool = True
    """Count the token that ends a prompt as part of the name, in kinds that have one (not SANA)."""


class Method(Base):
    """Trains an adapter on keys and values of the cross-attention, between two closed forms."""

    rank_per_concept, takes_together, reads_attention = True, False, True

    def __init__(
        self,
        config: Config,
        places: Mapping[str, Sequence[int]] = {},
        masks: Mapping[int, Tensor] | None = None,
        fusing: Tensor | None = None,
        concept: int = 0,
    ) -> None:
        """`places`: tokens of the target's name by prompt; `masks`: regions [h, w] by sample, or None where the whole
        image is one; `fusing`: G_i (...)^-1 [D, D] of this concept, number `concept`.
        """
        if config.ridge <= 0:
            raise ConfigError(f"method.ridge={config.ridge}: must be greater than 0, or there is no single solution")
        self.config, self.places, self.masks, self.fusing, self.concept = config, places, masks, fusing, concept
        self.attends = config.masks is None and masks is not None
        self.needs_teacher = config.masks is None
        self.whole: Tensor | None = None  # l I + sum_j G_j + s sum p p^T, [D, D]

    def prepare(self, setup: Setup) -> Method:
        places = {
            prompt: (*found, *(_end(setup.backbone, prompt) if self.config.end_token else ()))
            for prompt, found in target_tokens(setup).items()
        }
        concept = setup.concepts[setup.concept]
        masks = {} if self.config.masks is None else read_masks(self.config.masks, concept.target)
        whole = self.config.masks is None and concept.kind == "style"
        return Method(self.config, places, None if whole else masks, self._fusing(setup), setup.concept)

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target"),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return [*matrices(groups, "cross_attention.k"), *matrices(groups, "cross_attention.v")]

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
        layers = [name.removesuffix(".weight") for name in self.trainable(groups)]
        return {"r": 1, "lora_alpha": 1, "target_modules": layers}

    def refine(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        for prompts in concepts if self.config.masks is not None else ():
            read_masks(self.config.masks or "", prompts.names[0])  # a folder that is missing is told now
        names = self.trainable(backbone.groups())
        system = self._system(backbone, concepts)
        for prompts in concepts:
            for old, new in dict.fromkeys(zip(prompts.target, prompts.superclass)):
                system.add_erased(*shared_rows(backbone, old, new))
        transform = system.transform()
        return {
            name: (weight.to(transform.device, torch.float64) @ transform).float()
            for name, weight in backbone.stored_weights(names)
        }

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        target, backbone = step.batch.target, step.backbone
        uniform = step.rng.uniform("time")  # [B]
        time = backbone.sample_time(focal_shares(uniform, FOCUS, RAMP) if self.config.focal else uniform)
        noisy, _ = step.corrupted(target, time, "target")
        places = padded([self.places[prompt] for prompt in target.prompts], noisy.device)  # [B, n]
        with backbone.attention_maps(step.student.net, places, target.cond) as maps:
            step.student(noisy, time, target.cond)
        if self.attends:
            with backbone.attention_maps(step.student.net, places, target.cond) as frozen:
                step.frozen("teacher")(noisy, time, target.cond)
            maps = {name: one * attended(frozen[name]) for name, one in maps.items()}
        elif self.masks is not None:
            maps = {name: within(one, self.masks, target.keys) for name, one in maps.items()}
        norms = [attention_norm([one]).mean() for one in maps.values()]
        return Losses({"forget": torch.stack(norms).sum()})

    def fusion(self) -> Callable[[str, Tensor], Tensor]:
        return self._fuse

    def _fuse(self, name: str, trained: Tensor) -> Tensor:
        """B A -> B A G (...)^-1, which changes A alone; `trained` is A [concepts, D] or B [out, concepts]."""
        if ".lora_A." not in name or self.fusing is None:
            return trained
        fused = trained.clone()
        fused[self.concept] = (trained[self.concept].double() @ self.fusing.to(trained.device)).to(trained.dtype)
        return fused

    def _fusing(self, setup: Setup) -> Tensor:
        if self.whole is None:  # prepare() is called on one method for all concepts
            concepts = setup.all_prompts or (setup.prompts,)
            sums = [_gram(setup.backbone, prompts) for prompts in concepts]
            self.whole = self._system(setup.backbone, concepts).present + torch.stack(sums).sum(0)
        return fusion_factors(_gram(setup.backbone, setup.prompts), self.whole)

    def _system(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> EditSystem:
        """The equations with the ridge and the preserved rows alone."""
        empty = received(backbone, [""], negative=True)
        system = EditSystem(empty.shape[1], self.config.ridge, 1.0, self.config.preserve_scale, empty.device)
        kept = dict.fromkeys(text for prompts in concepts for text in (*prompts.superclass, *prompts.keep))
        for rows in (empty, *(received(backbone, [text]) for text in kept)):
            system.add_preserved(rows)
        return system


def _gram(backbone: Backbone, prompts: ConceptPrompts) -> Tensor:
    """G = sum e e^T over the rows of a target's prompts, fp64 [D, D]."""
    rows = received(backbone, prompts.target).double()
    return rows.T @ rows


def _end(backbone: Backbone, prompt: str) -> tuple[int, ...]:
    """The place of the token that ends a prompt, where the kind has one."""
    last = len(backbone.token_ids(prompt)) - 1
    return (last,) if backbone.token_places(prompt).stop <= last else ()
