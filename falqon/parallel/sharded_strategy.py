"""ShardedStrategy: Lightning's ModelParallelStrategy with FALQON's checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy

from falqon.errors import InputError


class ShardedStrategy(ModelParallelStrategy):
    """Cuts a model up over devices: FSDP2, tensor parallelism, or both.

    The number of devices is `data_parallel_size` times `tensor_parallel_size`. Ranks of different
    data-parallel index have different rows and share the weights out among them (FSDP2); ranks of one
    tensor-parallel group work on the same rows.

    Args:
        data_parallel_size: Devices with different rows; `auto`: all that tensor parallelism leaves.
        tensor_parallel_size: Devices that share every layer's work.
        save_distributed_checkpoint: Every rank writes its part, and a checkpoint is a directory.
            Otherwise rank zero gathers all and writes one file.
        process_group_backend: As in Lightning.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        InputError: If sizes are not positive, or do not give the number of devices.
    """
