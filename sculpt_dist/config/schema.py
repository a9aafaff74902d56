"""The sections of a configuration, and those of a comparison and a sweep: each key with its default, its meaning and its unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = (
        None  # diffusers folder, hub id or single .safetensors file; null = the shipped canvas model of `arch`
    )
    arch: str = "sd15"
    revision: str | None = None  # of a hub id
    config: str | None = (
        None  # of a single file: folder or hub id of the same kind, for settings and tokenizers; null = the public one
    )
    dtype: str = (
        "float32"  # of the frozen parts, of drawing (but on stage 3, where the sharded net draws), and of the export
    )
    image_size: int | None = None  # pixels, height = width; null = what the net was made for
    original_size: tuple[int, int] | None = (
        None  # sdxl's size conditions, (height, width); null = the image size, or an own image's
    )
    crop: tuple[int, int] | None = None  # sdxl, (top, left); null = none, or an own image's
    target_size: tuple[int, int] | None = None  # sdxl, (height, width); null = the image size
    cut_prompts: bool = (
        False  # cut a prompt that is too long for the text encoder, with a warning, instead of refusing it
    )


@dataclass(frozen=True)
class Concept:
    """One concept to forget, or the name of a style with `kind: style`."""

    target: str = MISSING
    superclass: str | None = None  # an object needs one; a style without one turns into the style-free prompt
    kind: str = "object"
    prompts: list[str] | None = None  # templates with {concept}; null = prepare.prompts of this kind
    keep: list[str] = field(default_factory=list)  # concepts of the same kind to hold in place by distillation


@dataclass(frozen=True)
class PromptsConfig:
    """Templates: {concept} is replaced; text in [square brackets] is dropped when a style has no superclass."""

    object: list[str] = field(default_factory=lambda: ["a photo of {concept}"])
    style: list[str] = field(default_factory=lambda: ["a photo[ in {concept} style]"])
    files: dict[str, str] = field(
        default_factory=dict
    )  # target -> .txt or .csv of whole prompts for its samples; prepare.samples of them


@dataclass(frozen=True)
class PrepareConfig:
    samples: int = 100  # per concept and stream
    steps: int = 50
    guidance: float = 7.5
    batch: int = 16  # samples drawn together, and the size of a shard
    images: str | None = None  # folder with one subfolder of images per concept name, used instead of drawing
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 450  # updates per concept, after the collect steps
    batch: int = 2  # per stream, global over ranks and accumulation
    accumulate: int = 1
    lr: float = 3e-6
    warmup: float = 0.3  # share of the updates in which the one-cycle schedule rises
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 0.0  # norm of the masked gradient; 0 = no clipping
    seed: int = 0
    checkpoint_every: float = 60.0  # seconds; 0 = only at each concept's end
    background_save: bool = (
        True  # write checkpoints beside the training, from a copy in memory; false: no copy, the training waits
    )
    workers: int = 0  # loader processes per rank


@dataclass(frozen=True)
class MaskConfig:
    keep: float = 0.5  # share of the weights that may move
    scope: str = "matrix"  # matrix or global
    collect: float = 50  # steps before training; below 1: share of train.steps
    refresh: float = 100  # updates between turnovers; below 1: share of train.steps; 0 = static mask
    turnover: float = 0.2  # share of open weights swapped at a refresh, decayed by a cosine; 0 = static mask
    until: float = 0.8  # no turnover after this progress
    saliency: str = "abs_sum"  # abs_sum |sum g|, sum_abs sum |g|, sum_sq sum g^2, random


@dataclass(frozen=True)
class EngineConfig:
    stage: int = 2  # ZeRO stage 0-3
    precision: str = "fp32"  # fp32 or bf16
    moments: str = "all"  # of which weights Adam's moments are held: all, or open (less memory, the same result)
    kernel: str = "auto"  # who computes the masked step: plain (torch), fused (C on a CPU, Triton on a GPU), auto = fused where it can
    gathered: float = (
        1e9  # parameters that stage 3 holds whole at a time, at most; fewer take less memory and more time
    )
    checkpointing: bool = False  # activations are computed again in the backward: less memory, about a third more time
    compile: bool = (
        False  # torch.compile of the net for the training; its first steps then take minutes; not on stage 3
    )
    timeout: float = 600.0  # seconds that a collective may wait
    grace: float = 60.0  # seconds from a request to stop to the end of the step; a rank that still waits then leaves without saving


@dataclass(frozen=True)
class EvaluateConfig:
    enabled: bool = True
    images: int = 10  # per object x style pair, plain prompts
    paraphrase_images: int = 2  # per object x style pair and paraphrase
    steps: int = 25
    guidance: float = 7.5
    batch: int = 32
    seed: int = 20000  # image i of a pair has its own seed, whatever the number of ranks
    classifier: str = "canvas"  # canvas, clip:FOLDER, image:FOLDER, own:package.module:Class
    prompt: str = "a photo of a {object}[ in {style} style]"
    paraphrases: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)  # empty = all that the canvas has; targets are added
    styles: list[str] = field(default_factory=list)
    prompts: dict[str, str] | None = field(
        default_factory=dict
    )  # object or style -> .txt or .csv of whole prompts, an image each, not the templates
    retain_prompts: str | None = (
        None  # .txt or .csv of prompts without a target: FID, KID and CLIPScore are then of their images alone
    )
    members: dict[str, list[str]] = field(default_factory=dict)  # superclass -> its objects, for SA
    bootstrap: int = 2000
    reference: str | None = None  # folder of images for FID and KID; canvas = drawings of the canvas world
    clip: str | None = None  # folder of a CLIP model for CLIPScore, and for FID and KID features


@dataclass(frozen=True)
class RunFolderConfig:
    folder: str = "runs/unlearn"
    fresh: bool = False  # discard what the folder holds of this run
    override: bool = False  # go on although the configuration was changed since


@dataclass(frozen=True)
class TrackConfig:
    """Who is told of a run besides metrics.jsonl, which is always there."""

    wandb: bool = False
    tensorboard: bool = False  # into RUN/tensorboard
    project: str = "sculpt-dist"
    name: str | None = None
    group: str | None = None  # of runs that belong together, as those of a sweep
    artifact: str = "reference"  # the model in W&B: none, reference (path and checksums) or files (uploaded)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; `method` stays untyped here but for its name (see build.method)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    concepts: list[Concept] = field(default_factory=list)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dm_cal"})
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass(frozen=True)
class Row:
    """A method with its settings, as a comparison file names it."""

    name: str = MISSING
    config: str = MISSING  # a yaml file, beside the comparison's
    overrides: list[str] = field(default_factory=list)
    per_backbone: dict[str, list[str]] = field(default_factory=dict)  # further overrides
    note: str = ""  # said beside its name


@dataclass(frozen=True)
class Table:
    """A part of a comparison: its rows on each backbone, over the seeds."""

    title: str = MISSING
    sequence: str = MISSING
    backbones: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # names; empty = all
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])


@dataclass(frozen=True)
class Comparison:
    """A comparison file (see compare.py)."""

    folder: str = MISSING
    record: str = (
        ""  # a file that keeps what the tables need of every cell, so that a finished cell need not run again elsewhere
    )
    against: str = MISSING  # the row that the others' differences are taken to
    sequences: dict[str, list[Concept]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # of every cell
    notes: list[str] = field(default_factory=list)  # said under the tables


@dataclass(frozen=True)
class Metric:
    """What a sweep optimises."""

    name: str = MISSING
    goal: str = "minimize"  # or maximize


@dataclass(frozen=True)
class SweepFile:
    """A sweep in W&B's own schema (https://docs.wandb.ai/guides/sweeps/sweep-config-keys), but for `parameters` and `command`.

    What only the server needs is read over: its keys are allowed, and do nothing here.
    """

    method: str = MISSING  # grid, random or bayes
    metric: Metric = field(default_factory=Metric)
    run_cap: int | None = None  # trials at most; random and bayes need it
    name: str | None = None
    early_terminate: dict[str, Any] | None = None
    program: str | None = None
    project: str | None = None
    entity: str | None = None
    description: str | None = None
    apiVersion: str | None = None
    kind: str | None = None
