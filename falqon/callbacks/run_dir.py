"""One directory, one run: what an earlier run left there is set aside, not mixed and not lost."""

from __future__ import annotations

import shutil
from pathlib import Path

from falqon.errors import InputError

PREVIOUS = "previous"
TEST_FILE = "test.json"
# What a run writes into its directory. Anything else there is the user's and stays.
RUN_FILES = (
    "metrics.csv",
    "config.yaml",
    "summary.json",
    "landed.png",
    "checkpoints",
    "served.ckpt",
    "wandb",
    "predictions*.jsonl",
    TEST_FILE,
)


def archive_previous_run(root: str | Path) -> Path | None:
    """Move the files of an earlier run into `<root>/previous/<n>/`.

    Call it on rank zero, before anything of a fresh run is written. Moving is renaming within the
    directory: nothing is copied or deleted, whatever the size of the checkpoints. Should it be cut
    short, the next call moves the rest.

    Args:
        root: Directory of the run. It need not exist.

    Returns:
        The new directory `<root>/previous/<n>`, n one more than the largest there is; None if
        there was nothing to move.

    Raises:
        InputError: `root` is a file, or a file in it cannot be moved.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise InputError(f"run directory {root} is a file. Set another directory or remove it.")
    found = sorted(path for pattern in RUN_FILES for path in root.glob(pattern))
    if not found:
        return None
    try:
        target = _next_directory(root / PREVIOUS)
        for path in found:
            path.rename(target / path.name)
    except OSError as error:
        raise InputError(
            f"the earlier run in {root} cannot be moved to {root / PREVIOUS}: "
            f"{error.strerror or error}. Move it away yourself or set another run directory."
        ) from error
    return target


def restore_archived_run(root: str | Path, archived: Path) -> None:
    """Undo `archive_previous_run` for a run that failed before it had anything to keep.

    Args:
        root: Directory of the run; the failed run's config.yaml and wandb/ there are deleted.
        archived: What `archive_previous_run` returned.
    """
    root = Path(root)
    (root / "config.yaml").unlink(missing_ok=True)
    shutil.rmtree(root / "wandb", ignore_errors=True)
    for path in list(archived.iterdir()):
        path.rename(root / path.name)
    archived.rmdir()
    if not any(archived.parent.iterdir()):
        archived.parent.rmdir()


def _next_directory(previous: Path) -> Path:
    previous.mkdir(exist_ok=True)
    numbers = [int(path.name) for path in previous.iterdir() if path.name.isdecimal()]
    target = previous / str(max(numbers, default=0) + 1)
    target.mkdir()
    return target
