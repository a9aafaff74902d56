"""The two families of noise schedules, discrete diffusion (eps, v) and flow matching, around a diffusers scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.errors import ModelError
from sculpt_dist.maths.diffusion import ddpm_corrupt, ddpm_velocity, flow_corrupt, flow_velocity, shifted_sigma


class Schedule(ABC):
    """How a latent is corrupted at a time, and what the denoiser then predicts.

    A time is a value of the scheduler's `timesteps`.
    """

    predictions: tuple[str, ...]  # the prediction types of this family

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Raises ModelError when the scheduler is of the other family."""
        self.scheduler, self.device = scheduler, device
        self.prediction = prediction_type(scheduler)
        if self.prediction not in self.predictions:
            raise ModelError(
                f"scheduler {type(scheduler).__name__}: its prediction_type is {self.prediction!r}, this kind of model "
                f"has {' or '.join(self.predictions)}; use the scheduler that the pipeline was published with"
            )

    @abstractmethod
    def sample_time(self, uniform: Tensor, window: tuple[float, float]) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> times [B]; `window` is a part of the schedule, 0 = clean, 1 = noise."""

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy latent at `time`: ([B, C, H, W], [B, C, H, W], [B]) -> [B, C, H, W]."""

    @abstractmethod
    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should predict there: [B, C, H, W]."""

    @abstractmethod
    def scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B]: the noisy latent is alpha clean + sigma noise."""

    @abstractmethod
    def noise_level(self, time: Tensor) -> Tensor:
        """[B], 0 (clean) to 1 (noise): the timestep's share of the schedule, or sigma."""

    @abstractmethod
    def stress(self, time: Tensor) -> Tensor:
        """Weights [B] of the pretraining loss that make every time matter to a guided sampler."""

    @abstractmethod
    def first_latents(self, sampler: Any, noise: Tensor) -> Tensor:
        """Unit noise -> the latents with which the sampler starts."""

    @abstractmethod
    def model_input(self, sampler: Any, latents: Tensor, time: Tensor) -> Tensor:
        """The sampler's latents -> the denoiser's input."""

    def sampler(self, steps: int) -> Any:
        """A fresh scheduler of the pipeline's own class and settings, set to `steps` steps."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    @abstractmethod
    def first_order(self, steps: int) -> Any:
        """A deterministic sampler without memory of earlier steps, set to `steps` steps; its times stay on the CPU."""


def prediction_type(scheduler: Any) -> str:
    """epsilon, v_prediction or flow_prediction; schedulers for flow matching alone do not name it in their settings."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "none")


class DiscreteSchedule(Schedule):
    """Integer timesteps 0 .. T - 1 with the scheduler's own alpha_bar."""

    predictions = ("epsilon", "v_prediction")

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        super().__init__(scheduler, device)
        try:
            self.alpha_bar = scheduler.alphas_cumprod.to(device)  # [T]
        except AttributeError as error:
            raise ModelError(
                f"scheduler {type(scheduler).__name__}: has no alpha_bar, so its noise levels are unknown; save the "
                "pipeline with another one, such as DPMSolverMultistepScheduler"
            ) from error

    def sample_time(self, uniform: Tensor, window: tuple[float, float]) -> Tensor:
        low, high = window
        steps = len(self.alpha_bar)
        return ((low + (high - low) * uniform) * steps).long().clamp(0, steps - 1).to(self.device)

    def _alpha_bar_at(self, time: Tensor) -> Tensor:
        """[B]; the timesteps of some samplers, such as Euler's, lie between two of training."""
        return self.alpha_bar[time.round().long()]

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return ddpm_corrupt(clean, noise, self._alpha_bar_at(time))

    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise if self.prediction == "epsilon" else ddpm_velocity(clean, noise, self._alpha_bar_at(time))

    def scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar_at(time)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noise_level(self, time: Tensor) -> Tensor:
        return time.float() / len(self.alpha_bar)

    def stress(self, time: Tensor) -> Tensor:
        """For eps min(1 / alpha_bar, 20), about the error in v: a guided sampler decides at noisy times, which would
        else count too little.
        """
        if self.prediction == "v_prediction":
            return torch.ones_like(time, dtype=torch.float32)
        return (1 / self.alpha_bar[time]).clamp(max=20)

    def first_order(self, steps: int) -> Any:
        from diffusers import DDIMScheduler

        spacing = self.scheduler.config.get("timestep_spacing", "leading")
        if spacing == "linspace":  # DDIM's steps are T // steps long, those of linspace are not
            spacing = "trailing"
        sampler = DDIMScheduler.from_config(
            self.scheduler.config, clip_sample=False, thresholding=False, timestep_spacing=spacing
        )
        sampler.set_timesteps(steps)
        return sampler

    def first_latents(self, sampler: Any, noise: Tensor) -> Tensor:
        return noise * sampler.init_noise_sigma

    def model_input(self, sampler: Any, latents: Tensor, time: Tensor) -> Tensor:
        return sampler.scale_model_input(latents, time)


class FlowSchedule(Schedule):
    """Times are T sigma, as in the schedulers, with sigma in (0, 1] under the time shift; the loss weight is 1."""

    predictions = ("flow_prediction",)

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Raises ModelError for a scheduler of the other family, or with a shift that depends on the image size."""
        super().__init__(scheduler, device)
        settings = scheduler.config
        if settings.get("use_dynamic_shifting"):
            raise ModelError(
                f"scheduler {type(scheduler).__name__}: use_dynamic_shifting is not supported; set a fixed shift"
            )
        self.steps = settings["num_train_timesteps"]
        self.shift = float(settings.get("flow_shift") or settings.get("shift") or 1.0)

    def sample_time(self, uniform: Tensor, window: tuple[float, float]) -> Tensor:
        low, high = window
        return shifted_sigma(low + (high - low) * uniform, self.shift).to(self.device) * self.steps

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return flow_corrupt(clean, noise, time / self.steps)

    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return flow_velocity(clean, noise)

    def scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - time / self.steps, time / self.steps

    def noise_level(self, time: Tensor) -> Tensor:
        return time / self.steps

    def stress(self, time: Tensor) -> Tensor:
        return torch.ones_like(time)

    def first_order(self, steps: int) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        sampler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.steps, shift=self.shift)
        sampler.set_timesteps(steps)
        return sampler

    def first_latents(self, sampler: Any, noise: Tensor) -> Tensor:
        return noise

    def model_input(self, sampler: Any, latents: Tensor, time: Tensor) -> Tensor:
        return latents
