"""A backbone and a batch so small that a method's terms can be computed by hand."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from sculpt_dist.backbones.parts.guidance import classifier_free
from sculpt_dist.backbones.parts.schedules import DiscreteSchedule
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.core.types import ConceptBatch, Stream, TextCond
from sculpt_dist.data.streams import Draws
from sculpt_dist.methods.base import Predictor, Step

EMPTY = 2.0  # the number of the empty prompt


class LinearBackbone:
    """A backbone that predicts weight x noisy + the prompt's number; corrupt adds the noise, which is the goal."""

    latent_shape = (1, 2, 2)
    schedule = DiscreteSchedule(DDIMScheduler(), torch.device("cpu"))
    guided = staticmethod(classifier_free)

    def sample_time(self, uniform, window=(0.0, 1.0)):
        return (uniform * 1000).long()

    def corrupt(self, clean, noise, time):
        return clean + noise

    def goal(self, clean, noise, time):
        return noise

    def noise_level(self, time):
        return time.float() / 1000

    def embed(self, prompts, negative=False):
        if negative:
            assert set(prompts) == {""}
            return cond(EMPTY, len(prompts))
        return TextCond(torch.tensor([float(len(prompt)) for prompt in prompts]).view(-1, 1, 1))

    def takes(self, prompt):
        return len(prompt) < 30

    def denoise(self, net, noisy, time, cond):
        net.calls.append(len(noisy))
        return net.weight * noisy + cond.tokens.view(-1, 1, 1, 1)


def net(weight: float) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(weight))
    module.calls = []
    return module


class Still:
    """A frozen state: the net itself, without gradient."""

    def __call__(self):
        return torch.no_grad()


def stream(value: float, number: float, count: int = 2) -> Stream:
    places = tuple(range(count))
    latents = torch.full((count, 1, 2, 2), value)
    other = cond(7.0 if number == 5.0 else 5.0, count)  # the target's prompt is 5, the superclass's 7
    return Stream(latents, cond(number, count), ("p" * int(number),) * count, places, places, other)


def cond(number: float, count: int = 2) -> TextCond:
    return TextCond(torch.full((count, 1, 1), number))


def linear_step(
    student: torch.nn.Module, teacher: torch.nn.Module, anchored: bool = True, update: int = 0, progress: float = 0.0
) -> Step:
    backbone = LinearBackbone()
    streams = {"target": stream(1.0, 5.0), "superclass": stream(2.0, 7.0), "distractor": stream(4.0, 13.0)}
    batch = ConceptBatch(streams | ({"anchor": stream(3.0, 11.0)} if anchored else {}))
    rng = Draws(0, 0, 0, [0, 1], torch.device("cpu"))
    return Step(
        Predictor(backbone, student),
        Predictor(backbone, teacher, Still()),
        None,
        batch,
        backbone,
        rng,
        Trajectory(backbone),
        update,
        progress,
    )


def noise(step: Step, what: str) -> torch.Tensor:
    return step.rng.normal(what, (1, 2, 2))
