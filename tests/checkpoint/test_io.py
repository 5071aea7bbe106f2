"""Atomic writes: full disks, kills and damaged files, with real processes and real files."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from falqon.checkpoint import AtomicCheckpointIO, CheckpointError, read_checkpoint
from falqon.checkpoint.io import TEMPORARY_SUFFIX
from falqon.errors import InputError

ROOT = Path(__file__).parents[2]


def checkpoint(fill: float = 1.0, size: int = 1000) -> dict[str, Any]:
    codes = torch.full((size,), fill).to(torch.float8_e4m3fn).view(torch.uint8)
    return {"state_dict": {"w.codes": codes, "w.B": torch.full((size,), fill)}, "global_step": 3}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "new" / "directory" / "a.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(), file)
    for loaded in (
        plugin.load_checkpoint(file),
        plugin.load_checkpoint(f"file://{file}", weights_only=False),
        read_checkpoint(file, mmap=True),
    ):
        assert loaded["global_step"] == 3
        assert torch.equal(loaded["state_dict"]["w.B"], torch.ones(1000))
        assert loaded["state_dict"]["w.codes"].dtype == torch.uint8
    assert names(file.parent) == ["a.ckpt"]


def test_saving_replaces_and_keeps_what_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(1.0), file)
    mapped = read_checkpoint(file, mmap=True)["state_dict"]["w.B"]
    plugin.save_checkpoint(checkpoint(2.0), file)
    assert torch.equal(mapped, torch.ones(1000))
    assert torch.equal(read_checkpoint(file)["state_dict"]["w.B"], torch.full((1000,), 2.0))


def test_remote_paths_are_the_parents(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(), "memory://falqon-test/a.ckpt")
    loaded = plugin.load_checkpoint("memory://falqon-test/a.ckpt")
    assert torch.equal(loaded["state_dict"]["w.B"], torch.ones(1000))
    plugin.save_checkpoint({"state_dict": {"p": Path("x")}}, "memory://falqon-test/b.ckpt")
    with pytest.raises(CheckpointError, match=r"b\.ckpt holds a Python object \(pathlib"):
        plugin.load_checkpoint("memory://falqon-test/b.ckpt", weights_only=False)


def test_lightning_saves_and_resumes_with_it(tmp_path: Path) -> None:
    def trainer(steps: int) -> pl.Trainer:
        return pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            plugins=[AtomicCheckpointIO()],
            callbacks=[ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, resumed in mid-epoch: both as meant
        trainer(2).fit(BoringModel())
        assert all(name.endswith(".ckpt") for name in names(tmp_path))
        resumed = trainer(3)
        resumed.fit(BoringModel(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == 3
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


# ------------------------------------------------------------- writes that fail

LIMITED = """
import resource, signal, sys, torch
from falqon.checkpoint import AtomicCheckpointIO
from falqon.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is EFBIG
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
for path in sys.argv[1:]:
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(1 << 18)}}, path)
    except InputError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource limits")
def test_file_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), old)
    before = old.read_bytes()
    out, err = run(LIMITED, str(old), str(new)).communicate(timeout=120)
    messages = out.splitlines()
    assert len(messages) == 2
    for file, message in zip((old, new), messages, strict=True):
        assert message.startswith(
            f"CheckpointError: checkpoint {file} cannot be written: File too large (262144 bytes"
        )
        assert "bytes free" in message
    assert "the previous file is intact" in messages[0]
    assert "nothing was left behind" in messages[1]
    assert "Traceback" not in err
    assert names(tmp_path) == ["old.ckpt"]
    assert old.read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MB. Needs the right to mount; the test above needs none."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk_leaves_the_old_one(small_disk: Path) -> None:
    file = small_disk / "a.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(), file)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"No space left on device .*Free space"):
        plugin.save_checkpoint(checkpoint(2.0, size=400_000), file)
    assert file.read_bytes() == before
    assert names(small_disk) == ["a.ckpt"]
    plugin.save_checkpoint(checkpoint(3.0), file)  # nothing of the failure takes up space
    assert plugin.load_checkpoint(file)["state_dict"]["w.B"][0] == 3.0


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "file" / "a.ckpt")


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: 0}, tmp_path / "a.ckpt")
    assert names(tmp_path) == []

    class Fails:
        def __reduce__(self) -> Any:
            raise RuntimeError("CUDA out of memory")

    try:
        raise OSError(28, "an unrelated one, being handled")
    except OSError:
        with pytest.raises(RuntimeError, match="CUDA") as caught:
            AtomicCheckpointIO().save_checkpoint({"state_dict": Fails()}, tmp_path / "a.ckpt")
    assert not isinstance(caught.value, InputError)
    assert names(tmp_path) == []


SLOW = """
import sys, time, torch
from falqon.checkpoint import AtomicCheckpointIO, io
write = io._WatchedFile.write
def slow(self, data):
    done = write(self, data)
    sys.stdout.write(".")
    sys.stdout.flush()
    time.sleep(0.2)
    return done
io._WatchedFile.write = slow
state = {f"w{i}": torch.zeros(50_000) for i in range(100)}
AtomicCheckpointIO().save_checkpoint({"state_dict": state}, sys.argv[1])
"""


def test_kill_during_a_save_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(), file)
    before = file.read_bytes()
    process = run(SLOW, str(file))
    assert process.stdout is not None
    assert len(process.stdout.read(4)) == 4  # some writes are done, most are not
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert file.read_bytes() == before

    (leftover,) = (path for path in tmp_path.iterdir() if path != file)
    assert leftover.stat().st_size > 0
    assert leftover.name.startswith(".")
    assert leftover.suffix == TEMPORARY_SUFFIX
    assert list(tmp_path.glob("*.ckpt")) == [file]

    plugin.save_checkpoint(checkpoint(2.0), file)
    assert leftover.exists()  # younger than this process: it might be in use
    day_ago = time.time() - 24 * 3600
    os.utime(leftover, (day_ago, day_ago))
    plugin.save_checkpoint(checkpoint(3.0), file)
    assert names(tmp_path) == ["last.ckpt"]


# ------------------------------------------------------------- files that cannot be read


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"first\.ckpt does not exist; .* holds last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "first.ckpt")


def test_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, -5])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"a\.ckpt \(\d+ bytes\) cannot be read"):
        AtomicCheckpointIO().load_checkpoint(file)


def test_one_flipped_bit(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), file)
    content = bytearray(file.read_bytes())
    place = content.find(torch.ones(1000).numpy().tobytes())
    assert place > 0
    content[place + 7] ^= 1
    file.write_bytes(content)
    assert "state_dict" in torch.load(file, weights_only=True)  # torch does not notice
    with pytest.raises(CheckpointError, match=r"checksum of its part .* is wrong"):
        AtomicCheckpointIO().load_checkpoint(file)


@pytest.mark.parametrize("content", [b"step,epoch\n0,0\n" * 50, b"{}", b"PK\x03\x04 junk" * 9])
def test_something_else(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.ckpt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt .*cannot be read as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(file)


@pytest.mark.parametrize("other", [{"weight": torch.ones(2)}, torch.ones(2), [1, 2]])
def test_other_torch_files(tmp_path: Path, other: object) -> None:
    torch.save(other, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is not a Lightning checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.pt")


def test_no_code_is_run_even_when_asked(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"holds a Python object \(posix\.mkdir\)"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()
