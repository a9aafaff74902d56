"""Classifiers, one kind per file. The file name is the kind in `evaluate.classifier=KIND:WHERE`.

`base` is the interface. To add a kind, add a file with a class `Judge(Classifier)`; nothing else changes. The evaluator
finds it with `base.load_classifier`. `clip` and the classifiers of worlds also provide the metrics' image features.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, load_classifier

__getattr__, __dir__ = lazy_exports(__name__, {"base": ["Classifier", "Verdict", "load_classifier"]})
