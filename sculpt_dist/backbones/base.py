"""What a backbone is: everything that is special to UNet or DiT, eps, v or flow, one text encoder or three, ends behind this class."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.folders import stored_weights
from sculpt_dist.files import write_atomically
from sculpt_dist.types import Denoiser, TextCond


class Backbone(ABC):
    """A text-to-image pipeline, opened up for training: its denoiser is `net`, the rest is frozen.

    A subclass lives in `backbones/<arch>.py` and is called `Backbone`: the file name is the `model.arch` of a config.
    Letters in shapes: B batch, C latent channels, H W latent size, h w image size.
    """

    folder: Path  # the diffusers pipeline folder that it was loaded from
    net: nn.Module  # the denoiser, in the dtype that it was loaded with
    net_name: str  # the denoiser's subfolder in a pipeline folder: "unet", "transformer"
    pipeline_class: str  # the diffusers class that loads an exported folder
    latent_shape: tuple[int, int, int]  # (C, H, W)
    image_size: int  # pixels, h = w
    device: torch.device

    def __init__(self) -> None:
        self._embedded: dict[str, TextCond] = {}

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> Backbone:
        """Open a diffusers pipeline folder. Raises ModelError when a component or a weight is missing."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        """The text encoders' output for these prompts, [B, L, D]."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> the mean latent [B, C, H, W], scaled as the denoiser expects."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> uint8 images [B, 3, h, w]."""

    @abstractmethod
    def sample_time(self, uniform: Tensor, window: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> times [B]; `window` restricts to a part of the schedule, 0 = clean, 1 = noise."""

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy latent at `time`: ([B, C, H, W], [B, C, H, W], [B]) -> [B, C, H, W]."""

    @abstractmethod
    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should predict (noise, velocity or flow): [B, C, H, W]."""

    @abstractmethod
    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """One prediction of `net`, which is an argument so that student and teacher share one stateless function."""

    @abstractmethod
    def sampler(self, steps: int) -> Any:
        """A fresh diffusers scheduler, set to `steps` steps, as the pipeline folder configures it."""

    # What follows is the same for every backbone.

    def embed(self, prompts: Sequence[str]) -> TextCond:
        """Embeddings of the prompts, [B, ...]; each distinct prompt passes the text encoders once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        if missing:
            with torch.no_grad():
                cond = self.encode_prompts(missing)
            self._remember(missing, cond)
        return TextCond.cat([self._embedded[prompt] for prompt in prompts])

    def _remember(self, prompts: Sequence[str], cond: TextCond) -> None:
        self._embedded |= {prompt: cond[i : i + 1] for i, prompt in enumerate(prompts)}

    def write_embeddings(self, file: Path, key: str, prompts: Sequence[str]) -> None:
        """Keep the embeddings of these prompts in a safetensors file; `key` says what they belong to."""
        from safetensors.torch import save

        cond = self.embed(prompts)
        tensors = {f.name: getattr(cond, f.name).contiguous().cpu() for f in fields(cond) if getattr(cond, f.name) is not None}
        write_atomically(file, save(tensors, {"key": key, "prompts": json.dumps(list(prompts))}))

    def read_embeddings(self, file: Path, key: str) -> bool:
        """Remember the embeddings of such a file; False when there is none with this key."""
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            return False
        try:
            with safe_open(file, "pt") as content:
                about = content.metadata() or {}
                if about.get("key") != key:
                    return False
                cond = TextCond(**{name: content.get_tensor(name).to(self.device) for name in content.keys()})
        except SafetensorError:
            return False  # damaged: computed again
        self._remember(json.loads(about["prompts"]), cond)
        return True

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the denoiser's parameters by group: `cross_attention.{q,k,v,out}`, `self_attention...`, `all`, ..."""
        return parameter_groups(name for name, _ in self.net.named_parameters())

    def add_adapter(self, options: Mapping[str, Any], seed: int) -> list[str]:
        """Put a LoRA adapter (peft.LoraConfig of these options) into the net; returns the names of its parameters."""
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net.add_adapter(LoraConfig(**options))
        return [name for name, _ in self.net.named_parameters() if ".lora_" in name]

    def merged(self, weights: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
        """Changed parameters under the names of the stored checkpoint: a LoRA pair becomes W + scale B A (Hu et al., arXiv 2106.09685)."""
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            assert tensor is not None, "only the first rank merges"
            layer, lora, rest = name.partition(".lora_")
            if not lora:
                yield name, tensor
                continue
            pair = halves.setdefault(layer, {})
            pair[rest[0]] = tensor  # lora_A [r, in, ...] or lora_B [out, r, ...]
            if len(pair) == 2:
                module = self.net.get_submodule(layer)
                stored = self._stored(f"{layer}.weight").float()  # the net's own may be sharded
                change = (pair["B"].flatten(1) @ pair["A"].flatten(1)).view_as(stored) * module.scaling["default"]
                yield f"{layer}.weight", stored + change

    def _stored(self, name: str) -> Tensor:
        """One tensor of the denoiser as the folder stores it."""
        return next(tensor for stored, tensor in stored_weights(self.folder, self.net_name, only=name))

    def denoiser(self, net: nn.Module) -> Denoiser:
        """`denoise` with its net filled in."""
        return lambda noisy, time, cond: self.denoise(net, noisy, time, cond)

    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: TextCond, negative: TextCond, steps: int, guidance: float
    ) -> Tensor:
        """Classifier-free guided sampling from unit noise [B, C, H, W] to clean latents [B, C, H, W], without gradient.

        The samplers used are deterministic, so equal noise gives equal latents.
        """
        sampler = self.sampler(steps)
        latents = noise * sampler.init_noise_sigma
        both = TextCond.cat([negative, cond])
        with torch.no_grad():
            for time in sampler.timesteps:
                noisy = torch.cat([latents, latents])  # [2 B, C, H, W]
                if hasattr(sampler, "scale_model_input"):
                    noisy = sampler.scale_model_input(noisy, time)
                without, with_prompt = denoiser(noisy, time.to(noisy).expand(len(noisy)), both).chunk(2)
                guided = without + guidance * (with_prompt - without)
                latents = sampler.step(guided, time, latents, return_dict=False)[0]
        return latents


def parameter_groups(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Sort parameter names into groups; `attn2` is cross-attention and `attn1` self-attention in diffusers' nets."""
    groups: dict[str, list[str]] = {"all": [], "not_cross_attention": []}
    kinds = {"attn2": "cross_attention", "attn1": "self_attention"}
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
    for name in names:
        groups["all"].append(name)
        words = name.split(".")
        kind = next((kinds[word] for word in words if word in kinds), None)
        part = next((parts[word] for word in words if word in parts), None)
        if kind != "cross_attention":
            groups["not_cross_attention"].append(name)
        if kind and part:
            groups.setdefault(f"{kind}.{part}", []).append(name)
            groups.setdefault(kind, []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
