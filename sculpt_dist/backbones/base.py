"""What a backbone is: everything that is special to UNet or DiT, eps, v or flow, one text encoder or three, ends behind this class."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.io.folders import (
    check_folder,
    component_config,
    empty_component,
    load_component,
    load_scheduler,
    stored_entries,
    stored_weights,
)
from sculpt_dist.backbones.io.tensorfile import Entry
from sculpt_dist.backbones.parts.groups import parameter_groups
from sculpt_dist.backbones.parts.options import Options, Pretraining
from sculpt_dist.backbones.parts.schedules import Schedule
from sculpt_dist.backbones.parts.trajectory import guided
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import write_atomically
from sculpt_dist.core.types import Denoiser, TextCond


class Backbone(ABC):
    """A text-to-image pipeline, opened up for training: its denoiser is `net`, the rest is frozen.

    A subclass lives in `backbones/<arch>.py` and is called `Backbone`: the file name is the `model.arch` of a config. Components are
    loaded when they are first used. Letters in shapes: B batch, C latent channels, H W latent size, h w image size.
    """

    net_name: str  # the denoiser's subfolder in a pipeline folder: "unet", "transformer"
    net_class: type[nn.Module]
    pipeline_class: str  # the diffusers class that loads an exported folder
    parts: Mapping[str, type[nn.Module]]  # the frozen components by subfolder; one of them is "vae"
    schedule_class: type[Schedule]
    forced_settings: Mapping[str, Any] = {}  # of the scheduler, which the pipeline class sets whatever the folder says
    latent_shape: tuple[int, int, int]  # (C, H, W)
    size_ids: tuple[int, ...] | None = None  # SDXL's size conditions of a drawn image
    public_settings: str | None = None  # hub id of the settings that single files of this kind are read with
    tiny = Pretraining()

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, options: Options = Options()) -> None:
        """Open a diffusers pipeline folder; `dtype` is that of all components. On the meta device the folder's settings are enough.

        Raises ModelError when a component is missing, damaged or of another kind, ConfigError for an image size it cannot have.
        """
        check_folder(
            folder,
            self.pipeline_class,
            {self.net_name: self.net_class, **self.parts},
            settings_only=device.type == "meta",
        )
        self.folder, self.dtype, self.device, self.options = folder, dtype, device, options
        self.schedule = self.schedule_class(load_scheduler(folder, self.forced_settings), device)
        self._loaded: dict[str, nn.Module] = {}
        self._embedded: dict[tuple[str, bool], TextCond] = {}
        self.passes = 0  # samples through the denoiser so far; a forward with gradient counts three times, as its backward costs two
        config = self.net_settings = component_config(folder, self.net_name)
        try:
            pixels = 2 ** (self.vae_levels() - 1)  # of one latent, along a side
            channels, made_for = int(config["in_channels"]), int(config["sample_size"]) * pixels
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{folder}: the config.json of {self.net_name} or vae lacks a size or has one that is none ({error})"
            ) from error
        self.image_size = made_for if options.image_size is None else options.image_size
        needed = pixels * config.get("patch_size", 1)
        if self.image_size % needed or self.image_size < needed:
            raise ConfigError(f"model.image_size={self.image_size}: this model needs a multiple of {needed}")
        self.latent_shape = (channels, self.image_size // pixels, self.image_size // pixels)

    @abstractmethod
    def vae_levels(self) -> int:
        """The number of resolutions of the autoencoder."""

    @abstractmethod
    def tokenized(self, prompts: Sequence[str], negative: bool) -> Any:
        """What the text encoders are given. Raises ConfigError for a prompt that is too long, naming where it would be cut."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], negative: bool) -> TextCond:
        """The text encoders' output for these prompts, [B, L, D]; `negative`: as the pipeline encodes what to guide away from."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> the mean latent [B, C, H, W], scaled as the denoiser expects."""

    @abstractmethod
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, h, w], about [-1, 1]."""

    @abstractmethod
    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """One prediction of `net`, which is an argument so that student and teacher share one stateless function."""

    @classmethod
    @abstractmethod
    def write_untrained(cls, folder: Path, words: Sequence[str], seed: int) -> None:
        """Write a pipeline of this kind for 32 x 32 images, small enough for a CPU, whose tokenizer knows `words`."""

    @abstractmethod
    def autoencode(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """For pretraining: (pixels [B, 3, h, w] decoded from a noisy latent, the penalty [] on the latents), with gradient."""

    def takes(self, prompt: str) -> bool:
        """Whether the text encoders have room for the whole prompt."""
        try:
            self.tokenized([prompt], negative=False)
        except ConfigError:
            return False
        return True

    def token_ids(self, prompt: str) -> list[int]:
        """The prompt's tokens, padding left out, in the order of the rows that the denoiser is given."""
        tokens = self.tokenized([prompt], negative=False)
        return tokens.input_ids[0][tokens.attention_mask[0] > 0].tolist()

    def cross_attention_input(self, net: nn.Module, cond: TextCond) -> Tensor:
        """What the cross-attention's keys and values are computed from, [B, L, D]."""
        return cond.tokens

    def size_ids_of(self, height: int, width: int) -> tuple[int, ...] | None:
        """SDXL's size conditions of an own image of this size, after it was resized and cut to a centred square."""
        return None

    # What follows is the same for every backbone.

    @property
    def net(self) -> nn.Module:
        """The denoiser; the engine puts its sharded one here."""
        return self.part(self.net_name)

    @net.setter
    def net(self, net: nn.Module) -> None:
        net.register_forward_hook(self._count_passes)
        self._loaded[self.net_name] = net

    def _count_passes(self, net: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.passes += len(output[0]) * (3 if output[0].requires_grad else 1)

    @property
    def vae(self) -> Any:
        return self.part("vae")

    def part(self, name: str) -> Any:
        """A component, loaded when it is first asked for."""
        if name not in self._loaded:
            kind = self.net_class if name == self.net_name else self.parts[name]
            overflows = inspect.signature(kind).parameters.get(
                "force_upcast"
            )  # the autoencoder of Stable Diffusion and SDXL
            asks_fp32 = overflows and component_config(self.folder, name).get("force_upcast", overflows.default)
            self._load(name, kind, torch.float32 if self.dtype == torch.float16 and asks_fp32 else self.dtype)
        return self._loaded[name]

    def load_net(self, dtype: torch.dtype) -> None:
        """Load the denoiser anew, its stored weights rounded once, to `dtype`."""
        self.release(self.net_name)
        self._load(self.net_name, self.net_class, dtype)

    def _load(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
        load = empty_component if self.device.type == "meta" else load_component
        loaded = load(kind, self.folder, name, dtype).to(self.device)
        if name == self.net_name:
            self.net = loaded
        else:
            self._loaded[name] = loaded

    def release(self, *names: str) -> None:
        """Give the memory of components back (all frozen ones where none is named); they are loaded again when asked for."""
        for name in names or self.parts:
            self._loaded.pop(name, None)

    def empty_net(self) -> nn.Module:
        """The denoiser built from its settings alone, without the stored weights."""
        return self.net_class.from_config(self.net_settings)

    def stored_weights(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors (or those named) as the folder stores them, one at a time."""
        return stored_weights(self.folder, self.net_name, names)

    def stored_entries(self) -> list[Entry]:
        """Names, dtypes and shapes of the denoiser's stored tensors, in the order of `stored_weights`."""
        return stored_entries(self.folder / self.net_name)

    def sample_time(self, uniform: Tensor, window: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> times [B]; `window` restricts to a part of the schedule, 0 = clean, 1 = noise."""
        return self.schedule.sample_time(uniform, window)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy latent at `time`: ([B, C, H, W], [B, C, H, W], [B]) -> [B, C, H, W]."""
        return self.schedule.corrupt(clean, noise, time)

    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should predict (noise, velocity or flow): [B, C, H, W]."""
        return self.schedule.goal(clean, noise, time)

    def noise_level(self, time: Tensor) -> Tensor:
        """0 clean to 1 noise, [B]."""
        return self.schedule.noise_level(time)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> uint8 images [B, 3, h, w]."""
        with torch.no_grad():
            pixels = self.decode_pixels(latents)
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def embed(self, prompts: Sequence[str], negative: bool = False) -> TextCond:
        """Embeddings of the prompts, [B, ...]; each distinct prompt passes the text encoders once. `negative`: see encode_prompts."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if (prompt, negative) not in self._embedded]
        if missing:
            with torch.no_grad():
                cond = self.encode_prompts(missing, negative)
            self._remember(missing, cond, negative)
        return TextCond.cat([self._embedded[prompt, negative] for prompt in prompts])

    @contextmanager
    def temporary_embeddings(self) -> Iterator[None]:
        """What is embedded within is forgotten at the end: for the many prompts of a list, which would fill the device's memory."""
        before = dict(self._embedded)
        try:
            yield
        finally:
            self._embedded = before

    def _remember(self, prompts: Sequence[str], cond: TextCond, negative: bool) -> None:
        self._embedded |= {(prompt, negative): cond[i : i + 1] for i, prompt in enumerate(prompts)}

    def write_embeddings(self, file: Path, key: str, prompts: Sequence[str], negatives: Sequence[str]) -> None:
        """Keep the embeddings of these prompts and negative prompts in a safetensors file; `key` says what they belong to."""
        from safetensors.torch import save

        cond = TextCond.cat([self.embed(prompts), self.embed(negatives, negative=True)])
        kept = {
            f.name: getattr(cond, f.name) for f in fields(cond) if f.name != "size_ids"
        }  # those come from the options
        tensors = {name: tensor.contiguous().cpu() for name, tensor in kept.items() if tensor is not None}
        write_atomically(file, save(tensors, {"key": key, "prompts": json.dumps([list(prompts), list(negatives)])}))

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
                names = content.keys()  # safe_open itself is not iterable
                cond = TextCond(**{name: content.get_tensor(name).to(self.device) for name in names})
        except SafetensorError:
            return False  # damaged: computed again
        prompts, negatives = json.loads(about["prompts"])
        cond = self.with_size_ids(cond)
        self._remember(prompts, cond, negative=False)
        self._remember(negatives, cond[len(prompts) :], negative=True)
        return True

    def with_size_ids(self, cond: TextCond) -> TextCond:
        """The condition of drawn images, where this kind has size conditions."""
        if self.size_ids is None:
            return cond
        return replace(
            cond, size_ids=torch.tensor([self.size_ids] * len(cond), dtype=torch.float32, device=self.device)
        )  # [B, 6]

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the denoiser's parameters by group: `cross_attention.{q,k,v,out}`, `self_attention...`, `all`, `block.0`, ..."""
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.net.named_parameters()}
        return parameter_groups(shapes)

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
        return next(tensor for _, tensor in self.stored_weights([name]))

    def denoiser(self, net: nn.Module) -> Denoiser:
        """`denoise` with its net filled in."""
        return lambda noisy, time, cond: self.denoise(net, noisy, time, cond)

    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: TextCond, negative: TextCond, steps: int, guidance: float
    ) -> Tensor:
        """Classifier-free guided sampling from unit noise [B, C, H, W] to clean latents [B, C, H, W], without gradient.

        The samplers used are deterministic, so equal noise gives equal latents.
        """
        sampler = self.schedule.sampler(steps)
        latents = self.schedule.first_latents(sampler, noise)
        both = TextCond.cat([negative, cond])
        with torch.no_grad():
            for time in sampler.timesteps:
                predicted = guided(denoiser, self.schedule.model_input(sampler, latents, time), time, both, guidance)
                latents = sampler.step(predicted, time, latents, return_dict=False)[0]
        return latents
