"""The canvas: twelve objects in four superclasses and five styles, all drawn by code. A small UnlearnCanvas (arXiv
2402.11846).
"""

from __future__ import annotations

from sculpt_dist.worlds.base import ClassifierPlan, World

WORLD = World(
    # With fewer than three members, a superclass prompt draws the target in half of its images, and forgetting stalls.
    superclasses={
        "animal": ("cat", "fish", "bird"),
        "plant": ("flower", "tree", "cactus"),
        "building": ("house", "tower", "bridge"),
        "vehicle": ("car", "boat", "rocket"),
    },
    styles=("natural", "sketch", "neon", "popart", "mosaic"),  # call none of them "photo"
    image_size=32,
    nouns=("photo", "picture"),
    classifiers={"classifier": ClassifierPlan(channels=(16, 32, 64, 64), strides=(1, 2, 2, 2))},
    per_pair=150,
    size="small",
    lean={
        "sd15": {"cat": 1.4, "tree": 1.15, "rocket": 1.3},
        "sdxl": {"cat": 1.4, "tree": 1.15, "rocket": 1.3},
        "sana": {"cat": 1.4, "cactus": 1.2, "tower": 1.4, "car": 1.2},
    },
)
