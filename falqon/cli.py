"""The `falqon` command: what is done with the files of a run.

Training is `train.py`. A subcommand is one function that adds its parser and sets `run`, listed in
`_COMMANDS`; what it needs is imported when it runs, so that `falqon --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from falqon.errors import InputError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments after the command's name; those of the process if None.

    Returns:
        Exit status: 0 if all went well, 2 for a user's mistake, told in one line on stderr.

    Raises:
        SystemExit: argparse's own, for `--help` (0) and arguments that do not parse (2).
    """
    parser = argparse.ArgumentParser(
        prog="falqon", description="Inspect and use what FALQON training wrote."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in _COMMANDS:
        add_command(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        sys.stderr.write(f"falqon: error: {error}\n")
        return 2
    except BrokenPipeError:  # `falqon inspect ... | head`: the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _add_inspect(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a checkpoint, melded model, delta or export holds",
        description="Show what a file or directory of FALQON holds, after comparing all of it with "
        "the hashes that were written with it.",
    )
    parser.add_argument(
        "path",
        help="a .ckpt file, the directory of a run (its checkpoints/last.ckpt), or a directory "
        "that falqon meld or falqon export wrote",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_inspect)


def _show(
    report: dict[str, Any],
    as_text: Callable[[dict[str, Any]], str],
    arguments: argparse.Namespace,
) -> int:
    text = json.dumps(report, indent=2) if arguments.json else as_text(report)
    sys.stdout.write(text + "\n")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from falqon.inspect import format_report, inspect

    report = inspect(arguments.path)
    return _show(report, format_report, arguments)


def _add_doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show what this machine can do",
        description="Show how this machine's processors multiply FP8, and what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from falqon.doctor import examine, format_report

    report = examine()
    return _show(report, format_report, arguments)


def _add_export(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a trained model for transformers, vLLM or SGLang",
        description="Write the trained model of a run as a directory that stands alone: weights "
        "(safetensors), configuration, tokenizer and a model card. The weights are those of the "
        "checkpoint, bit for bit. See docs/serving.md.",
    )
    parser.add_argument(
        "path",
        help="the directory of a run (its served.ckpt), or a .ckpt file with nothing pending",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "bf16", "delta"),
        default="compressed-tensors",
        help="compressed-tensors: the FP8 codes and their scales (default); bf16: their values, as "
        "an ordinary checkpoint; delta: what was changed, for falqon apply and falqon.load_delta",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="where the model that was trained is now, for configuration, tokenizer and base: a "
        "directory, .gguf file, package:NAME or hub id (default: what the checkpoint says)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    _add_writing(parser)
    parser.set_defaults(run=_export)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest weight file, in B, KB, MB or GB (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _export(arguments: argparse.Namespace) -> int:
    from falqon.export import export_model, format_report

    report = export_model(
        arguments.path,
        arguments.output,
        arguments.format,
        model=arguments.model,
        revision=arguments.revision,
        shard_size=arguments.shard_size,
    )
    return _show(report, format_report, arguments)


def _add_apply(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "apply",
        help="write the trained model that a delta belongs to",
        description="Write the trained model that a delta belongs to: the bytes that falqon export "
        "would have written. The base is read layer by layer and compared with the delta's hashes.",
    )
    parser.add_argument("path", metavar="DELTA", help="a directory of falqon export --format delta")
    parser.add_argument("--output", required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="the model that was trained: a directory of falqon meld, a model directory, .gguf "
        "file, package:NAME or hub id (default: what the delta says)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the base on the hub")
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "bf16"),
        default="compressed-tensors",
        help="as in falqon export (default: %(default)s)",
    )
    _add_writing(parser)
    parser.set_defaults(run=_apply)


def _apply(arguments: argparse.Namespace) -> int:
    from falqon.delta.restore import apply_delta
    from falqon.export import format_report

    report = apply_delta(
        arguments.path,
        arguments.output,
        arguments.format,
        base=arguments.base,
        revision=arguments.revision,
        shard_size=arguments.shard_size,
    )
    return _show(report, format_report, arguments)


def _add_meld(subparsers: Subparsers) -> None:
    from falqon.premeld.command import add_arguments, run

    parser = subparsers.add_parser("meld", help="meld a model once, into a directory to train from")
    add_arguments(parser)
    parser.set_defaults(run=run)


def _add_generate(subparsers: Subparsers) -> None:
    from falqon.generation.command import add_arguments, run

    parser = subparsers.add_parser("generate", help="answer prompts with a trained model")
    add_arguments(parser)
    parser.set_defaults(run=run)


def _add_evaluate(subparsers: Subparsers) -> None:
    from falqon.evaluation.command import add_arguments, run

    parser = subparsers.add_parser("evaluate", help="score a trained model, and its base beside it")
    add_arguments(parser)
    parser.set_defaults(run=run)


_COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    _add_meld,
    _add_inspect,
    _add_export,
    _add_apply,
    _add_generate,
    _add_evaluate,
    _add_doctor,
)


if __name__ == "__main__":
    sys.exit(main())
