"""The gallery's own classifiers: `gallery` judges, `gallery:witness` is another net, to be kept out of all tuning."""

from sculpt_dist.evaluation.worlds import WorldJudge


class Judge(WorldJudge):
    """Names the objects and styles of the gallery."""

    name = "gallery"
