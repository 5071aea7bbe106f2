"""What is wrong with a checkpoint."""

from __future__ import annotations

from falqon.errors import InputError


class CheckpointError(InputError):
    """A checkpoint that cannot be written, or a file that cannot be read as one."""
