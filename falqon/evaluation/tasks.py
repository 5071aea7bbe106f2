"""Tasks by name: those that ship here, those of lm-eval, and local YAML files."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falqon.errors import InputError
from falqon.evaluation.mini import DIRECTORY

COMMONSENSE = (
    "hellaswag",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "openbookqa",
)
"""The paper's seven commonsense tasks, whose accuracies it averages."""

TASK_SETS = {"paper": ("mmlu", *COMMONSENSE)}
"""Several tasks by one name."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their data, ready to run.

    Attributes:
        names: What was asked for, sets written out: tasks and groups.
        items: lm-eval's tasks and groups.
        manager: lm-eval's task manager, which knows their files.
    """

    names: tuple[str, ...]
    items: tuple[Any, ...]
    manager: Any


def require_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        InputError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval, which is not installed: pip install 'falqon[eval]'.")


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of lm-eval and of the libraries that fetch its data are printed."""
    names = ("lm_eval", "huggingface_hub", "datasets", "httpx")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def split_names(given: Sequence[str]) -> tuple[str, ...]:
    """Task names from words that may hold several, separated by commas; sets written out.

    Raises:
        InputError: If a name comes twice.
    """
    names: list[str] = []
    for word in given:
        for name in filter(None, (part.strip() for part in word.split(","))):
            names += TASK_SETS.get(name, (name,))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"task {twice[0]!r} is named twice. Name it once.")
    return tuple(names)


def load_tasks(given: Sequence[str], include: Sequence[str] = ()) -> TaskSet:
    """Find tasks and get their data, before there is a model in memory.

    Args:
        given: Names of tasks, groups and sets (`paper`), YAML files of tasks, and directories with
            such files.
        include: Directories with YAML files of more tasks that can be named. They may import
            Python code that lies beside them: only for files that you trust.

    Raises:
        InputError: lm-eval is not installed, a task does not exist, or its data cannot be had.
    """
    require_harness()
    for directory in include:
        if not Path(directory).is_dir():
            raise InputError(f"there is no directory {directory!r} of tasks. Check the path.")
    names = split_names(given)
    if not names:
        raise InputError("no task is named. Give falqon_mini, paper, or a task of lm-eval.")
    with quiet():
        names, manager = _manager(names, include)
        items: list[Any] = []
        for name in names:
            items += _load(name, manager)
    return TaskSet(names, tuple(items), manager)


def _manager(names: tuple[str, ...], include: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """Names with directories written out, and a manager that knows all of them."""
    from lm_eval.tasks import TaskManager

    folders = [str(DIRECTORY), *include]
    folders += [str(Path(name).expanduser().parent) for name in names if _is_file(name)]
    folders += [str(Path(name).expanduser()) for name in names if _is_directory(name)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    expanded: list[str] = []
    for name in names:
        expanded += _in_directory(name) if _is_directory(name) else [name]
    known = set(manager.all_tasks)
    missing = [name for name in expanded if name not in known and not _is_file(name)]
    for name in filter(_is_path, missing):
        raise InputError(f"there is no task file or directory {name!r}. Check the path.")
    if missing:
        sys.stderr.write("reading the names of lm-eval's tasks (about 10 s)\n")
        manager = TaskManager(include_path=folders)
        known = set(manager.all_tasks)
    for name in missing:
        if name not in known:
            raise _unknown(name, known)
    return tuple(expanded), manager


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).expanduser().is_file()


def _is_directory(name: str) -> bool:
    return "/" in name and Path(name).expanduser().is_dir()


def _in_directory(name: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=str(Path(name).expanduser()), include_defaults=False)
    if not found.all_subtasks:
        raise InputError(f"{name} holds no YAML file of a task. Name another directory.")
    tasks: list[str] = found.all_subtasks
    return tasks


def _unknown(name: str, known: set[str]) -> InputError:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return InputError(
        f"there is no task {name!r}.{hint} Tasks are falqon_mini, paper, those of lm-eval "
        "(lm-eval ls tasks), and YAML files; --include-path adds a directory of these."
    )


def _load(name: str, manager: Any) -> list[Any]:
    """A task or a group with its data, or all tasks of a tag."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # tasks run whatever code they name
        raise _unusable(name, error) from error
    unsafe = [n for n, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise InputError(
            f"task {unsafe[0]} runs code that the model writes, which is not supported here. Leave "
            "it out."
        )
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _unusable(name: str, error: Exception) -> InputError:
    text = str(error).strip().split("\n", maxsplit=1)[0][:300]
    if _unreachable(error):
        return InputError(
            f"task {name}: its data are on the Hugging Face hub, which cannot be reached, and not "
            "in the local cache. Without a hub use --tasks falqon_mini, or a YAML file whose "
            "dataset_kwargs.data_files are local (docs/evaluation.md)."
        )
    return InputError(f"task {name} cannot be loaded: {type(error).__name__}: {text}")


def _unreachable(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    while error is not None:
        if isinstance(error, kinds) or "on the Hub (" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
