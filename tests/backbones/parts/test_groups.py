"""Parameter groups are named by roles; a kind with other attention modules says what theirs are."""

from __future__ import annotations

from sculpt_dist.backbones.parts.groups import parameter_groups

JOINT = {f"transformer_blocks.0.attn.{layer}.weight": (4, 4) for layer in ("to_q", "to_k", "add_k_proj", "norm_q")}


def test_attention_of_a_unet_by_role_and_part():
    head = "down_blocks.0.attentions.0.transformer_blocks.0"
    shapes = {f"{head}.{layer}.weight": (4, 4) for layer in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0")}
    groups = parameter_groups(shapes | {f"{head}.attn2.to_out.0.bias": (4,)})
    assert groups["text_to_image.out"] == (f"{head}.attn2.to_out.0.weight", f"{head}.attn2.to_out.0.bias")
    assert groups["attention"] == tuple(name for name in groups["all"] if "ff" not in name)
    assert groups["not_text_to_image"] == (f"{head}.attn1.to_q.weight", f"{head}.ff.net.0.weight")
    assert groups["matrices"] == tuple(shapes) == groups["all"][:-1]
    assert groups["cross_attention.k"] == groups["text_to_image.k"] == (f"{head}.attn2.to_k.weight",)


def test_a_kind_with_joint_attention_names_its_own_roles():
    def role_of(name: str) -> tuple[str | None, str | None]:
        roles = {"to_q": ("self_attention", "q"), "to_k": ("self_attention", "k"), "add_k_proj": ("text_to_image", "k")}
        return roles.get(name.split(".")[3], (None, None))

    groups = parameter_groups(JOINT, role_of)
    assert groups["text_to_image"] == groups["cross_attention.k"] == ("transformer_blocks.0.attn.add_k_proj.weight",)
    assert len(groups["self_attention"]) == 2 and len(groups["attention.k"]) == 2
    assert len(groups["not_cross_attention"]) == 3 and groups["block.0"] == tuple(JOINT)
