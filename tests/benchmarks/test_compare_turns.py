"""Processes that take turns: the order, one that dies, and a parent that does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.compare_turns import Turns, take_turns, wait_for_turn

WORKER = """
import sys
from benchmarks.compare_turns import wait_for_turn
name, count, path, read, write = sys.argv[1:]
for number in range(int(count)):
    wait_for_turn((int(read), int(write)))
    with open(path, "a") as file:
        file.write(f"{name}{number} ")
sys.exit(int(count) == 0)
"""


def test_order_and_ends(tmp_path: Path) -> None:
    """One dies before its first turn, the others have different numbers of turns."""
    begun: list[subprocess.Popen[bytes]] = []

    def starting(name: str, count: int) -> None:
        def start(turns: Turns) -> None:
            words = [name, str(count), str(tmp_path / "order"), *map(str, turns.of_worker)]
            command = [sys.executable, "-c", WORKER, *words]
            begun.append(subprocess.Popen(command, pass_fds=turns.of_worker))
            turns.begun()

        starts.append(start)

    starts: list[Callable[[Turns], object]] = []
    before = os.listdir("/proc/self/fd")
    for name, count in (("a", 2), ("b", 0), ("c", 4), ("d", 3)):
        starting(name, count)
    take_turns(starts)
    assert (tmp_path / "order").read_text() == "a0 c0 d0 a1 c1 d1 c2 d2 c3 "
    assert [process.wait() for process in begun] == [0, 1, 0, 0]
    assert os.listdir("/proc/self/fd") == before


def test_a_start_that_fails_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ZeroDivisionError):
        take_turns([lambda _: 1 // 0])
    assert os.listdir("/proc/self/fd") == before


def test_a_worker_without_a_parent_ends() -> None:
    turns = Turns()
    read, write = map(os.dup, turns.of_worker)
    turns.close()
    with pytest.raises(EOFError, match="has ended"):
        wait_for_turn((read, write))
    os.close(read)
    os.close(write)
