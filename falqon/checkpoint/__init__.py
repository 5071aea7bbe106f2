"""Checkpoints: written atomically, read safely, hashed and described."""

from falqon.checkpoint.hashing import hash_tensors, training_hash
from falqon.checkpoint.io import AtomicCheckpointIO, CheckpointError, read_checkpoint

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "hash_tensors",
    "read_checkpoint",
    "training_hash",
]
