"""Errors that a user can act on: each message names the file or key, what was found, and what to do."""

from sculpt_dist.core.messages import one_line


class SculptError(Exception):
    """Base of every error that the user can fix; the command line prints it without a traceback (exit code 2).

    The message becomes one line without passwords.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class ConfigError(SculptError):
    """A key, a value, or a combination of values in the configuration cannot work."""


class ModelError(SculptError):
    """A model folder is missing, is not a pipeline, or lacks weights."""


class ShardError(SculptError):
    """A shard or its index is missing, damaged, or holds something that a shard must not hold."""


class RunFolderError(SculptError):
    """The run folder belongs to another run, or none of its checkpoints can be trusted."""


class WriteError(RunFolderError, OSError):
    """A file could not be written: the disk is full, or the folder may not be written."""


class LaunchError(SculptError):
    """The ranks of a job did not find each other, or found the ranks of another job."""


class SubmitError(SculptError):
    """Slurm is not installed, or did not accept the job."""


class NonFiniteError(SculptError):
    """The loss or the gradient became NaN or infinite on some rank; every rank stops at this step."""


class StopRequested(Exception):
    """All ranks agreed to stop after a signal; the state is saved (exit code 75)."""
