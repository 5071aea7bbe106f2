"""Processes that do some steps each in turn, told so through pipes.

A process that has died, for whatever reason, has no more turns; one whose parent has died ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence


class Turns:
    """The two pipes between this process and one that it starts.

    Attributes:
        of_worker: what the started process inherits: where it reads that it is its turn, and where
            it writes that it waits for one. For `wait_for_turn`.
    """

    def __init__(self) -> None:
        read, self._go = os.pipe()
        self._waiting, write = os.pipe()
        self.of_worker = (read, write)
        self._open = {read, self._go, self._waiting, write}

    def begun(self) -> None:
        """The process has started: its ends are its own."""
        self._close(*self.of_worker)

    def is_waiting(self) -> bool:
        """Whether it waits for a turn; looks until it does, or has ended."""
        return os.read(self._waiting, 1) != b""

    def give(self) -> None:
        """It is its turn."""
        with contextlib.suppress(BrokenPipeError):  # it has died: `is_waiting` will say so
            os.write(self._go, b".")

    def close(self) -> None:
        """Done."""
        self._close(*self._open)

    def _close(self, *ends: int) -> None:
        for end in ends:
            if end in self._open:
                self._open.discard(end)
                os.close(end)


def take_turns(starts: Sequence[Callable[[Turns], object]]) -> None:
    """Let processes take turns until all have ended.

    Args:
        starts: each starts a process that inherits `Turns.of_worker`, and calls `Turns.begun`. The
            next one is started when the one before waits for its first turn.
    """
    turns = [Turns() for _ in starts]
    try:
        for start, own in zip(starts, turns, strict=True):
            start(own)
            own.is_waiting()
        left = list(turns)
        while left:
            for own in list(left):
                own.give()
                if not own.is_waiting():
                    left.remove(own)
    finally:
        for own in turns:
            own.close()


def wait_for_turn(of_worker: tuple[int, int]) -> None:
    """Say that this process waits for its turn, and wait for it.

    Raises:
        EOFError: the process that gives turns has ended.
    """
    read, write = of_worker
    try:
        os.write(write, b".")
        is_given = os.read(read, 1) != b""
    except BrokenPipeError:
        is_given = False
    if not is_given:
        raise EOFError("the comparison that this training is part of has ended")
