"""Compile and load the C++ here, once for a machine and version; without a compiler do without."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from falqon.errors import InputError
from falqon.kernels.backend import cache_directory

VARIABLE = "FALQON_NATIVE"
"""Environment variable: `auto` (compile where there is a compiler) or `off` (plain torch)."""

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = (
    "-shared", "-fPIC", "-O3", "-march=native", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
_X86 = ("-mprefer-vector-width=512",)
_NO_AMX = ("-mno-amx-tile", "-mno-amx-bf16")  # where the system refuses it


def wanted() -> bool:
    """Whether the environment allows it.

    Raises:
        InputError: for an unknown value.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "off"):
        raise InputError(f"{VARIABLE} is {value!r}; choose auto or off.")
    return value == "auto"


def compiler() -> str | None:
    """Path of the C++ compiler: `CXX`, else g++, c++ or clang++; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keep = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(keep)}))


def _compile(path: str, flags: Sequence[str], target: Path) -> None:
    """Compile to a temporary name, then rename: another process may do the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / "kernels.so"
        command = [path, *flags, "-o", str(made), *map(str, _SOURCES)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        made.replace(target)


def _compiled(path: str, flags: Sequence[str]) -> tuple[ctypes.CDLL, Path]:
    """The library as these flags make it, loaded, and where it is kept."""
    texts = [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    key = "\n".join((*texts, path, *flags, _processor(), torch.__version__))
    target = cache_directory() / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        _compile(path, flags, target)
    return ctypes.CDLL(str(target)), target


def _is_refused(library: ctypes.CDLL) -> bool:
    """Whether it multiplies by AMX, and the system does not let this process use that."""
    library.falqon_unit.restype = ctypes.c_int64
    return bool(library.falqon_unit() < 0)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and where it is, or why there is none."""
    path = compiler()
    if path is None:
        return None, "no C++ compiler was found (g++, c++, clang++, or CXX)"
    if torch.get_num_threads() and not torch.backends.openmp.is_available():
        return None, "this torch is built without OpenMP"
    flags = (*_FLAGS, *(_X86 if platform.machine() in ("x86_64", "AMD64") else ()))
    try:
        library, target = _compiled(path, flags)
        if _is_refused(library):
            library, target = _compiled(path, (*flags, *_NO_AMX))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()
        return None, f"{path} could not compile it: {reason[0] if reason else 'no message'}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"it could not be compiled or loaded: {error}"
    keep_freed_memory()
    return library, str(target)


_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # of glibc's mallopt
_LARGEST = 2**25  # what glibc accepts: larger blocks are always given back at once


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let the C library keep what was freed, instead of giving it back and asking again.

    A step frees and allocates the same megabytes hundreds of times, and every fresh page costs a
    fault and is zeroed. What the process holds at its peak it then holds to its end. Not where the
    environment says how the allocator is to behave (`MALLOC_...`), nor without glibc.

    Returns:
        Whether that was done.
    """
    given = [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]
    if given or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP, _LARGEST), (_TRIM, 2**30), (_TOP_PAD, 2**28))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def library() -> ctypes.CDLL | None:
    """The compiled functions, compiled and loaded when first asked for; None to use plain torch."""
    return _load()[0] if wanted() else None


def describe() -> str:
    """One sentence for `falqon doctor`."""
    if not wanted():
        return f"Plain torch operations, as {VARIABLE} asks."
    found, text = _load()
    if found is None:
        return f"Plain torch operations, several times slower beside the matmuls: {text}."
    memory = "keeps freed memory" if keep_freed_memory() else "is left as it is"
    return f"Operations beside the matmuls are compiled C++ ({text}); the allocator {memory}."
