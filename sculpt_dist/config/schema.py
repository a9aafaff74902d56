"""The keys of a run's configuration. Each field has a default and, beneath it, a sentence that explains it.

`sculpt-dist config` and the documentation print these sentences (see reference.py), so every key needs one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class ModelConfig:
    """The checkpoint to change."""

    path: str | None = None
    """Diffusers folder, hub id or single .safetensors file; null uses the shipped model of `world`."""
    world: str = "canvas"
    """The embedded world, canvas or gallery: its shipped model without `path`, and what an evaluation takes as a
    default."""
    arch: str = "sd15"
    """Kind of model: the name of a file in sculpt_dist/backbones, such as sd15, sdxl or sana."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    config: str | None = None
    """For a single file: folder or hub id with settings and tokenizers of its kind; null uses those of the public
    model.
    """
    dtype: str = "float32"
    """Data type of the frozen parts, of sampling (except on stage 3, where the sharded net samples) and of the export:
    float32, bfloat16 or float16."""
    text_dtype: str | None = None
    """Data type of the text encoders: float32, bfloat16 or float16; null uses `dtype`."""
    vae_dtype: str | None = None
    """Data type of the autoencoder: float32, bfloat16 or float16; null uses `dtype`, or float32 where the checkpoint
    asks for it in place of float16."""
    export_dtype: str | None = None
    """Data type of the export: float32, bfloat16 or float16; source keeps that of each part of the base; null uses
    `dtype`."""
    image_size: int | None = None
    """Height and width in pixels; null uses the size that the net was trained for."""
    original_size: tuple[int, int] | None = None
    """SDXL's size condition (height, width) in pixels; null uses the image size, or the size of your own image."""
    crop: tuple[int, int] | None = None
    """SDXL's crop condition (top, left) in pixels; null means no crop, or the crop of your own image."""
    target_size: tuple[int, int] | None = None
    """SDXL's target size (height, width) in pixels; null uses the image size."""
    cut_prompts: bool = False
    """Truncate a prompt that is too long for the text encoder, with a warning, instead of refusing it."""
    text_batch: int = 16
    """Prompts that the text encoders take at once; their memory grows with it."""


@dataclass(frozen=True)
class Concept:
    """One concept to forget: an object, or a style with `kind: style`."""

    target: str = MISSING
    """The concept to forget."""
    superclass: str | None = None
    """The broader class that replaces the target; required for an object. A style without one is replaced by the
    style-free prompt."""
    kind: str = "object"
    """object or style."""
    prompts: list[str] | None = None
    """Prompt templates with {concept}; null uses prepare.prompts of this kind."""
    keep: list[str] = field(default_factory=list)
    """Concepts of the same kind that distillation preserves."""


@dataclass(frozen=True)
class PromptsConfig:
    """Templates: {concept} is replaced; text in [square brackets] is dropped when a style has no superclass."""

    object: list[str] = field(default_factory=lambda: ["a photo of {concept}"])
    """Templates for objects."""
    style: list[str] = field(default_factory=lambda: ["a photo[ in {concept} style]"])
    """Templates for styles."""
    files: dict[str, str] = field(default_factory=dict)
    """Target -> .txt or .csv file of complete prompts for its samples; the first prepare.samples of them are used."""


@dataclass(frozen=True)
class PrepareConfig:
    """The training samples, which the base model draws before training starts."""

    samples: int = 100
    """Samples per concept and stream."""
    steps: int = 50
    """Sampler steps per sample."""
    guidance: float = 7.5
    """Classifier-free guidance scale of the sampler."""
    batch: int = 16
    """Samples drawn together; also the number of samples in a shard."""
    images: str | None = None
    """Folder (or its URL) with a subfolder of your own images per concept name, to use instead of drawn samples."""
    images_missing: str = "refuse"
    """What to do where `images` has none of a target: refuse, or draw them with the model."""
    folder: str | None = None
    """Folder in which runs share samples and scores of the base model; null: each run draws its own. Comparisons,
    sweeps and localisations have one in their folder.
    """
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Prompt templates."""


@dataclass(frozen=True)
class HoldConfig:
    """General prompts that a run holds, whatever its method: on their samples the net is drawn to its earlier self."""

    prompts: str | None = None
    """File (.txt or .csv) of prompts without a target, your own or a packaged one such as gallery/hold.txt; null holds
    none. The base model draws a sample of each, once for all concepts. Methods in closed form preserve the prompts."""
    samples: int = 1000
    """Prompts of the list that are used, the first ones."""
    share: float = 1.0
    """Samples of an update, as a share of train.batch."""
    weight: float = 1.0
    """Weight of the term in the loss; where a method combines several gradients, in the last one."""
    source: str = "original"
    """Net whose predictions are held: original (before the first concept) or teacher (before this one)."""


@dataclass(frozen=True)
class AdversarialConfig:
    """An attack within the training, against which a method forgets; after AdvUnlearn."""

    steps: int = 0
    """Steps of the attack before each update; 0 attacks nothing. Each costs three passes of every target's sample."""
    radius: float = 0.3
    """Largest disturbance of a token's embedding, as a share of its norm."""
    lr: float = 0.5
    """Length of a step, as a share of the radius."""
    share: float = 0.5
    """Share of the target's samples that are attacked."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation of one concept."""

    together: bool = False
    """Train all concepts at once, their samples in turn, instead of one after another. steps, mask.collect and
    mask.refresh still count for each concept, so that n concepts take n times as many."""
    steps: int = 450
    """Updates per concept, after the collect steps."""
    batch: int = 2
    """Samples per stream and update, summed over ranks and accumulation steps."""
    accumulate: int = 1
    """Micro-batches per update on each rank."""
    lr: float = 3e-6
    """Peak learning rate."""
    warmup: float = 0.3
    """Share of the updates during which the learning rate rises to its peak."""
    schedule: str = "one_cycle"
    """Learning rate after the warm-up: one_cycle (torch's cosine cycle), cosine (to 0), linear (to 0) or constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    l1sp: float = 0.0
    """Weight of L1-SP, the sum of |w - w0| over the open weights; w0 are those before the first concept."""
    l2sp: float = 0.0
    """Weight of L2-SP, half the sum of (w - w0)^2 over the open weights."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to open weights."""
    clip: float = 0.0
    """Maximum norm of the masked gradient; 0 means no clipping."""
    seed: int = 0
    """Seed of all samples, noise and sample order."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints; 0 saves only at the end of each concept."""
    background_save: bool = True
    """Write checkpoints in the background, from a copy in memory; false makes no copy, and training waits."""
    workers: int = 0
    """Data loader processes per rank."""
    checkpoint_share: float = 0.05
    """Largest share of the time that saving takes: checkpoints come less often where they are slow; 1 sets no limit."""


@dataclass(frozen=True)
class MaskConfig:
    """The dynamic gradient mask: which weights may move."""

    keep: float = 0.5
    """Share of the weights that may move; 1 means no mask."""
    scope: str = "matrix"
    """Scope of the share: matrix (within each matrix) or global (over all matrices)."""
    collect: float = 50
    """Steps that collect saliency before training; a value below 1 is a share of train.steps."""
    refresh: float = 100
    """Updates between turnovers; a value below 1 is a share of train.steps; 0 means a static mask."""
    turnover: float = 0.2
    """Share of open weights swapped at a refresh, with cosine decay; 0 means a static mask."""
    until: float = 0.8
    """Progress (0 to 1) after which the mask no longer changes."""
    saliency: str = "abs_sum"
    """Statistic that ranks weights: abs_sum |sum g|, sum_abs sum |g|, sum_sq sum g^2, or random."""


@dataclass(frozen=True)
class EngineConfig:
    """How the work is distributed over ranks, and what it costs."""

    stage: int = 2
    """ZeRO stage, 0 to 3."""
    precision: str = "fp32"
    """Precision of the trained net: fp32, or bf16 (stages 2 and 3)."""
    moments: str = "all"
    """Weights whose Adam moments are kept: all, or open (less memory, same result)."""
    kernel: str = "auto"
    """Implementation of the masked step: plain (torch), fused (C on CPU, Triton on GPU) or auto (fused where it
    works).
    """
    gathered: float = 1e9
    """Maximum number of parameters that stage 3 gathers at a time; fewer take less memory and more time."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Train with torch.compile (not on stage 3); the first steps then take minutes."""
    timeout: float = 600.0
    """Timeout of a collective in seconds."""
    grace: float = 60.0
    """Seconds that the current step may take after a stop request; a rank that still waits then exits without
    saving.
    """
    draw: str = "sharded"
    """Weights with which stage 3 draws images: sharded (gathered again in every pass), whole (gathered once; every rank
    then holds the whole net) or auto (whole where 1.5 times the net is free on every rank).
    """


@dataclass(frozen=True)
class EvaluateConfig:
    """The images that are drawn and scored before the first concept and after each one."""

    enabled: bool = True
    """Whether to draw and score images."""
    at: Any = "all"
    """After which concepts to score: all, last, every:K, or a list of their numbers such as [1, 10, 30]. The base and
    the last stage always are.
    """
    images: int = 10
    """Images per object and style with the plain prompt."""
    paraphrase_images: int = 2
    """Images per object and style with each paraphrase."""
    steps: int = 25
    """Sampler steps per image."""
    guidance: float = 7.5
    """Classifier-free guidance scale of the sampler."""
    batch: int = 32
    """Images drawn together on each rank."""
    seed: int = 20000
    """Seed from which each image's own seed is derived, independent of the number of ranks."""
    classifier: str | None = None
    """Classifier of the images: canvas, gallery, gallery:witness, clip:FOLDER, image:FOLDER or
    own:package.module:Class; null uses that of `model.world`."""
    witness: str | None = None
    """A second classifier of the same images, such as gallery:witness, by which nothing is chosen: its scores tell
    whether a method deceives the first."""
    prompt: str = "a photo of a {object}[ in {style} style]"
    """Template of the plain prompts."""
    paraphrases: list[str] = field(default_factory=list)
    """Additional templates, scored separately from the plain one."""
    objects: list[str] = field(default_factory=list)
    """Objects to draw; empty means all of the classifier's world. Targets are added."""
    styles: list[str] = field(default_factory=list)
    """Styles to draw; empty means all of the classifier's world."""
    without: list[str] = field(default_factory=list)
    """Pairs OBJECT/STYLE that templates do not draw, such as those that the base model gets wrong."""
    prompts: dict[str, str] | None = field(default_factory=dict)
    """Object or style -> .txt or .csv file of complete prompts, one image each, used instead of the templates."""
    retain_prompts: str | None = None
    """File (.txt or .csv) of prompts without a target; FID, KID and CLIPScore then use only their images."""
    members: dict[str, list[str]] = field(default_factory=dict)
    """Superclass -> the objects that belong to it, for SA."""
    keep_images: str | None = None
    """Images to keep as PNG: all, some (the first of each object and style) or none; null keeps all of a stage if they
    are fewer than 2,000. images.csv lists all that were drawn.
    """
    bootstrap: int = 2000
    """Bootstrap resamples for the 95 % intervals."""
    reference: str | None = None
    """Folder of reference images for FID and KID; `canvas` or `gallery` uses the images of that world."""
    clip: str | None = None
    """Folder of a CLIP model, for CLIPScore and for the features of FID and KID."""
    metrics: dict[str, dict[str, Any]] | None = field(default_factory=dict)
    """Additional metrics: name of a file in evaluation/metrics/ -> its options, {} for none."""
    attacks: list[str] = field(default_factory=list)
    """Attacks on the exported model, by the settings of `attack`: names of files in attacks/."""
    subset: int | None = None
    """Images that a stage between the base and the last draws, evenly of every object, style and kind of prompt; null
    draws all.
    """


@dataclass(frozen=True)
class AttackConfig:
    """The attempts to bring forgotten concepts back. Images are drawn and judged as in `evaluate`."""

    names: list[str] = field(default_factory=list)
    """Attacks of the command `attack`: names of files in attacks/; empty means all that the model allows."""
    budget: str = "light"
    """light, for a CPU and a tiny model, or published: the settings of each attack's paper."""
    cases: int = 5
    """Prompts, each with its own seed, for each concept."""
    prompt: str | None = None
    """Template of these prompts with {concept}; null takes the first of the concept's own (prepare.prompts). A concept
    with a file in evaluate.prompts is asked for with its lines instead."""
    repeat: bool = False
    """Let an attack that ends with its first success also attack prompts which succeed without it."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an attack -> its options (see attacks/)."""


@dataclass(frozen=True)
class RunFolderConfig:
    """Where the run is stored."""

    folder: str = "runs/unlearn"
    """Folder for everything that the run writes."""
    fresh: bool = False
    """Discard an earlier run in this folder, except its drawn samples."""
    override: bool = False
    """Continue a run although its configuration has changed."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers in addition to metrics.jsonl, which is always written."""

    wandb: bool = False
    """Report to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard."""
    sinks: list[str] = field(default_factory=list)
    """Additional trackers: names of files in track/sinks/."""
    project: str | None = None
    """Project in W&B; null uses WANDB_PROJECT of the environment, or else sculpt-dist."""
    name: str | None = None
    """Name of the run in W&B."""
    group: str | None = None
    """W&B group of runs that belong together, such as those of a sweep."""
    artifact: str = "reference"
    """How W&B records the model: none, reference (path and checksums) or files (upload)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint to change."""
    concepts: list[Concept] = field(default_factory=list)
    """The concepts to forget, one after another or together."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """The training samples."""
    hold: HoldConfig = field(default_factory=HoldConfig)
    """General prompts that are held."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The attack within the training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """The gradient mask."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Ranks, precision and memory."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The scored images."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The attacks."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dm_cal"})
    """Name of the method, and its options, which each method declares itself (see methods/)."""
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    """The run folder."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Trackers."""
