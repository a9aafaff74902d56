"""Deprecated: the old home of `Classifier` and `Verdict`, which moved to `sculpt_dist.evaluation.classifiers`.

`sculpt_dist.metrics.base` still finds both for one release, with a DeprecationWarning. Nothing in the project imports
this package; it serves detectors that users wrote against the old name.
"""
