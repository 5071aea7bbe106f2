"""Checkpoints: written atomically, read safely, hashed and described."""

from falqon.checkpoint.background import BackgroundCheckpointIO
from falqon.checkpoint.errors import CheckpointError
from falqon.checkpoint.hashing import hash_tensors, training_hash
from falqon.checkpoint.io import (
    LAST,
    SERVED,
    TEMPORARY_SUFFIX,
    AtomicCheckpointIO,
    read_checkpoint,
    read_header,
)

__all__ = [
    "LAST",
    "SERVED",
    "TEMPORARY_SUFFIX",
    "AtomicCheckpointIO",
    "BackgroundCheckpointIO",
    "CheckpointError",
    "hash_tensors",
    "read_checkpoint",
    "read_header",
    "training_hash",
]
