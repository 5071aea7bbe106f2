"""A DataLoader that Lightning can stop and resume between any two batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.sampling import TrainBatchSampler
from falqon.errors import InputError

Fingerprint: TypeAlias = dict[str, str | int | bool]
"""What the sequence of batches depends on."""


class ResumableLoader(DataLoader[Any]):
    """Training batches whose position is part of a checkpoint.

    Lightning takes `state_dict` when it saves, after the batches trained on so far were fetched and
    no more, and calls `load_state_dict` before the first batch of a resumed run. Batches count
    where they are handed out, so those that workers prepared ahead do not count. The length stays
    that of the whole epoch. The epoch is the sampler's: without `set_epoch` it does not change.

    Args:
        dataset: Rows.
        batch_sampler: Batches of this rank.
        fingerprint: What the sequence of batches depends on, with a readable name each; the same on
            all ranks.
        collate_fn: Makes a batch of rows.
        num_workers: Processes that collate.
    """

    batch_sampler: TrainBatchSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: TrainBatchSampler,
        fingerprint: Fingerprint,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
    ) -> None:
        self.fingerprint = fingerprint
        self._position = (0, 0)  # epoch, and how many of its batches were handed out
        self._resumed = False
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # Else every epoch draws a worker seed from the global generator, and a resumed run,
            # which starts fewer epochs, would see other random numbers in the model.
            generator=torch.Generator().manual_seed(batch_sampler.seed),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the epoch; right after a resume, those that were not handed out yet."""
        # A generator: Lightning calls iter() before it sets the epoch, next() after that.
        epoch = self.batch_sampler.epoch
        done = self._position[1] if self._resumed and self._position[0] == epoch else 0
        self._resumed = False
        self._position = (epoch, done)
        self.batch_sampler.start = done
        for batch in super().__iter__():
            done += 1
            self._position = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position as plain containers: epoch, batches handed out, fingerprint."""
        epoch, batches = self._position
        if not self._resumed and epoch != self.batch_sampler.epoch:
            epoch, batches = self.batch_sampler.epoch, 0
        return {"epoch": epoch, "batches": batches, "fingerprint": dict(self.fingerprint)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved position.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            InputError: If the data or the settings that form batches are not those of the
                checkpoint, so that its position means nothing here.
        """
        saved: Fingerprint = state_dict.get("fingerprint", {})
        names = sorted(saved.keys() | self.fingerprint.keys())
        differing = [
            f"{name} ({_short(saved.get(name))} there, {_short(self.fingerprint.get(name))} here)"
            for name in names
            if saved.get(name) != self.fingerprint.get(name)
        ]
        if differing:
            raise InputError(
                "the checkpoint stopped within training data that differs from the data here: "
                f"{', '.join(differing)}. Resume with the data settings of the checkpoint, or "
                "start a new run."
            )
        self._position = (int(state_dict["epoch"]), int(state_dict["batches"]))
        self._resumed = True
        self.batch_sampler.set_epoch(self._position[0])


def _short(value: str | int | bool | None) -> str:
    return value[:12] if isinstance(value, str) else str(value)
