"""Directories that take the place of others."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from falqon.checkpoint import AtomicCheckpointIO, read_checkpoint
from falqon.checkpoint.sharded import recover, replace_directory


def test_a_directory_is_replaced_when_the_new_one_is_there(tmp_path: Path) -> None:
    target, new = tmp_path / "last.ckpt", tmp_path / "new"
    for path, text in ((target, "old"), (new, "new")):
        path.mkdir()
        (path / "file").write_text(text)
    replace_directory(new, target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    # Killed between two renames: what was there before has its name back.
    target.rename(tmp_path / ".last.ckpt.old")
    recover(target)
    assert (target / "file").read_text() == "new"
    # A file makes place for a directory, too.
    shutil.rmtree(target)
    torch.save({}, target)
    new.mkdir()
    replace_directory(new, target)
    assert target.is_dir()


def test_a_file_takes_the_place_of_a_directory(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    target.mkdir()
    (target / ".metadata").write_text("")
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, target)
    assert read_checkpoint(target) == {"state_dict": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
