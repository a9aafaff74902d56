"""Nets that take more than the latent, the time and the text: refused when the folder is opened, by `check` as well."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel, UNet2DConditionModel
from harness import PROJECT

from sculpt_dist.backbones.parts.conditions import UNET
from sculpt_dist.backbones.sana import Backbone as Sana
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ModelError
from sculpt_dist.planning.check import check_run

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
SHAPES_AND_LAYERS = set(  # settings of the two nets that do not change what a forward takes
    "sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types "
    "mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding "
    "mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block "
    "reverse_transformer_layers_per_block encoder_hid_dim attention_head_dim num_attention_heads "
    "use_linear_projection addition_time_embed_dim upcast_attention resnet_time_scale_shift resnet_skip_time_act "
    "resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn timestep_post_act "
    "conv_in_kernel conv_out_kernel projection_class_embeddings_input_dim class_embeddings_concat "
    "mid_block_only_cross_attention cross_attention_norm addition_embed_type_num_heads num_layers "
    "num_cross_attention_heads cross_attention_head_dim caption_channels mlp_ratio attention_bias patch_size "
    "norm_elementwise_affine interpolation_scale guidance_embeds_scale qk_norm timestep_scale self".split()
)


def changed(folder: Path, arch: str, net: str, **settings: Any) -> Path:
    shutil.copytree(ASSETS / arch, folder)
    file = folder / net / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256: this net takes the guidance, .* as in LCM"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep: this net takes a class or a noise level"),
        ({"num_class_embeds": 10}, "num_class_embeds=10: this net takes a class"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type=ip_image_proj: this net takes an image"),
        ({"attention_type": "gated"}, "attention_type=gated: this net takes boxes"),
        ({"in_channels": 9}, "in_channels=9, but the vae's latents have 4: this is an inpainting model"),
        ({"in_channels": 8}, "in_channels=8, .* this is a model that edits images"),
    ],
)
def test_a_unet_with_a_condition_that_is_not_passed_is_refused_by_check(tmp_path, setting, what):
    folder = changed(tmp_path / "model", "sd15", "unet", **setting)
    with pytest.raises(ModelError, match=f"unet/config.json: {what}") as raised:
        check_run(load_config(CONFIG, [f"model.path={folder}"]), 1)
    assert "\n" not in str(raised.value)


def test_a_sana_with_built_in_guidance_is_refused(tmp_path):
    folder = changed(tmp_path / "model", "sana", "transformer", guidance_embeds=True)
    with pytest.raises(ModelError, match="guidance_embeds=True: this net takes the guidance"):
        Sana(folder, torch.float32, torch.device("cpu"))


def test_a_projection_of_the_text_is_passed(tmp_path):
    folder = changed(tmp_path / "model", "sd15", "unet", encoder_hid_dim_type="text_proj", encoder_hid_dim=64)
    backbone = Backbone(folder, torch.float32, torch.device("meta"))
    noisy = torch.empty(1, *backbone.latent_shape, device="meta")
    time = backbone.sample_time(torch.zeros(1))
    assert backbone.denoise(backbone.net, noisy, time, backbone.embed(["a cat"])).shape == noisy.shape


@pytest.mark.parametrize(
    ("net", "conditions"), [(UNet2DConditionModel, UNET), (SanaTransformer2DModel, Sana.conditions)]
)
def test_every_setting_of_the_net_is_known_to_change_its_inputs_or_not(net, conditions):
    assert set(inspect.signature(net.__init__).parameters) <= SHAPES_AND_LAYERS | set(conditions)
    assert not SHAPES_AND_LAYERS & set(conditions)
