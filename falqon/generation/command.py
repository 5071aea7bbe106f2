"""`falqon generate`: answers of a trained model, streamed to a terminal or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from falqon.errors import InputError

_DESCRIPTION = """\
Answer prompts with a trained model: a run (its served FP8 weights), a checkpoint, an exported
directory, or any causal LM. The prompt gets the text around it that the model was trained with.
Without --prompt and --prompts-file the prompt is read from standard input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `falqon generate`."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add_model_arguments(parser)
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    add(
        "--prompts-file",
        metavar="FILE",
        help="text with one prompt a line, or .jsonl with prompt, or instruction and input",
    )
    add(
        "--prompt-format",
        choices=("auto", "chat", "alpaca", "guanaco", "plain"),
        default="auto",
        help="text around a prompt; auto: that of the training if it is recorded, else the "
        "tokenizer's chat template, else none (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (%(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of sampling; 0 takes the most likely token (default: %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the tokens that together have this probability (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="prompts at once; sampled answers depend on it (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object a prompt, one a line")
    add("--output", metavar="FILE", help="write these lines to a file, whole or not at all")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, for every command that uses one."""
    add = parser.add_argument
    add(
        "model",
        help="the directory of a run, a .ckpt file, a directory of falqon export or meld, or a "
        "model: a directory, .gguf file, package:NAME or hub id",
    )
    add("--base", metavar="NAME", help="the untuned model (default: what the checkpoint says)")
    add("--revision", help="branch, tag or commit on the hub")
    add(
        "--as-trained",
        action="store_true",
        help="take a checkpoint with pending changes, and compute as validation within the "
        "training does, instead of refusing it",
    )
    add("--device", help="where to run (default: cuda if there is one, else cpu)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Answer, on stdout.

    Returns:
        Exit status 0.

    Raises:
        InputError: For options that cannot be used, or a model that cannot.
    """
    from falqon.files import check_writable, write_text
    from falqon.generation.answers import Sampling
    from falqon.loading import open_model
    from falqon.premeld.command import choose_device
    from falqon.prompts import choose_format, encode_prompt

    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
    check_batch_size(arguments.batch_size)
    if arguments.output:
        check_writable(arguments.output)
    device = choose_device(arguments.device)
    prompts = _prompts(arguments)
    opened = open_model(
        arguments.model,
        revision=arguments.revision,
        as_trained=arguments.as_trained,
        base=arguments.base,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = opened.tokenizer()
    given = None if arguments.prompt_format == "auto" else arguments.prompt_format
    form = choose_format(given, opened.description.prompt, tokenizer, arguments.model)
    encoded = [encode_prompt(form, tokenizer, p.text, p.context) for p in prompts]
    if not all(encoded):
        raise InputError("a prompt has no token. Write something, or choose another prompt format.")
    _check_lengths(encoded, sampling.max_new_tokens, opened.longest_context())
    model = opened.load(device)
    rows: list[dict[str, Any]] = []
    for row in _answers(model, tokenizer, prompts, encoded, sampling, arguments):
        rows.append(row)
        if not arguments.output:
            _print(row, arguments.json, len(prompts))
    if arguments.output:
        write_text(arguments.output, "".join(_line(row) for row in rows))
        sys.stderr.write(f"{len(rows)} answers: {arguments.output}\n")
    return 0


def check_batch_size(size: int) -> None:
    """Refuse a batch size below one.

    Raises:
        InputError: It is.
    """
    if size < 1:
        raise InputError(f"--batch-size is {size}; it must be at least 1.")


def _check_lengths(encoded: Sequence[Sequence[int]], answer: int, limit: int | None) -> None:
    """Refuse prompts that the model has no positions for, their answers included."""
    for number, tokens in enumerate(encoded, 1):
        if limit is not None and len(tokens) + answer > limit:
            raise InputError(
                f"prompt {number} has {len(tokens)} tokens and its answer up to {answer}, and the "
                f"model takes {limit}. Shorten it, or give a smaller --max-new-tokens."
            )


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    from falqon.generation.prompt_file import Prompt, read_prompts

    if arguments.prompt and arguments.prompts_file:
        raise InputError("--prompt and --prompts-file were both given: choose one.")
    if arguments.prompts_file:
        return read_prompts(arguments.prompts_file)
    if arguments.prompt:
        texts = arguments.prompt
    else:
        if sys.stdin.isatty():
            sys.stderr.write("prompt, then Ctrl-D:\n")
        texts = [sys.stdin.read().strip()]
    if not all(text.strip() for text in texts):
        raise InputError("the prompt is empty. Give --prompt TEXT, --prompts-file FILE, or stdin.")
    return [Prompt(text) for text in texts]


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    encoded: Sequence[Sequence[int]],
    sampling: Any,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the prompts; a single one is printed as it comes."""
    import torch
    from transformers import TextStreamer

    from falqon.generation.answers import answer, pad_left

    torch.manual_seed(arguments.seed)
    streamer = None
    if len(prompts) == 1 and not arguments.json and not arguments.output:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else (tokenizer.eos_token_id or 0)
    for start in range(0, len(prompts), arguments.batch_size):
        part = slice(start, start + arguments.batch_size)
        ids, mask = pad_left(encoded[part], pad)
        texts = answer(model, tokenizer, ids, mask, sampling, streamer)
        for index, text in enumerate(texts, start):
            row = {"row": index, "prompt": prompts[index].text}
            row |= {"input": prompts[index].context} if prompts[index].context else {}
            if prompts[index].reference is not None:
                row["reference"] = prompts[index].reference
            yield row | {"answer": text}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _print(row: dict[str, Any], as_json: bool, count: int) -> None:
    if as_json:
        sys.stdout.write(_line(row))
    elif count > 1:  # a single answer was streamed
        head = f"[{row['row'] + 1}] {row['prompt']}"
        sys.stdout.write(f"{head}\n{row['answer']}\n\n")
    sys.stdout.flush()
