"""Groups of a denoiser's parameters, under the same names on every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")  # in the order of a forward pass


def parameter_groups(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """Sort parameter names into groups; `attn2` is cross-attention and `attn1` self-attention in diffusers' nets.

    `matrices` are all but biases and the like, `pooled_text` what takes in SDXL's pooled text (and sizes). `block.K` is the K-th block in
    the order of a forward pass: down, middle and up blocks of a UNet, transformer blocks of a DiT.
    """
    groups: dict[str, list[str]] = {"all": [], "not_cross_attention": [], "matrices": []}
    kinds = {"attn2": "cross_attention", "attn1": "self_attention"}
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
    blocks: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        groups["all"].append(name)
        if len(shape) > 1:
            groups["matrices"].append(name)
        words = name.split(".")
        kind = next((kinds[word] for word in words if word in kinds), None)
        part = next((parts[word] for word in words if word in parts), None)
        if kind != "cross_attention":
            groups["not_cross_attention"].append(name)
        if kind and part:
            groups.setdefault(f"{kind}.{part}", []).append(name)
            groups.setdefault(kind, []).append(name)
            groups.setdefault("attention", []).append(name)
        if words[0] == "add_embedding":
            groups.setdefault("pooled_text", []).append(name)
        if words[0] in BLOCKS:
            number = int(words[1]) if words[1].isdigit() else 0
            blocks.setdefault((BLOCKS.index(words[0]), number), []).append(name)
    for depth, place in enumerate(sorted(blocks)):
        groups[f"block.{depth}"] = blocks[place]
    return {group: tuple(members) for group, members in groups.items()}
