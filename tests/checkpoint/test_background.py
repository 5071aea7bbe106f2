"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from falqon.checkpoint import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    CheckpointError,
    read_checkpoint,
)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    event = threading.Event()
    write = AtomicCheckpointIO.save_checkpoint

    def slow(*args: object, **kwargs: object) -> None:
        assert event.wait(timeout=30)
        write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    return event


def test_what_is_written_is_what_was_there(tmp_path: Path, gate: threading.Event) -> None:
    io, path = BackgroundCheckpointIO(), tmp_path / "a.ckpt"
    weight, steps = torch.arange(6.0), {"done": 1}
    state = {"state_dict": {"w": weight, "tied": weight, "row": weight[1:3]}, "loop": steps}
    io.save_checkpoint(state, path)
    assert not path.exists()
    weight.zero_()  # the training goes on
    steps["done"] = 2
    gate.set()
    io.wait()
    found = read_checkpoint(path)
    assert found["loop"] == {"done": 1}
    assert torch.equal(found["state_dict"]["w"], torch.arange(6.0))
    assert torch.equal(found["state_dict"]["row"], torch.tensor([1.0, 2.0]))
    tied = (found["state_dict"][name].untyped_storage().data_ptr() for name in ("w", "tied"))
    assert len(set(tied)) == 1
    io.teardown()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_reading_removing_and_the_next_save_wait(tmp_path: Path, gate: threading.Event) -> None:
    io, path = BackgroundCheckpointIO(), tmp_path / "a.ckpt"
    threading.Timer(0.2, gate.set).start()
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    assert io.load_checkpoint(path)["state_dict"]["w"].sum() == 2
    gate.clear()
    threading.Timer(0.2, gate.set).start()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    io.save_checkpoint({"state_dict": {"w": torch.ones(4)}}, tmp_path / "b.ckpt")
    assert len(read_checkpoint(path)["state_dict"]["w"]) == 3
    io.remove_checkpoint(path)
    assert not path.exists()
    assert (tmp_path / "b.ckpt").exists()
    io.teardown()


@pytest.mark.parametrize("how", ["save", "teardown"])
def test_what_cannot_be_written_is_told(tmp_path: Path, how: str) -> None:
    io = BackgroundCheckpointIO()
    (tmp_path / "file").write_text("")
    io.save_checkpoint({"state_dict": {}}, tmp_path / "file" / "a.ckpt")
    then = {"save": lambda: io.save_checkpoint({}, tmp_path / "b.ckpt"), "teardown": io.teardown}
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be written"):
        then[how]()
    io.teardown()  # told once
