"""The keys of a run's configuration. Each field has a default and, beneath it, a sentence that says what it does.

`sculpt-dist config` and the documentation print these sentences (see reference.py), so no key goes without one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class ModelConfig:
    """The checkpoint to change."""

    path: str | None = None
    """Diffusers folder, hub id or single .safetensors file; null takes the shipped canvas model of `arch`."""
    arch: str = "sd15"
    """Kind of model: the name of a file in sculpt_dist/backbones, such as sd15, sdxl or sana."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    config: str | None = None
    """For a single file: folder or hub id with settings and tokenizers of the same kind; null takes the public model's."""
    dtype: str = "float32"
    """Type of the frozen parts, of drawing (on stage 3 the sharded net draws instead) and of the export: float32, bfloat16
    or float16."""
    image_size: int | None = None
    """Height and width in pixels; null takes the size that the net was made for."""
    original_size: tuple[int, int] | None = None
    """SDXL's size condition (height, width) in pixels; null takes the image size, or the size of your own image."""
    crop: tuple[int, int] | None = None
    """SDXL's crop condition (top, left) in pixels; null means no crop, or that of your own image."""
    target_size: tuple[int, int] | None = None
    """SDXL's target size (height, width) in pixels; null takes the image size."""
    cut_prompts: bool = False
    """Truncate a prompt that is too long for the text encoder, with a warning, instead of refusing it."""


@dataclass(frozen=True)
class Concept:
    """One concept to forget: an object, or a style with `kind: style`."""

    target: str = MISSING
    """The concept to forget."""
    superclass: str | None = None
    """The broader class that the target turns into; required for an object. A style without one turns into the
    style-free prompt."""
    kind: str = "object"
    """object or style."""
    prompts: list[str] | None = None
    """Prompt templates with {concept}; null takes prepare.prompts of this kind."""
    keep: list[str] = field(default_factory=list)
    """Concepts of the same kind that distillation holds in place."""


@dataclass(frozen=True)
class PromptsConfig:
    """Templates: {concept} is replaced; text in [square brackets] is dropped when a style has no superclass."""

    object: list[str] = field(default_factory=lambda: ["a photo of {concept}"])
    """Templates for objects."""
    style: list[str] = field(default_factory=lambda: ["a photo[ in {concept} style]"])
    """Templates for styles."""
    files: dict[str, str] = field(default_factory=dict)
    """Target -> .txt or .csv file of whole prompts for its samples; the first prepare.samples of them are used."""


@dataclass(frozen=True)
class PrepareConfig:
    """The training samples, which the base model draws before training."""

    samples: int = 100
    """Samples per concept and stream."""
    steps: int = 50
    """Sampler steps per sample."""
    guidance: float = 7.5
    """Classifier-free guidance scale of the sampler."""
    batch: int = 16
    """Samples drawn together; also the number of samples in a shard."""
    images: str | None = None
    """Folder with one subfolder of your images per concept name, used instead of drawing."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Prompt templates."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation of one concept."""

    steps: int = 450
    """Updates per concept, after the collect steps."""
    batch: int = 2
    """Samples per stream and update, over all ranks and accumulation steps."""
    accumulate: int = 1
    """Micro-batches per update on each rank."""
    lr: float = 3e-6
    """Peak learning rate."""
    warmup: float = 0.3
    """Share of the updates in which the learning rate rises to its peak."""
    schedule: str = "one_cycle"
    """Learning rate after the warm-up: one_cycle (torch's cosine cycle), cosine (to 0), linear (to 0) or constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of open weights."""
    clip: float = 0.0
    """Largest norm of the masked gradient; 0 means no clipping."""
    seed: int = 0
    """Seed of all samples, noise and order."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints; 0 saves only at each concept's end."""
    background_save: bool = True
    """Write checkpoints beside the training from a copy in memory; false makes no copy, and training waits."""
    workers: int = 0
    """Loader processes per rank."""


@dataclass(frozen=True)
class MaskConfig:
    """The dynamic gradient mask: which weights may move."""

    keep: float = 0.5
    """Share of the weights that may move; 1 means no mask."""
    scope: str = "matrix"
    """Where the share is counted: matrix (in each matrix) or global (over all of them)."""
    collect: float = 50
    """Steps that collect saliency before training; below 1, a share of train.steps."""
    refresh: float = 100
    """Updates between turnovers; below 1, a share of train.steps; 0 means a static mask."""
    turnover: float = 0.2
    """Share of open weights swapped at a refresh, decayed by a cosine; 0 means a static mask."""
    until: float = 0.8
    """Progress (0 to 1) after which the mask stays as it is."""
    saliency: str = "abs_sum"
    """Statistic that ranks weights: abs_sum |sum g|, sum_abs sum |g|, sum_sq sum g^2, or random."""


@dataclass(frozen=True)
class EngineConfig:
    """How the work is spread over ranks, and what it costs."""

    stage: int = 2
    """ZeRO stage, 0 to 3."""
    precision: str = "fp32"
    """Precision of the trained net: fp32, or bf16 (stages 2 and 3)."""
    moments: str = "all"
    """Weights for which Adam's moments are kept: all, or open (less memory, the same result)."""
    kernel: str = "auto"
    """Implementation of the masked step: plain (torch), fused (C on a CPU, Triton on a GPU), or auto = fused where it works."""
    gathered: float = 1e9
    """Parameters that stage 3 holds whole at a time, at most; fewer take less memory and more time."""
    checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    compile: bool = False
    """Compile the net with torch.compile for training (not on stage 3); the first steps then take minutes."""
    timeout: float = 600.0
    """Seconds that a collective may wait."""
    grace: float = 60.0
    """Seconds from a request to stop to the end of the step; a rank that still waits then leaves without saving."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The images that are drawn and scored before, between and after the concepts."""

    enabled: bool = True
    """Whether to draw and score images at all."""
    images: int = 10
    """Images per object and style, plain prompts."""
    paraphrase_images: int = 2
    """Images per object, style and paraphrase."""
    steps: int = 25
    """Sampler steps per image."""
    guidance: float = 7.5
    """Classifier-free guidance scale of the sampler."""
    batch: int = 32
    """Images drawn together on a rank."""
    seed: int = 20000
    """Seed of the images; each has a seed of its own, whatever the number of ranks."""
    classifier: str = "canvas"
    """Judge of the images: canvas, clip:FOLDER, image:FOLDER or own:package.module:Class."""
    prompt: str = "a photo of a {object}[ in {style} style]"
    """Template of the plain prompts."""
    paraphrases: list[str] = field(default_factory=list)
    """Further templates, scored apart from the plain one."""
    objects: list[str] = field(default_factory=list)
    """Objects to draw; empty takes all of the canvas. Targets are added."""
    styles: list[str] = field(default_factory=list)
    """Styles to draw; empty takes all of the canvas."""
    prompts: dict[str, str] | None = field(default_factory=dict)
    """Object or style -> .txt or .csv file of whole prompts, one image each, used instead of the templates."""
    retain_prompts: str | None = None
    """File (.txt or .csv) of prompts without a target; FID, KID and CLIPScore then look at their images alone."""
    members: dict[str, list[str]] = field(default_factory=dict)
    """Superclass -> its objects, for SA."""
    bootstrap: int = 2000
    """Resamplings for the 95 % intervals."""
    reference: str | None = None
    """Folder of reference images for FID and KID; canvas takes drawings of the canvas world."""
    clip: str | None = None
    """Folder of a CLIP model for CLIPScore, and for the features of FID and KID."""
    metrics: dict[str, dict[str, Any]] | None = field(default_factory=dict)
    """Further metrics and their options: name of a file in evaluation/metrics/ -> options, {} for none."""


@dataclass(frozen=True)
class RunFolderConfig:
    """Where the run lives."""

    folder: str = "runs/unlearn"
    """Folder of everything that the run writes."""
    fresh: bool = False
    """Discard what the folder holds of an earlier run, except drawn samples."""
    override: bool = False
    """Continue although the configuration has changed since."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers besides metrics.jsonl, which is always written."""

    wandb: bool = False
    """Report to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard."""
    sinks: list[str] = field(default_factory=list)
    """Further trackers: names of files in track/sinks/."""
    project: str = "sculpt-dist"
    """Project in W&B."""
    name: str | None = None
    """Name of the run in W&B."""
    group: str | None = None
    """Group of runs that belong together, such as those of a sweep."""
    artifact: str = "reference"
    """The model in W&B: none, reference (path and checksums) or files (uploaded)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint to change."""
    concepts: list[Concept] = field(default_factory=list)
    """What to forget, one concept after another."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """The training samples."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """The gradient mask."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Ranks, precision and memory."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The scored images."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dm_cal"})
    """The method's name and its options; each method declares its own (see methods/)."""
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    """The run folder."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Trackers."""
