"""The contract of a backbone: whatever depends on the kind of model (UNet or DiT, eps, v or flow) stays behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.io.checking import check_folder
from sculpt_dist.backbones.io.folders import component_config, stored_entries, stored_weights
from sculpt_dist.backbones.io.scheduler import load_scheduler
from sculpt_dist.backbones.parts.attention import recorded_maps
from sculpt_dist.backbones.parts.components import Components, forces_upcast, model_class
from sculpt_dist.backbones.parts.conditions import Passed, check_channels, check_conditions, check_scaling
from sculpt_dist.backbones.parts.embeddings import PromptEmbeddings
from sculpt_dist.backbones.parts.groups import attention_role, parameter_groups
from sculpt_dist.backbones.parts.guidance import Guided, classifier_free
from sculpt_dist.backbones.parts.lora import add_lora, merged_lora, merged_name
from sculpt_dist.backbones.parts.options import Options, Tiny
from sculpt_dist.backbones.parts.sampling import images_of, sampled_latents
from sculpt_dist.backbones.parts.schedules import Schedule
from sculpt_dist.backbones.parts.sizes import Sizes, square_sizes
from sculpt_dist.backbones.parts.text import Tokens
from sculpt_dist.backbones.parts.words import Words
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.tensorfile import Entry
from sculpt_dist.core.types import Denoiser, TextCond
from sculpt_dist.maths.diffusion import clean_and_noise


class Backbone(ABC):
    """A text-to-image pipeline opened up for training: `net` is its denoiser, the other components are frozen.

    A subclass lives in `backbones/<arch>.py` and is called `Backbone`; `model.arch` in a config is the file name.
    Letters in shapes: B batch, C latent channels, H W latent size, h w image size, L tokens, D text width.
    """

    net_name: str  # the denoiser's subfolder in a pipeline folder: "unet", "transformer"
    net_class: str  # dotted, as that of every component: opening a folder need not import diffusers' models
    pipeline_class: str  # the diffusers class that loads an exported folder
    conditions: Passed = {}  # settings of the net that decide what it takes, and the values that this kind serves
    parts: Mapping[str, str]  # the frozen components, subfolder -> dotted class name; one of them is "vae"
    text_encoders: tuple[str, ...] = ("text_encoder",)  # which of the parts read the prompt; their token ids are alike
    schedule_class: type[Schedule]
    forced_settings: Mapping[str, Any] = {}  # scheduler settings that the pipeline class overrides
    tokenizers: tuple[str, ...] = ("tokenizer",)  # their subfolders, in the order of `text_encoders`
    size_ids: tuple[int, ...] | None = None  # SDXL's size conditions of a drawn image
    public_settings: str | None = None  # hub id of the settings with which single files of this kind are read
    tiny: Mapping[str, Tiny] = {}  # sizes of the embedded worlds' models: small, large

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, options: Options = Options()) -> None:
        """Open a diffusers pipeline folder. On the meta device its settings are enough; `dtype`: see `part_dtype`.

        Raises ModelError when a component is missing, damaged or of another kind, ConfigError for an impossible image
        size.
        """
        classes = {self.net_name: self.net_class, **self.parts}
        names = {part: dotted.rpartition(".")[2] for part, dotted in classes.items()}
        check_folder(folder, self.pipeline_class, names, settings_only=device.type == "meta")
        self.folder, self.dtype, self.device, self.options = folder, dtype, device, options
        self.net_settings = component_config(folder, self.net_name)
        net_file, vae_file = (folder / name / "config.json" for name in (self.net_name, "vae"))
        vae_settings = component_config(folder, "vae")
        check_conditions(self.net_settings, self.conditions, net_file)
        check_scaling(vae_settings, vae_file)
        self.image_size, self.latent_shape = self.sizes()
        check_channels(self.latent_shape[0], vae_settings.get("latent_channels"), net_file)
        self.schedule = self.open_schedule()
        self.refined: dict[str, Tensor] = {}  # new values of frozen weights, by their stored names
        self.passes = 0  # samples through the denoiser; a forward with gradient counts as 3, its backward costs 2
        self.doubled = False  # whether the denoiser now predicts for [negative, prompt], as guidance asks it to
        self._guard: Callable[[nn.Module], None] | None = None
        self._components = Components(folder, classes, device, self.part_dtype, self._watch)
        self.embeddings = PromptEmbeddings(
            lambda prompts, negative: self.encode_prompts(prompts, negative),
            self.with_size_ids,
            device,
            options.text_batch,
        )

    # Every kind implements these.

    @abstractmethod
    def vae_levels(self) -> int:
        """The number of resolutions of the autoencoder."""

    @abstractmethod
    def tokenized(self, prompts: Sequence[str], negative: bool) -> Sequence[Tokens]:
        """The input of each of `text_encoders`.

        Raises ConfigError for a prompt that is too long, with the place of the cut.
        """

    @abstractmethod
    def encode_tokens(self, tokens: Sequence[Tokens]) -> TextCond:
        """The text encoders' output, [B, L, D], from the input of each; with gradient to their token embeddings."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> the mean latent [B, C, H, W], scaled as the denoiser expects."""

    @abstractmethod
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, h, w], about [-1, 1]."""

    @abstractmethod
    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """One prediction of `net`; an argument, so that student and teacher share one stateless function."""

    @classmethod
    @abstractmethod
    def write_untrained(cls, folder: Path, words: Sequence[str], seed: int, size: Tiny) -> None:
        """Write a random pipeline, small enough for a CPU; its tokenizer knows `words`."""

    @abstractmethod
    def autoencode(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """For pretraining, with gradient: [B, 3, h, w] decoded from a noisy latent, and a penalty [] on the latents."""

    # A kind overrides these where it differs from the default.

    def sizes(self) -> Sizes:
        """(image size in pixels, latent shape (C, H, W))."""
        where = f"{self.folder}: the config.json of {self.net_name} or vae"
        return square_sizes(self.net_settings, self.vae_levels, self.options.image_size, where)

    def open_schedule(self) -> Schedule:
        """The pipeline's noise schedule. A kind whose shift depends on the image size forces the setting here."""
        return self.schedule_class(load_scheduler(self.folder, self.forced_settings), self.device)

    def part_dtype(self, name: str) -> torch.dtype:
        """The dtype of a component: as the options say, else `dtype`, but fp32 for a VAE that overflows in fp16."""
        chosen = self.options.vae_dtype if name == "vae" else self.options.text_dtype
        if chosen is not None and name != self.net_name:
            return chosen
        may_overflow = self.dtype == torch.float16 and name != self.net_name
        return torch.float32 if may_overflow and forces_upcast(self.folder, name, self.parts[name]) else self.dtype

    @property
    def frozen_dtypes(self) -> list[str]:
        """The pipeline's dtype, and those that the options set otherwise: frozen parts give other values then."""
        options = {"vae": self.options.vae_dtype, "text": self.options.text_dtype}
        return [
            str(self.dtype),
            *(f"{part} {dtype}" for part, dtype in options.items() if dtype not in (None, self.dtype)),
        ]

    def attention_role(self, name: str) -> tuple[str | None, str | None]:
        """(role, part) of a parameter in an attention module, such as ("text_to_image", "k"); see `parts.groups`."""
        return attention_role(name)

    def guided(self, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float) -> Guided:
        """The guided prediction for these prompts: classifier-free, unless a net takes the guidance as an input."""
        return classifier_free(self._doubling(denoiser), cond, negative, guidance)

    def _doubling(self, denoiser: Denoiser) -> Denoiser:
        def predict(noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
            self.doubled = True
            try:
                return denoiser(noisy, time, cond)
            finally:
                self.doubled = False

        return predict

    def encode_prompts(self, prompts: Sequence[str], negative: bool) -> TextCond:
        """The text encoders' output, [B, L, D]; `negative`: as the pipeline encodes a prompt to guide away from."""
        return self.encode_tokens(self.tokenized(prompts, negative))

    def token_ids(self, prompt: str) -> list[int]:
        """The prompt's tokens without padding, in the order of the rows that the denoiser reads."""
        tokens = self.tokenized([prompt], negative=False)[0]
        return tokens.ids[0][tokens.mask[0] > 0].tolist()

    def token_places(self, prompt: str, start: int = 0, end: int | None = None) -> range:
        """The places of the tokens of prompt[start:end] among the rows that the denoiser reads of the prompt."""
        ids, closing = self.token_ids(prompt[:end]), self.token_ids("")
        ends = 0  # tokens that close every prompt
        while ends < len(closing) and ids[-1 - ends] == closing[-1 - ends]:
            ends += 1
        return range(len(self.token_ids(prompt[:start].rstrip())) - ends, len(ids) - ends)

    @property
    def prompt_start(self) -> int:
        """The place of a prompt's first token among those that `tokenized` gives."""
        return 1  # after the start token

    def cross_attention_input(self, net: nn.Module, cond: TextCond) -> Tensor:
        """The input of the keys and values with which the image attends to the text, [B, L, D]."""
        return cond.tokens

    def pipeline_options(self) -> dict[str, Any]:
        """What a call of the plain diffusers pipeline is given, so that it runs and draws as this program does."""
        size = self.options.image_size
        return {} if size is None else {"height": size, "width": size}

    def size_ids_of(self, height: int, width: int) -> tuple[int, ...] | None:
        """SDXL's size conditions of a user's image of this size, resized and cropped to a centred square."""
        return None

    # Components

    @property
    def net(self) -> Any:
        """The denoiser; the engine puts its sharded one here."""
        return self.part(self.net_name)

    @net.setter
    def net(self, net: nn.Module) -> None:
        self._components.put(self.net_name, net)

    @property
    def vae(self) -> Any:
        return self.part("vae")

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the components that are in memory."""
        return self._components.loaded

    def part(self, name: str) -> Any:
        """A component, loaded on first use."""
        return self._components[name]

    def load_net(self, dtype: torch.dtype) -> None:
        """Load the denoiser again, its stored weights rounded once, to `dtype`."""
        self.release(self.net_name)
        self._components.load(self.net_name, dtype)

    def release(self, *names: str) -> None:
        """Free the memory of components, by default of all frozen ones; the next use loads them again."""
        self._components.release(names or self.parts)

    def _watch(self, name: str, model: nn.Module) -> None:
        if name == self.net_name:
            self.adopt(model)

    def adopt(self, net: nn.Module) -> None:
        """Count the passes of a denoiser, and put the guard on it where there is one."""
        self.count_passes_of(net)
        if self._guard is not None:
            self._guard(net)

    def guard_with(self, guard: Callable[[nn.Module], None]) -> None:
        """Put a guard on the denoiser, and on every one that is loaded or adopted later."""
        self._guard = guard
        if self.net_name in self.loaded:
            guard(self.net)

    def count_passes_of(self, net: nn.Module) -> None:
        """Add what `net` computes to `passes`; the denoiser's own passes are counted anyway."""
        net.register_forward_hook(self._count_passes)

    def _count_passes(self, net: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.passes += len(output[0]) * (3 if output[0].requires_grad else 1)

    # The denoiser's weights

    def empty_net(self) -> nn.Module:
        """The denoiser built from its settings, without the stored weights."""
        return model_class(self.net_class).from_config(self.net_settings)

    def stored_weights(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors (or those named) as the folder stores them, or as refined, one at a time."""
        stored = stored_weights(self.folder, self.net_name, names)
        return ((name, self.refined.get(name, tensor)) for name, tensor in stored)

    def stored_entries(self) -> list[Entry]:
        """Names, dtypes and shapes of the denoiser's stored tensors, in the order of `stored_weights`."""
        return stored_entries(self.folder / self.net_name)

    def in_stored_order(self, names: Iterable[str]) -> list[str]:
        """Names of trained parameters in the order of `stored_weights`; an adapter's are where their matrix is."""
        places = {entry.name: place for place, entry in enumerate(self.stored_entries())}
        return sorted(names, key=lambda name: places[merged_name(name)])

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Stored names of the denoiser's parameters by group: `text_to_image.k`, `self_attention`, `block.0`, ..."""
        shapes = {
            name.replace(".base_layer.", "."): tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self.net.named_parameters()
            if ".lora_" not in name
        }
        return parameter_groups(shapes, self.attention_role)

    def add_adapter(self, options: Mapping[str, Any], seed: int, net: nn.Module | None = None) -> list[str]:
        """Add a LoRA adapter (peft.LoraConfig with these options) to `net`, by default the denoiser; returns its
        parameters' names.
        """
        return add_lora(self.net if net is None else net, options, seed)

    def merged(self, weights: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters under the names of the stored checkpoint, LoRA pairs merged into their matrices."""
        return merged_lora(self.net, weights, lambda name: next(tensor for _, tensor in self.stored_weights([name])))

    def attention_maps(
        self, net: nn.Module, places: Tensor, cond: TextCond, layers: Container[str] | None = None
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """Within, a forward pass of `net` fills a dictionary of attention maps to some tokens, with gradient.

        `places`: tokens of each prompt of `cond`, [B, n]; `layers`: names of attention modules, by default all that
        attend to the text. See `recorded_maps`.
        """
        found = {
            name: module
            for name, module in getattr(net, "module", net).named_modules()
            if hasattr(module, "to_k") and self.attention_role(f"{name}.to_k.weight")[0] == "text_to_image"
        }
        chosen = {name: module for name, module in found.items() if layers is None or name in layers}
        return recorded_maps(chosen, places, cond.token_mask)

    # Prompts

    def takes(self, prompt: str) -> bool:
        """Whether the whole prompt fits into the text encoders."""
        try:
            self.tokenized([prompt], negative=False)
        except ConfigError:
            return False
        return True

    def embed(self, prompts: Sequence[str], negative: bool = False) -> TextCond:
        """Embeddings of the prompts, [B, ...], each distinct one encoded once; `negative`: see `encode_prompts`."""
        return self.embeddings.embed(prompts, negative)

    def temporary_embeddings(self) -> AbstractContextManager[None]:
        """Forget at the end what is embedded within."""
        return self.embeddings.temporary()

    def write_embeddings(self, file: Path, key: str, prompts: Sequence[str], negatives: Sequence[str]) -> None:
        """Store the embeddings of these prompts and negative prompts; `key` names what they belong to."""
        self.embeddings.write(file, key, prompts, negatives)

    def read_embeddings(self, file: Path, key: str) -> bool:
        """Take the embeddings from such a file; False when there is none with this key, or it is damaged."""
        return self.embeddings.read(file, key)

    def with_size_ids(self, cond: TextCond) -> TextCond:
        """The condition of drawn images; kinds without size conditions leave it as it is."""
        if self.size_ids is None:
            return cond
        ids = torch.tensor([self.size_ids] * len(cond), dtype=torch.float32, device=self.device)  # [B, 6]
        return replace(cond, size_ids=ids)

    @property
    def words(self) -> Words:
        """Tokens and their embeddings, with gradient: what attacks on the prompt change."""
        return Words(self)

    # Noise and sampling

    def sample_time(self, uniform: Tensor, window: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> times [B]; `window` is a part of the schedule, 0 = clean, 1 = noise."""
        return self.schedule.sample_time(uniform, window)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy latent at `time`: ([B, C, H, W], [B, C, H, W], [B]) -> [B, C, H, W]."""
        return self.schedule.corrupt(clean, noise, time)

    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should predict (noise, velocity or flow): [B, C, H, W]."""
        return self.schedule.goal(clean, noise, time)

    def predicted_clean(self, noisy: Tensor, predicted: Tensor, time: Tensor) -> Tensor:
        """The clean latent that a prediction stands for: [B, C, H, W], [B, C, H, W], [B] -> [B, C, H, W]."""
        return clean_and_noise(noisy, predicted, self.schedule.prediction, *self.schedule.scales(time))[0]

    def noise_level(self, time: Tensor) -> Tensor:
        """[B], 0 (clean) to 1 (noise)."""
        return self.schedule.noise_level(time)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """`denoise` with its net filled in."""
        return lambda noisy, time, cond: self.denoise(net, noisy, time, cond)

    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: TextCond, negative: TextCond, steps: int, guidance: float
    ) -> Tensor:
        """Guided sampling, unit noise [B, C, H, W] -> clean latents [B, C, H, W], without gradient."""
        return sampled_latents(self.schedule, self.guided(denoiser, cond, negative, guidance), noise, steps)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> uint8 images [B, 3, h, w]. Raises NonFiniteError where the autoencoder overflows."""
        with torch.no_grad():
            return images_of(self.decode_pixels(latents), latents)
