"""The canvas's own classifier. Its pooled features also serve FID and KID."""

from sculpt_dist.evaluation.worlds import WorldJudge


class Judge(WorldJudge):
    """Names the objects and styles of the canvas."""

    name = "canvas"
