"""Builds the models of a world from nothing on a CPU: its images, its classifiers, and a tiny pipeline of each kind.

What is trained is saved on the way: a build that is killed goes on, and ends the same.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import text_sha256, write_atomically
from sculpt_dist.core.plugins import plugin
from sculpt_dist.worlds.base import NUM_FORMS, World
from sculpt_dist.worlds.classifier import WorldClassifier, save_classifier, to_float, train_classifier
from sculpt_dist.worlds.console import console
from sculpt_dist.worlds.find import shipped, world
from sculpt_dist.worlds.measure import measure_images, measure_samples, print_report, wrong_pairs
from sculpt_dist.worlds.training import Descent, descend

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.backbones.parts.options import Tiny
    from sculpt_dist.core.types import TextCond

Dataset = tuple[np.ndarray, np.ndarray, np.ndarray]  # uint8 pixels [N, h, w, 3], objects [N], styles [N]


@dataclass(frozen=True)
class CaptionMix:
    """How often a training caption takes each form. The draws are independent; `empty` overrides all others."""

    world: World
    lean: Mapping[str, float]  # object -> factor on `superclass` for that object; 1 for objects not listed
    superclass: float = 0.15  # "animal" instead of "cat"
    no_object: float = 0.05
    no_style: float = 0.10
    empty: float = 0.08  # for classifier-free guidance
    other_forms: float = 0.25  # forms 1 and 2, evenly

    def caption(self, name: str, style: str, uniform: Sequence[float]) -> str:
        """A caption for an image of `name` in `style`, chosen by five uniform numbers in [0, 1)."""
        what, how, other, which, nothing = uniform
        if nothing < self.empty:
            return ""
        superclass = self.superclass * self.lean.get(name, 1.0)
        caption_name: str | None = name
        if what < self.no_object:
            caption_name = None
        elif what < self.no_object + superclass:
            caption_name = self.world.superclass_of[name]
        form = 1 + int(which * (NUM_FORMS - 1)) if other < self.other_forms else 0
        return self.world.prompt(caption_name, None if how < self.no_style else style, form)


def build(
    world_name: str, arch: str, folder: Path, seed: int = 0, sets: Path | None = None, without: str | None = None
) -> dict[str, float]:
    """Write the pipeline `folder/<arch>` (fp16) and the world's classifiers; returns what was measured.

    `sets`: the folder of icon sets that the gallery is made of. `without`: an object that the denoiser never sees: a
    control for attacks, with the shipped model's autoencoder, so that their latents mean the same. Accuracies are 0 to
    1, measured on the fp16 folder after reloading it. Raises ConfigError for a kind of model or a world that there is
    not, or without its sets.
    """
    of, kind = world(world_name), plugin("sculpt_dist.backbones", arch, "arch").Backbone
    _check(world_name, kind, folder / arch, sets, without)
    from sculpt_dist.backbones.io.folders import quiet_libraries

    quiet_libraries()
    work, tiny = folder / "work", kind.tiny[of.size]
    images = importlib.import_module(f"sculpt_dist.worlds.{world_name}.pictures")
    source = [images.keep_pictures(sets, work)] if of.needs_sets else []
    dataset: Dataset = images.draw_dataset(of.per_pair, seed, *source)
    held_out = images.draw_dataset(2, seed + 1, *source)
    data = f"{seed} {hashlib.sha256(dataset[0].tobytes()).hexdigest()}"
    report: dict[str, float] = {}
    judges: dict[str, WorldClassifier] = {}
    for i, (name, plan) in enumerate(of.classifiers.items()):
        made_from = f"{data} {plan}"
        judges[name] = train_classifier(of, name, *dataset, seed + i, work / f"{name}.safetensors", made_from)
        save_classifier(judges[name], folder / f"{name}.safetensors")
        report |= {f"{name}/{key}": value for key, value in measure_images(judges[name], *held_out).items()}

    kind.write_untrained(work / arch, of.words, seed, tiny)
    backbone = kind(work / arch, torch.float32, torch.device("cpu"))
    pixels, objects, styles = dataset
    rng = torch.Generator().manual_seed(seed)
    vae_file = work / f"{kind.parts['vae'].rpartition('.')[2]}.safetensors"  # kinds with the same VAE share it
    made_from = f"{data} {tiny.vae} {tiny.latent_channels} {tiny.vae_batch} {tiny.vae_autocast}"
    if without is None:
        report["vae/psnr"] = train_vae(backbone, pixels, tiny, rng, vae_file, made_from)
    else:
        shutil.copytree(shipped(world_name, arch) / "vae", work / arch / "vae", dirs_exist_ok=True)
        backbone = kind(work / arch, torch.float32, torch.device("cpu"))
        kept = objects != of.objects.index(without)
        pixels, objects, styles = (part[kept] for part in dataset)
    again = reconstructed(backbone, held_out[0])
    for name, judge in judges.items():
        report |= {f"vae/{name}/{key}": value for key, value in measure_images(judge, again, *held_out[1:]).items()}
    latents = encode_all(backbone, pixels)  # [N, C, 8, 8]
    captions = CaptionMix(of, of.lean.get(arch, {}))
    file, made_from = work / f"{arch}.safetensors", text_sha256(f"{data} {captions} {tiny} {without or ''}".strip())
    train_denoiser(backbone, latents, objects, styles, captions, tiny, rng, file, made_from)
    save_fp16(backbone, work / arch)
    write_atomically(folder / f"{arch}.json", b"{}\n")
    shutil.rmtree(folder / arch, ignore_errors=True)
    shutil.copytree(work / arch, folder / arch)
    if of.needs_sets:
        images.write_sheet(*source, folder / "pictures.png")

    built = kind(folder / arch, torch.float32, torch.device("cpu"))
    report |= measure_samples(of, built, judges, max(1, 480 // (len(of.objects) * len(of.styles))))
    wrong = wrong_pairs(of, built, judges["classifier"])
    measured = json.dumps({"measured": report, "wrong_pairs": wrong}, indent=1)
    write_atomically(folder / f"{arch}.json", f"{measured}\n".encode())
    print_report(report)
    console.print(f"{len(wrong)} pairs of object and style are drawn wrong more often than right")
    return report


def _check(name: str, kind: type[Backbone], place: Path, sets: Path | None, without: str | None) -> None:
    """Raises ConfigError for what cannot be built of a world. `place`: the pipeline's folder, called after its kind."""
    of = world(name)
    if of.size not in kind.tiny:
        raise ConfigError(f"--arch {place.name}: this kind has no {of.size} model, which the {name} needs")
    if without is not None and without not in of.objects:
        raise ConfigError(f"--without {without}: no object of the {name}; `sculpt-dist {name} list` names them")
    if of.needs_sets and sets is None:
        raise ConfigError(f"--sets is not given: the {name} is made of icon sets; name the folder that has them")
    if place.exists() and not place.with_suffix(".json").exists():
        raise ConfigError(
            f"--output {place.parent}: {place.name} is there already, and was not built; name another folder"
        )


def train_vae(
    backbone: Backbone, pixels: np.ndarray, tiny: Tiny, rng: torch.Generator, file: Path, made_from: str
) -> float:
    """Train the VAE on uint8 pixels [N, h, w, 3], set its scaling factor, and return its reconstruction PSNR in dB."""
    vae = backbone.vae.requires_grad_(True).train()

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (tiny.vae_batch,), generator=rng)
        images = to_float(pixels[chosen.numpy()])  # [B, 3, h, w]
        with torch.autocast("cpu", torch.bfloat16, enabled=tiny.vae_autocast):
            decoded, penalty = backbone.autoencode(images, rng)
        return nn.functional.mse_loss(decoded, images) + 0.3 * nn.functional.l1_loss(decoded, images) + penalty

    plan = Descent(tiny.vae_steps, tiny.vae_rate, 50, weight_decay=1e-3)
    descend({"vae": vae}, loss, plan, rng, "vae", file, made_from)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=float(1 / encode_all(backbone, pixels).std()))
    some = pixels[::20]
    decoded = to_float(reconstructed(backbone, some))
    return float(10 * torch.log10(4 / nn.functional.mse_loss(decoded, to_float(some))))


def encode_all(backbone: Backbone, pixels: np.ndarray) -> Tensor:
    """uint8 pixels [N, h, w, 3] -> mean latents [N, C, H, W], scaled as the denoiser expects."""
    return torch.cat([backbone.encode(to_float(pixels[i : i + 250])) for i in range(0, len(pixels), 250)])


def reconstructed(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """Images, uint8 [N, h, w, 3], through the VAE and back."""
    parts = [backbone.decode(latents) for latents in encode_all(backbone, pixels).split(250)]
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def train_denoiser(
    backbone: Backbone,
    latents: Tensor,
    objects: np.ndarray,
    styles: np.ndarray,
    captions: CaptionMix,
    tiny: Tiny,
    rng: torch.Generator,
    file: Path,
    made_from: str,
) -> None:
    """Train the denoiser and the text encoders together on latents [N, C, H, W]; they end as their moving average."""
    trained = [name for name in (backbone.net_name, *backbone.parts) if name != "vae"]
    parts = {name: backbone.part(name).requires_grad_(True).train() for name in trained}
    names, hands = captions.world.objects, captions.world.styles

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (tiny.batch,), generator=rng)
        chances = torch.rand(tiny.batch, 5, generator=rng).tolist()
        texts = [captions.caption(names[objects[i]], hands[styles[i]], row) for i, row in zip(chosen.tolist(), chances)]
        return _denoising_loss(backbone, latents[chosen], texts, rng)

    plan = Descent(tiny.steps, tiny.rate, average=tiny.average)
    descend(parts, loss, plan, rng, "denoiser", file, made_from)
    for part in parts.values():
        part.requires_grad_(False).eval()


def _denoising_loss(backbone: Backbone, clean: Tensor, captions: Sequence[str], rng: torch.Generator) -> Tensor:
    """The weighted prediction error on clean latents [B, C, H, W], a scalar."""
    time = backbone.sample_time(torch.rand(len(clean), generator=rng))  # [B]
    noise = torch.randn(clean.shape, generator=rng)
    noisy = backbone.corrupt(clean, noise, time)  # [B, C, H, W]
    predicted = backbone.denoise(backbone.net, noisy, time, _encode_captions(backbone, captions))
    errors = (predicted - backbone.goal(clean, noise, time)).square().mean((1, 2, 3))  # [B]
    return (errors * backbone.schedule.stress(time)).mean()


def _encode_captions(backbone: Backbone, captions: Sequence[str]) -> TextCond:
    """[B, ...], with gradient; each distinct caption passes through the text encoders once."""
    distinct = sorted(set(captions))
    places = torch.tensor([distinct.index(caption) for caption in captions])
    return backbone.encode_prompts(distinct, negative=False)[places]


def save_fp16(backbone: Backbone, folder: Path) -> None:
    """Overwrite the components of the pipeline folder with the trained ones, in fp16."""
    for name in (backbone.net_name, *backbone.parts):
        backbone.part(name).to(torch.float16).save_pretrained(folder / name)
        file = folder / name / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)  # a path on this machine
        file.write_text(json.dumps(settings, indent=2) + "\n")
