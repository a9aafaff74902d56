"""Groups of a denoiser's parameters, under the same names on every backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")  # in the order of a forward pass
ROLES = {"attn2": "text_to_image", "attn1": "self_attention"}  # attention modules of diffusers' UNets and of SANA
TRANSFORMERS = {"attentions", "transformer_blocks"}  # modules with transformer blocks, of UNets and of DiTs
LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
# Names that configurations use; each stands for the group behind it.
ALIASES = {
    "not_cross_attention": "not_text_to_image",
    "cross_attention": "text_to_image",
    **{f"cross_attention.{part}": f"text_to_image.{part}" for part in LAYERS.values()},
}
AttentionRole = Callable[[str], tuple[str | None, str | None]]


def attention_role(name: str) -> tuple[str | None, str | None]:
    """(role, part) of a parameter in an attention module: `text_to_image` or `self_attention`; `q`, `k`, `v` or `out`.

    The part is None for what is no projection, such as a norm; both are None outside attention.
    """
    words = name.split(".")
    role = next((ROLES[word] for word in words if word in ROLES), None)
    part = next((LAYERS[word] for word in words if word in LAYERS), None)
    return role, part if role else None


def parameter_groups(
    shapes: Mapping[str, Sequence[int]], role_of: AttentionRole = attention_role
) -> dict[str, tuple[str, ...]]:
    """Sort parameter names into groups, each in the order of `shapes`.

    - `all`; `matrices`: without biases and other vectors; `pooled_text`: layers that read SDXL's pooled text and sizes
    - `text_to_image` (where the image attends to the text), `self_attention`, `attention` (both): each whole, and by
      `.q`, `.k`, `.v`, `.out`; `not_text_to_image`: everything outside the modules of text_to_image
    - `transformer`: matrices within the transformer blocks, without kernels of one input channel, which mix no channels
    - `block.K`: the K-th block of a forward pass: down, middle and up blocks of a UNet, transformer blocks of a DiT
    - `cross_attention`, `not_cross_attention`: aliases of text_to_image and not_text_to_image
    """
    groups: dict[str, list[str]] = {"all": [], "not_text_to_image": [], "matrices": []}
    blocks: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        groups["all"].append(name)
        if len(shape) > 1:
            groups["matrices"].append(name)
        role, part = role_of(name)
        if role != "text_to_image":
            groups["not_text_to_image"].append(name)
        if role and part:
            for group in (f"{role}.{part}", role, f"attention.{part}", "attention"):
                groups.setdefault(group, []).append(name)
        words = name.split(".")
        if len(shape) > 1 and shape[1] > 1 and TRANSFORMERS & set(words):
            groups.setdefault("transformer", []).append(name)
        if words[0] == "add_embedding":
            groups.setdefault("pooled_text", []).append(name)
        if words[0] in BLOCKS:
            number = int(words[1]) if words[1].isdigit() else 0
            blocks.setdefault((BLOCKS.index(words[0]), number), []).append(name)
    for depth, place in enumerate(sorted(blocks)):
        groups[f"block.{depth}"] = blocks[place]
    groups |= {alias: groups[group] for alias, group in ALIASES.items() if group in groups}
    return {group: tuple(members) for group, members in groups.items()}
