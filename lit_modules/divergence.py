"""End a training that has diverged, without waiting for the device in every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from falqon.errors import InputError


class DivergenceGuard:
    """Looks at the gradient norm of a step when the next one has got as far.

    One that was not finite is refused from then on, whoever asks.

    Its copy to the host is long done by then, so that a GPU never runs dry for it. Adam's moments
    do not recover from a gradient that is not finite: no checkpoint may be written after one.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._found: str | None = None
        self._copied: torch.cuda.Event | None = None
        self._step = 0

    def watch(self, norm: Tensor, loss: Tensor, step: int) -> None:
        """Remember a step's gradient norm and mean loss, float scalars; returns at once."""
        seen = torch.stack([norm.detach().double(), loss.detach().double()])
        self._seen = seen.to("cpu", non_blocking=True)
        self._copied = None
        if seen.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._step = step

    def check(self) -> None:
        """Refuse to go on from the step that was watched last.

        Raises:
            InputError: if its gradient was not finite.
        """
        if self._seen is not None:
            if self._copied is not None:
                self._copied.synchronize()
            norm, loss = self._seen.tolist()
            self._seen = None
            if not math.isfinite(norm):
                self._found = (
                    f"the gradient is not finite at step {self._step} (loss {loss:.4g}): the "
                    "training has diverged. Resume from the last checkpoint with a smaller "
                    "learning rate."
                )
        if self._found is not None:
            raise InputError(self._found)
