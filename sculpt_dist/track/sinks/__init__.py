"""Trackers, one per file. The file name is the tracker's name in `track.sinks`; `base` is their interface.

To add a tracker, add a file with a class `Sink(base.Sink)`; nothing else changes. `wandb` and `tensorboard` also have a
switch of their own in `TrackConfig`. Only `sculpt_dist.track.tracker` imports these modules.
"""
