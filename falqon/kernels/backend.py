"""Which of several implementations of an operation a device runs fastest: measured once, kept.

Choices are kept in one file for each kind of GPU and version of the software, so that a second run,
or a second process of the same run, does not measure again and computes the same bits.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from falqon.errors import InputError

_LOG = logging.getLogger(__name__)
VARIABLE = "FALQON_MATMUL"
"""Environment variable: `auto` (measure), or the name of the implementation to use."""
NAMES = ("triton", "vendor")


def wanted() -> str:
    """What the environment asks for.

    Raises:
        InputError: for an unknown name.
    """
    name = os.environ.get(VARIABLE, "auto")
    if name not in ("auto", *NAMES):
        raise InputError(f"{VARIABLE} is {name!r}; choose auto, {' or '.join(NAMES)}.")
    return name


def cache_directory() -> Path:
    """Where choices are kept: `FALQON_CACHE`, else `falqon` in the user's cache directory."""
    given = os.environ.get("FALQON_CACHE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "falqon"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "falqon"


@lru_cache(maxsize=16)
def cache_file(index: int) -> Path:
    """File of a CUDA device's choices, named after all that may change which is faster."""
    properties = torch.cuda.get_device_properties(index)
    import triton

    runtime = torch.version.cuda or torch.version.hip
    name = f"{properties.name}-torch{torch.__version__}-{runtime}-triton{triton.__version__}"
    return cache_directory() / (
        "".join(c if c.isalnum() or c in ".-+" else "_" for c in name) + ".json"
    )


class Choices:
    """Choices by shape, in a file that several processes may read and write.

    Args:
        path: the file; it and its directory are made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] = {}

    def get(
        self,
        key: str,
        candidates: Mapping[str, Callable[[], Any]],
        measure: Callable[[Callable[[], Any]], float],
    ) -> str:
        """The fastest candidate for a key: from memory, from the file, or measured now.

        Of processes that measure at the same time, all take what the first one wrote. A candidate
        that fails is out of question; if all fail, the last error is raised.

        Args:
            key: operation and shape.
            candidates: by name; calling one runs it.
            measure: seconds (or any unit) that a candidate takes.

        Returns:
            Name of the fastest.
        """
        if key not in self._known:
            self._known = {**self._read(), **self._known}
        if key not in self._known:
            # Not while holding the lock: who measures waits for its device, which may be waiting
            # for another process's part of a collective.
            best, is_sure = self._measure(key, candidates, measure)
            with self._locked():
                self._known = {key: best, **self._read(), **self._known}
                if is_sure:
                    self._write()
        if self._known[key] not in candidates:  # a file from elsewhere
            return next(iter(candidates))
        return self._known[key]

    def _measure(
        self,
        key: str,
        candidates: Mapping[str, Callable[[], Any]],
        measure: Callable[[Callable[[], Any]], float],
    ) -> tuple[str, bool]:
        times: dict[str, float] = {}
        failure: Exception | None = None
        is_sure = True
        for name, run in candidates.items():
            try:
                times[name] = measure(run)
            except Exception as error:
                failure = error
                is_sure &= not isinstance(error, torch.OutOfMemoryError)
                _LOG.info("%s does not do %s: %s", name, key, str(error).splitlines()[:1])
        if not times:
            assert failure is not None
            raise failure
        best = min(times, key=lambda name: times[name])
        shown = ", ".join(f"{name} {value:.4g}" for name, value in times.items())
        _LOG.info("matmul %s: %s (%s ms); kept in %s", key, best, shown, self.path)
        return best, is_sure

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _LOG.warning("%s cannot be read (%s); measuring again", self.path, error)
            return {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def _write(self) -> None:
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w") as file:
                json.dump(dict(sorted(self._known.items())), file, indent=0)
            Path(name).replace(self.path)
        except OSError as error:  # a cache that cannot be kept costs time, not the run
            _LOG.warning("%s cannot be written (%s)", self.path, error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock, where the file system has any."""
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
        except (ImportError, OSError):
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                _LOG.debug("no locks on %s", self.path.parent)
            yield


@lru_cache(maxsize=16)
def choices(index: int) -> Choices:
    """Choices of a CUDA device, shared by all devices of its kind."""
    return _by_file(cache_file(index))


@lru_cache(maxsize=16)
def _by_file(path: Path) -> Choices:
    return Choices(path)


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call on the current CUDA device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
