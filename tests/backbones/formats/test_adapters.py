"""Adapters: loaded by plain diffusers they predict as the changed net; the loss agrees with numpy's SVD; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import PROJECT, TINY_RUN, sculpt, weights
from safetensors import safe_open
from safetensors.torch import load_file

from sculpt_dist.backbones.formats.adapter import WEIGHT_NAME, Lost, read_lost, write_adapter, write_adapter_of
from sculpt_dist.backbones.io.folders import stored_weights
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.maths.low_rank import low_rank_factors
from sculpt_dist.run.export_forms import Form, _write_adapter
from sculpt_dist.run.stages import export_only

CANVAS = PROJECT / "sculpt_dist" / "assets" / "canvas"
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sana": "SanaPipeline"}
ATTENTION = {  # matrices of different shapes
    "sd15": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v.weight",
    ],
    "sana": [
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.3.attn1.to_out.0.weight",
        "transformer_blocks.2.attn2.to_q.weight",
    ],
}
ATTENTION["sdxl"] = ATTENTION["sd15"]
BIAS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias"
Tensors = dict[str, torch.Tensor]


def net_name(arch: str) -> str:
    return "transformer" if arch == "sana" else "unet"


def base_weights(arch: str) -> Tensors:
    return {name: tensor.float() for name, tensor in stored_weights(CANVAS / arch, net_name(arch))}


def change_of(shape: torch.Size, rank: int | None, seed: int) -> torch.Tensor:
    """A random change of this rank (None: full rank) with entries of about 0.02."""
    rng = torch.Generator().manual_seed(seed)
    out, width = shape[0], shape[1:].numel()
    if rank is None:
        return 0.02 * torch.randn(shape, generator=rng)
    return 0.02 * (torch.randn(out, rank, generator=rng) @ torch.randn(rank, width, generator=rng)).view(shape)


def changed(
    folder: Path, arch: str, names: list[str], rank: int | None = 2, dtype: torch.dtype = torch.float32
) -> tuple[Path, Tensors]:
    """(the shipped model with these parameters changed, as a run exports it; the changes)."""
    base = base_weights(arch)
    changes = {name: change_of(base[name].shape, rank, seed) for seed, name in enumerate(names)}
    whole = {name: tensor + changes.get(name, 0.0) for name, tensor in base.items()}
    write_pipeline(CANVAS / arch, folder, net_name(arch), dtype, iter(whole.items()))
    return folder, changes


def pipeline_of(folder: Path, arch: str) -> Any:
    import diffusers

    return getattr(diffusers, PIPELINES[arch]).from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)


def prediction(pipeline: Any, arch: str) -> torch.Tensor:
    """The denoiser's prediction on fixed inputs, [2, 4, 8, 8]."""
    rng = torch.Generator().manual_seed(5)
    net = getattr(pipeline, net_name(arch)).eval()
    noisy, time = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([300.0, 700.0])
    width = net.config.caption_channels if arch == "sana" else net.config.cross_attention_dim
    tokens, more = torch.randn(2, 7, width, generator=rng), {}
    if arch == "sdxl":
        pooled = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
        more = {
            "added_cond_kwargs": {
                "text_embeds": torch.randn(2, pooled, generator=rng),
                "time_ids": torch.full((2, 6), 32.0),
            }
        }
    with torch.no_grad():
        return net(noisy, timestep=time, encoder_hidden_states=tokens, **more).sample


def assert_loads(file: Path, model: Path, arch: str, base: Path | None = None) -> None:
    """Plain diffusers with base and adapter predicts as the changed net, which differs from the base."""
    pipeline = pipeline_of(base or CANVAS / arch, arch)
    before = prediction(pipeline, arch)
    where = file.parent if file.name == WEIGHT_NAME else file
    pipeline.load_lora_weights(where, local_files_only=True)
    expected = prediction(pipeline_of(model, arch), arch)
    torch.testing.assert_close(prediction(pipeline, arch), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return content.metadata()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Tensors]]:
    """A model of each kind with a change of rank 2 in its attention."""
    folder = tmp_path_factory.mktemp("models")
    return {arch: changed(folder / arch, arch, names) for arch, names in ATTENTION.items()}


@pytest.mark.parametrize(
    ("arch", "form"), [("sd15", "lora"), ("sdxl", "lora"), ("sana", "lora"), ("sd15", "kohya"), ("sdxl", "kohya")]
)
def test_plain_diffusers_loads_it_and_predicts_as_the_changed_net(models, tmp_path, arch, form):
    model, _ = models[arch]
    file = tmp_path / "out" / (WEIGHT_NAME if form == "lora" else "kohya.safetensors")
    lost = write_adapter(CANVAS / arch, model, file, form, rank=2)
    assert lost.rank == 2 and 0 <= lost.share <= lost.worst < 1e-5
    assert read_lost(file) == lost
    beside = ["adapter_config.json"] if form == "lora" else []
    assert sorted(path.name for path in file.parent.iterdir()) == [*beside, file.name]
    assert_loads(file, model, arch)


def test_the_keys_are_those_that_diffusers_itself_writes(models, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for arch in PIPELINES:
        write_adapter(CANVAS / arch, models[arch][0], tmp_path / WEIGHT_NAME, rank=3)
        pipeline = pipeline_of(CANVAS / arch, arch)
        net = getattr(pipeline, net_name(arch))
        net.add_adapter(LoraConfig(r=3, target_modules=[name.removesuffix(".weight") for name in ATTENTION[arch]]))
        pipeline.save_lora_weights(tmp_path / arch, **{f"{net_name(arch)}_lora_layers": get_peft_model_state_dict(net)})
        expected, written = load_file(tmp_path / arch / WEIGHT_NAME), load_file(tmp_path / WEIGHT_NAME)
        assert {name: tensor.shape for name, tensor in written.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
    about = json.loads(metadata_of(tmp_path / WEIGHT_NAME)["lora_adapter_metadata"])
    assert about["transformer.r"] == about["transformer.lora_alpha"] == 3
    assert len(about["transformer.target_modules"]) == 3


def test_kohya_keys_are_those_that_comfyui_and_a1111_read(models, tmp_path):
    """diffusers' names with underscores for SD 1.x, those of the original layout for SDXL; A1111 reads the metadata."""
    file = tmp_path / "kohya.safetensors"
    expected = {
        "sd15": ("down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", "sd_v1"),
        "sdxl": ("input_blocks_3_1_transformer_blocks_0_attn2_to_k", "sdxl_base_v1-0"),
    }
    for arch, (module, version) in expected.items():
        write_adapter(CANVAS / arch, models[arch][0], file, "kohya", rank=2)
        held = load_file(file)
        up, down, alpha = (held[f"lora_unet_{module}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        change = models[arch][1][ATTENTION[arch][0]]
        assert len(held) == 9 and alpha.shape == () and alpha == 2
        torch.testing.assert_close(up @ down * (alpha / len(down)), change, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # each factor has the root of every singular value
        about = metadata_of(file)
        assert about["ss_base_model_version"] == version
        assert about["ss_network_dim"] == about["ss_network_alpha"] == "2"


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_factors_are_the_best_of_their_rank(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down, squares = low_rank_factors(matrix, rank)
    kept = min(rank, *shape)
    assert up.shape == (shape[0], kept) and down.shape == (kept, shape[1])
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(up @ down, (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-10)
    assert all(torch.equal(*pair) for pair in zip((up, down, squares), low_rank_factors(matrix, rank)))  # deterministic


def test_a_zero_change_has_zero_factors():
    up, down, _ = low_rank_factors(torch.zeros(3, 4), 2)
    assert not up.any() and not down.any()


def test_the_loss_of_a_change_of_higher_rank_agrees_with_numpy(models, tmp_path):
    """From the singular values: rank 1 keeps the larger of two."""
    model, changes = models["sd15"]
    lost = write_adapter(CANVAS / "sd15", model, tmp_path / "a.safetensors", rank=1)
    values = {name: np.linalg.svd(change.double().numpy(), compute_uv=False) for name, change in changes.items()}
    shares = {name: np.sqrt((s[1:] ** 2).sum() / (s**2).sum()) for name, s in values.items()}
    worst = max(shares, key=shares.get)
    together = np.sqrt(sum((s[1:] ** 2).sum() for s in values.values()) / sum((s**2).sum() for s in values.values()))
    assert lost == Lost(1, pytest.approx(together, rel=1e-4), pytest.approx(shares[worst], rel=1e-4), worst, 2)
    assert str(lost._replace(share=0.032, worst=0.08)) == f"rank 1: 3.2 % of the change is lost (worst: {worst} 8 %)"


def test_the_rank_that_would_lose_at_most_five_percent_is_named_and_keeps_its_word(tmp_path):
    model, _ = changed(tmp_path / "model", "sd15", ATTENTION["sd15"], rank=None)
    lost = write_adapter(CANVAS / "sd15", model, tmp_path / "a.safetensors", rank=4)
    assert lost.enough is not None and f"; --rank {lost.enough} would lose at most 5 %" in str(lost)
    enough, less = (
        write_adapter(CANVAS / "sd15", model, tmp_path / "b.safetensors", rank=lost.enough - fewer) for fewer in (0, 1)
    )
    assert enough.share <= 0.05 < less.share and "would lose" not in str(enough)


def test_the_folder_of_an_adapter_is_one_that_peft_reads(models, tmp_path):
    from peft import LoraConfig

    model, changes = models["sd15"]
    write_adapter(CANVAS / "sd15", model, tmp_path / WEIGHT_NAME, rank=2)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha) == (2, 2)
    assert {f"{module}.weight" for module in config.target_modules} == changes.keys()
    net = pipeline_of(CANVAS / "sd15", "sd15").unet
    net.add_adapter(config)
    built = {name.replace(".default", "") for name, _ in net.named_parameters() if ".lora_" in name}
    assert built == {key.removeprefix("unet.") for key in load_file(tmp_path / WEIGHT_NAME)}


def test_a_change_of_full_rank_is_complete_at_full_rank_and_the_file_has_no_higher_rank(tmp_path):
    names = [
        "conv_out.weight",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    ]  # [4, 56, 3, 3], [80, 64]
    model, _ = changed(tmp_path / "model", "sd15", names, rank=None)
    file = tmp_path / WEIGHT_NAME
    assert write_adapter(CANVAS / "sd15", model, file, rank=8).share > 0.3
    lost = write_adapter(CANVAS / "sd15", model, file, rank=1000)
    assert lost.rank == 64 and lost.worst < 1e-5
    assert load_file(file)["unet.conv_out.lora_B.weight"].shape == (4, 64, 1, 1)  # its own rank is 4, the rest is zeros
    assert_loads(file, model, "sd15")


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_adapters_carry_every_matrix_and_kernel_of_a_unet(tmp_path, arch, form):
    names = [name for name, tensor in base_weights(arch).items() if tensor.dim() > 1]
    assert any("resnets.0.conv1" in name for name in names) and any("time_embedding" in name for name in names)
    assert any("downsamplers" in name for name in names) and any("upsamplers" in name for name in names)
    model, _ = changed(tmp_path / "model", arch, names)
    file = tmp_path / "adapter.safetensors"
    assert write_adapter(CANVAS / arch, model, file, form, rank=2).worst < 1e-5
    assert len(load_file(file)) == len(names) * (3 if form == "kohya" else 2)
    assert_loads(file, model, arch)


def test_adapters_carry_all_of_sana_except_grouped_kernels_and_tables(tmp_path):
    names = [name for name, tensor in base_weights("sana").items() if tensor.dim() > 1]
    kept = [name for name in names if "conv_depth" not in name and "scale_shift_table" not in name]
    assert len(names) > len(kept) > 30
    model, _ = changed(tmp_path / "model", "sana", kept)
    assert write_adapter(CANVAS / "sana", model, tmp_path / WEIGHT_NAME, rank=2).worst < 1e-5
    assert_loads(tmp_path / WEIGHT_NAME, model, "sana")
    for left in [*sorted(set(names) - set(kept))[:2], "scale_shift_table"]:
        moved = [(left, base_weights("sana")[left] * 2)]
        with pytest.raises(ModelError, match=f"^{left} was changed, which no adapter can carry.*--as delta"):
            write_adapter_of(CANVAS / "sana", moved, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_the_adapter_of_a_half_precision_export_holds_only_what_the_run_changed(models, tmp_path):
    """The base is fp16, the export bf16: everything is rounded, but unchanged matrices are not in the adapter."""
    model, changes = changed(tmp_path / "model", "sd15", ATTENTION["sd15"], dtype=torch.bfloat16)
    lost = write_adapter(CANVAS / "sd15", model, tmp_path / "a.safetensors", rank=2)
    assert len(load_file(tmp_path / "a.safetensors")) == 2 * len(changes)
    assert 1e-3 < lost.share < 0.1  # the rounding of the changed matrices


def test_no_adapter_is_written_for_equal_incomparable_or_unsupported_models(models, tmp_path):
    base, (model, _) = CANVAS / "sd15", models["sd15"]
    file = tmp_path / "out" / "a.safetensors"
    biased, _ = changed(tmp_path / "biased", "sd15", [*ATTENTION["sd15"], BIAS])
    broken = {ATTENTION["sd15"][0]: torch.full((80, 64), torch.nan)}
    with pytest.raises(ModelError, match=f"{BIAS} was changed, which no adapter can carry"):
        write_adapter(base, biased, file)
    with pytest.raises(ModelError, match="nothing changed, so there is nothing to write"):
        write_adapter(base, base, file)
    with pytest.raises(ModelError, match="give the base that the model was made from"):
        write_adapter(base, models["sdxl"][0], file)
    with pytest.raises(ModelError, match=r"x.weight is missing, not \(2, 2\); give the base"):
        write_adapter_of(base, [("x.weight", torch.zeros(2, 2))], file)
    with pytest.raises(ModelError, match=r"conv_in.bias is \(56,\), not \(2, 2\); give the base"):
        write_adapter_of(base, [("conv_in.bias", torch.zeros(2, 2))], file)
    with pytest.raises(ModelError, match="not finite"):
        write_adapter_of(base, iter(broken.items()), file)
    with pytest.raises(ConfigError, match="--as kohya: no such layout exists for a SanaPipeline.*--as lora"):
        write_adapter(CANVAS / "sana", models["sana"][0], file, "kohya")
    with pytest.raises(ConfigError, match="--rank 0: .* 1 or more"):
        write_adapter(base, model, file, rank=0)
    with pytest.raises(ConfigError, match="end in .safetensors"):
        write_adapter(base, model, tmp_path / "out")
    for part in (base, model):
        with pytest.raises(ConfigError, match="is a weight file of the"):
            write_adapter(base, model, part / "unet" / "diffusion_pytorch_model.safetensors")
    assert not list((tmp_path / "out").iterdir())


def test_wrong_export_options_are_detected_before_the_run_folder_is_touched(tmp_path):
    config = load_config(None, [f"run.folder={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="--rank 0"):
        export_only(config, "lora", rank=0)
    with pytest.raises(ConfigError, match="choose one of folder, single, delta, lora, kohya"):
        export_only(config, "locon")
    assert not (tmp_path / "run").exists()


def test_a_kohya_file_of_stable_diffusion_2_names_its_version_and_loads(tmp_path):
    """It has linear projections in place of 1 x 1 convolutions; kohya's files use diffusers' names, as for 1.x."""
    from diffusers import UNet2DConditionModel

    base, model = tmp_path / "base", tmp_path / "model"
    shutil.copytree(CANVAS / "sd15", base, ignore=shutil.ignore_patterns("unet"))
    settings = UNet2DConditionModel.load_config(CANVAS / "sd15" / "unet") | {"use_linear_projection": True}
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_config(settings)
    net.save_pretrained(base / "unet")
    name = "mid_block.attentions.0.proj_in.weight"
    whole = {
        key: tensor + (change_of(tensor.shape, 2, 0) if key == name else 0.0)
        for key, tensor in net.state_dict().items()
    }
    write_pipeline(base, model, "unet", torch.float32, iter(whole.items()))
    file = tmp_path / "kohya.safetensors"
    assert write_adapter(base, model, file, "kohya", rank=2).worst < 1e-5
    assert (metadata_of(file)["ss_base_model_version"], metadata_of(file)["ss_v2"]) == ("sd_v2", "True")
    assert load_file(file)["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].shape == (80, 2)
    assert_loads(file, model, "sd15", base)


def test_a_refusal_leaves_no_rank_waiting(tmp_path):
    """Each weight that is not taken would leave the other ranks waiting in its sum."""

    class First:
        is_first = True

    class Plain:
        folder = CANVAS / "sd15"
        merged = staticmethod(iter)

    taken = []

    def gathered():
        for name in (BIAS, "conv_in.bias", "conv_out.bias"):
            taken.append(name)
            yield name, torch.full((base_weights("sd15")[name].shape), 9.0)

    with pytest.raises(ModelError, match=BIAS):
        _write_adapter(Plain(), gathered(), tmp_path / "a.safetensors", Form("lora", rank=2), None, First())
    assert len(taken) == 3


RUN = [*TINY_RUN, "evaluate.enabled=false", "train.steps=3", "concepts=[{target: bird, superclass: animal}]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """(a run that trains a LoRA of rank 2 and exports in bfloat16, its arguments)."""
    folder = tmp_path_factory.mktemp("trained")
    config = str(PROJECT / "configs" / "canvas" / "surgun.yaml")
    method, dtype = ["method.rank=2", "method.distractors=1"], ["model.dtype=bfloat16", "engine.precision=bf16"]
    arguments = [config, *RUN, *method, *dtype, f"run.folder={folder / 'run'}"]
    sculpt("unlearn", *arguments)
    return folder / "run", arguments


def test_a_run_that_trained_an_adapter_exports_it_without_loss(trained, tmp_path):
    """Also when the exported folder, in bfloat16, has rounded most of it away."""
    run, arguments = trained
    printed = sculpt("export", *arguments, "--as", "lora", "--rank", "2")
    file = run / "lora" / WEIGHT_NAME
    lost = read_lost(file)
    assert f"{lost}\n" in printed and str(file) in printed and lost.rank == 2 and lost.worst < 1e-3
    held, base, exported = load_file(file), base_weights("sd15"), weights(run)
    modules = {key.removeprefix("unet.").partition(".lora_")[0] for key in held}
    assert len(modules) > 8
    for module in modules:
        merged = base[f"{module}.weight"] + held[f"unet.{module}.lora_B.weight"] @ held[f"unet.{module}.lora_A.weight"]
        torch.testing.assert_close(merged.bfloat16(), exported[f"{module}.weight"], rtol=2**-7, atol=1e-6)
    assert write_adapter(CANVAS / "sd15", run / "model", tmp_path / "a.safetensors", rank=2).share > 10 * lost.share


@pytest.mark.two_ranks
@pytest.mark.slow
def test_two_ranks_write_one_adapter_for_comfyui(trained):
    run, arguments = trained
    printed = sculpt("export", *arguments, "--as", "kohya", "--rank", "3", "engine.stage=2", ranks=2)
    assert printed.count("of the change is lost") == 1 and read_lost(run / "kohya.safetensors").worst < 1e-3
    assert not list(run.glob(".*.tmp"))
