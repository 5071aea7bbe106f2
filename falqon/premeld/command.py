"""The parser of `falqon meld`, and its progress line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

from falqon.errors import InputError
from falqon.recipe import RECIPES, Adapter, MeldRecipe, fp8_recipe

_DESCRIPTION = """\
Meld a model into FP8 once, one layer at a time, into a directory to train from.

Memory holds one layer, never the model. Then train with `model_name: DIR`; the settings given here
have to be those of FalqonPrecision there, of which these have the same names and defaults.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `falqon meld`."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = MeldRecipe()
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="local directory with safetensors, hub id, .gguf file or package:NAME; "
        "GGUF is loaded as a whole",
    )
    add("--output", required=True, metavar="DIR", help="directory to make")
    add("--rank", type=int, default=default.rank, help="adapter rank (default: %(default)s)")
    add(
        "--recipe",
        default="default",
        metavar="NAME",
        help=f"FP8 recipe: {', '.join(RECIPES)}, or its fields as JSON (default: %(default)s)",
    )
    add(
        "--adapter",
        choices=get_args(Adapter),
        default=default.adapter,
        help="where A comes from (default: %(default)s)",
    )
    add(
        "--include",
        nargs="+",
        default=list(default.include),
        metavar="PATTERN",
        help="layers to meld, by full name with * and ? (default: all linear layers)",
    )
    add(
        "--exclude",
        nargs="+",
        default=list(default.exclude),
        metavar="PATTERN",
        help="layers to leave alone",
    )
    add("--output-embedding", action="store_true", help="meld the output embedding as well")
    add(
        "--svd",
        choices=("randomized", "full"),
        default=default.svd,
        help="how A is computed; full takes far longer for large layers (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=default.seed,
        help="of the SVD's sketch; FalqonPrecision's seed has to be the same "
        "(default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of all that is not melded (default: %(default)s)",
    )
    add(
        "--keep-weights",
        action="store_true",
        help="store the original weights too, 2 bytes a weight: needed by update policies that "
        "derive rows from them (master, live, compensated)",
    )
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Meld, with progress on stderr and the report on stdout.

    Returns:
        Exit status 0.

    Raises:
        InputError: see `falqon.premeld.premeld`.
    """
    from falqon.premeld.run import format_report, premeld

    melding = MeldRecipe(
        rank=arguments.rank,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
        output_embedding=arguments.output_embedding,
        adapter=arguments.adapter,
        svd=arguments.svd,
        seed=arguments.seed,
    )
    report = premeld(
        arguments.model,
        Path(arguments.output),
        fp8_recipe(_parse_recipe(arguments.recipe)),
        melding,
        dtype=arguments.dtype,
        keep_weights=arguments.keep_weights,
        device=choose_device(arguments.device),
        revision=arguments.revision,
        progress=ProgressLine(),
    )
    text = json.dumps(report, indent=2) if arguments.json else format_report(report)
    sys.stdout.write(text + "\n")
    return 0


def choose_device(name: str | None) -> str:
    """The device of a `--device` option: `cuda` if it is not given and there is one, else `cpu`.

    Raises:
        InputError: if there is no such device.
    """
    import torch

    count = torch.cuda.device_count()
    names = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name is None:
        return "cuda" if count else "cpu"
    if name not in names:
        raise InputError(f"--device {name!r} is no device here; there is {', '.join(names)}.")
    return name


def _parse_recipe(text: str) -> str | dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return text
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InputError(f"--recipe {text!r} is not JSON ({error}).") from error
    return fields


class ProgressLine:
    """One line on a terminal; elsewhere a line now and then, the first and last layer included."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._started = time.perf_counter()
        self._last = float("-inf")

    def __call__(self, name: str, number: int, count: int, left: float) -> None:
        """Report that a layer is done; see `falqon.premeld.premeld`."""
        now = time.perf_counter()
        terminal = sys.stderr.isatty()
        if not terminal and number < count and now - self._last < self._every:
            return
        self._last = now
        line = (
            f"{number}/{count} {name}, {_duration(now - self._started)} passed, "
            f"about {_duration(left)} left"
        )
        if terminal:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if number == count else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
