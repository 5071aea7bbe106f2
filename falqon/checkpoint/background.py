"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from falqon.checkpoint.io import AtomicCheckpointIO


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """`AtomicCheckpointIO` whose files a thread writes; training waits for a copy in memory.

    One file at a time: the next save waits for it, and so does whoever reads or removes a file.
    What could not be written is raised there, and by `wait` and `teardown`. A process that is
    killed while it writes leaves the checkpoint before that one.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Copy a checkpoint and begin to write it.

        Raises:
            CheckpointError: The one before could not be written.
            TypeError: `storage_options` was given.
        """
        self.wait()
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._thread.submit(super().save_checkpoint, _copied(checkpoint), path)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: The file could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, see `AtomicCheckpointIO`."""
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint when the newer one is there."""
        self.wait()
        super().remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """Wait, and end the thread; the next save starts another.

        Raises:
            CheckpointError: The file could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True)
        self.wait()


def _copied(checkpoint: dict[str, Any]) -> Any:
    """Containers and tensors anew, in host memory; what is one tensor twice stays one."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    return apply_to_collection(checkpoint, Tensor, copy)
