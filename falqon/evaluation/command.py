"""`falqon evaluate`: tasks and perplexity of a trained model, with its base beside it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falqon.errors import InputError
from falqon.generation.command import add_model_arguments

if TYPE_CHECKING:
    from falqon.callbacks.wandb_logger import WandbSettings
    from falqon.evaluation.harness import TaskSettings
    from falqon.evaluation.perplexity import TextFile
    from falqon.evaluation.tasks import TaskSet
    from falqon.loading import Opened

_DESCRIPTION = """\
Score a trained model: a run (its served FP8 weights), a checkpoint, an exported directory, or any
causal LM. Tasks are run by lm-eval (pip install 'falqon[eval]') on the model in memory. With
--with-base the untuned model stands in the same table. See docs/evaluation.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `falqon evaluate`."""
    parser.description = _DESCRIPTION
    # A list of tasks would take the model for one more if that stood behind it.
    parser.usage = "falqon evaluate MODEL [--tasks TASK ...] [--perplexity FILE] [options]"
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="falqon_mini and falqon_mini_cloze (ship with falqon, need no hub), paper (the "
        "paper's eight), any task or group of lm-eval, a YAML file, a directory of such files",
    )
    add(
        "--include-path",
        nargs="+",
        default=[],
        metavar="DIR",
        help="directories with YAML files of more tasks; code beside them is run",
    )
    add(
        "--num-fewshot",
        "--num_fewshot",
        type=int,
        metavar="N",
        help="solved examples before each question (default: what a task says)",
    )
    add("--limit", type=float, metavar="N", help="first questions of each task, or a share below 1")
    add(
        "--batch-size",
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="requests at once (default: %(default)s)",
    )
    add("--with-base", action="store_true", help="score the untuned model too, in the same table")
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put a BOS in front of every prompt and text, or do not (default: what the tokenizer "
        "does; results say what was done)",
    )
    add(
        "--chat-template",
        action="store_true",
        help="put questions into the tokenizer's chat template",
    )
    add("--max-length", type=int, metavar="N", help="longest prompt in tokens (the model's limit)")
    add("--seed", type=int, default=1234, help="of few-shot examples (default: %(default)s)")
    add(
        "--perplexity",
        metavar="FILE",
        help="measure perplexity on a text file, or on a .jsonl with one document a line",
    )
    add("--text-column", default="text", metavar="KEY", help="of the .jsonl (default: text)")
    add("--window", type=int, metavar="N", help="tokens of a window (the model's limit, to 2048)")
    add("--stride", type=int, metavar="N", help="tokens from window to window (half of a window)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--output", metavar="FILE", help="write the JSON object to a file, whole or not at all")
    add("--wandb", action="store_true", help="log to W&B; for a run's directory to the run's own")
    add("--wandb-project", default="falqon", metavar="NAME", help="(default: %(default)s)")
    add("--wandb-name", metavar="NAME", help="of the W&B run")
    add(
        "--wandb-mode",
        choices=("auto", "online", "offline"),
        default="auto",
        help="auto: online if you are logged in (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the table, or the JSON object, on stdout.

    Returns:
        Exit status 0.

    Raises:
        InputError: For options, tasks, files or models that cannot be used: before any model is
            loaded, where that can be known.
    """
    from falqon.evaluation.harness import TaskSettings
    from falqon.evaluation.perplexity import choose_windows, read_text
    from falqon.evaluation.report import format_table, versions
    from falqon.evaluation.tasks import load_tasks
    from falqon.files import check_writable, write_text
    from falqon.premeld.command import choose_device

    settings = TaskSettings(
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        add_bos=arguments.add_bos,
        chat_template=arguments.chat_template,
        max_length=arguments.max_length,
        seed=arguments.seed,
    )
    if not arguments.tasks and not arguments.perplexity:
        raise InputError("nothing to evaluate: give --tasks, --perplexity FILE, or both.")
    device = choose_device(arguments.device)
    if arguments.output:
        check_writable(arguments.output)
    text = read_text(arguments.perplexity, arguments.text_column) if arguments.perplexity else None
    if arguments.wandb:
        _check_wandb(arguments)
    models = _open(arguments)
    for opened in models.values() if text is not None else ():
        choose_windows(opened.longest_context(), arguments.window, arguments.stride)
    tasks = load_tasks(arguments.tasks, arguments.include_path) if arguments.tasks else None
    report: dict[str, Any] = {name: opened.description.plain() for name, opened in models.items()}
    report |= {
        "tasks": list(tasks.names) if tasks is not None else [],
        "settings": asdict(settings) | {"device": device, "text": arguments.perplexity},
        "versions": versions(),
        "results": {},
    }
    for name, opened in models.items():
        report["results"][name] = _score(opened, device, tasks, text, settings, arguments)
    if tasks is not None:
        _use_task_names(report)
    printed = json.dumps(_without_nan(report), indent=2, allow_nan=False)
    if arguments.output:
        write_text(arguments.output, printed + "\n")
    sys.stdout.write((printed if arguments.json else format_table(report)) + "\n")
    sys.stdout.flush()
    if arguments.wandb:
        _log(report, arguments)
    return 0


def _open(arguments: argparse.Namespace) -> dict[str, Opened]:
    """The models by the name of their column, base first."""
    from falqon.loading import open_model

    opened = open_model(
        arguments.model,
        revision=arguments.revision,
        as_trained=arguments.as_trained,
        base=arguments.base,
        hashed=True,
        trust_remote_code=arguments.trust_remote_code,
    )
    if not arguments.with_base:
        return {"model": opened}
    about = opened.description
    if about.base is None:
        raise InputError(
            f"the untuned model of {arguments.model} is not recorded: name it with --base."
        )
    base = open_model(
        about.base,
        revision=about.base_revision,
        hashed=True,
        trust_remote_code=arguments.trust_remote_code,
    )
    return {"base": base, "model": opened}


def _score(
    opened: Opened,
    device: str,
    tasks: TaskSet | None,
    text: TextFile | None,
    settings: TaskSettings,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One model's results; the model is gone afterwards."""
    from falqon.evaluation.harness import average, run_tasks
    from falqon.evaluation.perplexity import measure_perplexity

    tokenizer = opened.tokenizer()
    model = opened.load(device)
    started = time.perf_counter()
    found: dict[str, Any] = {"tasks": {}}
    if tasks is not None:
        found |= run_tasks(model, tokenizer, tasks, settings) or {}
        found["average"] = average(found["tasks"])
    if text is not None:
        found["perplexity"] = measure_perplexity(
            model,
            tokenizer,
            text,
            window=arguments.window,
            stride=arguments.stride,
            batch_size=settings.batch_size,
            add_bos=settings.add_bos,
        )
        found["add_bos"] = found["perplexity"]["add_bos"]
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found


def _without_nan(value: Any) -> Any:
    """Plain values with None for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _use_task_names(report: dict[str, Any]) -> None:
    """Name the table's rows as the results do: a file has the name of its task."""
    known = next(iter(report["results"].values()))["tasks"]
    named = [name for name in report["tasks"] if name in known]
    report["tasks"] = named if len(named) == len(report["tasks"]) else list(known)


def _wandb_settings(arguments: argparse.Namespace) -> WandbSettings:
    from falqon.callbacks.wandb_logger import WandbSettings

    return WandbSettings(
        project=arguments.wandb_project, name=arguments.wandb_name, mode=arguments.wandb_mode
    )


def _check_wandb(arguments: argparse.Namespace) -> None:
    from falqon.callbacks.wandb_logger import is_disabled

    if is_disabled(_wandb_settings(arguments)):
        raise InputError("--wandb was given, and W&B is disabled, by --wandb-mode or WANDB_MODE.")


def _log(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Metrics and a table to W&B; those of a run's directory go on with the run's own."""
    import wandb

    from falqon.callbacks.wandb_logger import make_wandb_logger
    from falqon.evaluation.report import metrics

    path = Path(arguments.model)
    root = path if path.is_dir() and (path / "wandb").is_dir() else Path.cwd()
    logger = make_wandb_logger(_wandb_settings(arguments), root, resume=root == path)
    assert logger is not None  # see `_check_wandb`
    prefixes = {"base": "eval_base", "model": "eval"}
    flat: dict[str, float] = {}
    for name, result in report["results"].items():
        flat |= metrics(result, prefixes[name])
    rows = [
        [name, *key.split("/", 2)[1:], value]
        for name in report["results"]
        for key, value in metrics(report["results"][name]).items()
    ]
    table = wandb.Table(columns=["model", "task", "metric", "value"], data=rows)
    logger.experiment.log({**flat, "eval/table": table})
    wandb.finish()
