"""lm-eval on a model in memory, with its settings said and recorded."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.evaluation.tasks import COMMONSENSE, TaskSet, quiet
from falqon.generation.answers import evaluating
from falqon.prompts import adds_bos


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Attributes:
        num_fewshot: Solved examples before each question; None for what each task says.
        limit: Only the first so many questions of each task, or a share below 1.
        batch_size: Requests at once, on each device.
        add_bos: Put a BOS in front of every prompt; None for what the tokenizer does by itself.
        chat_template: Put the questions into the tokenizer's chat template, solved examples as
            earlier turns.
        max_length: Longest prompt in tokens; the model's own limit if None.
        seed: Of few-shot examples that a task draws by chance.

    Raises:
        InputError: For a number out of range.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int = 8
    add_bos: bool | None = None
    chat_template: bool = False
    max_length: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"num_fewshot is {self.num_fewshot}; it must be at least 0.")
        if self.limit is not None and (
            not self.limit > 0 or (self.limit >= 1 and self.limit != int(self.limit))
        ):
            raise InputError(
                f"limit is {self.limit}; give a number of questions, or a share between 0 and 1."
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; it must be at least 2.")


def with_bos(tokenizer: Any, add_bos: bool | None) -> tuple[Any, bool]:
    """A copy of a tokenizer that puts a BOS in front of a text, or does not.

    Args:
        tokenizer: A fast tokenizer; not changed.
        add_bos: What it shall do; None for what it does.

    Returns:
        The copy, and whether it adds a BOS with `add_special_tokens=True`.

    Raises:
        InputError: A BOS is wanted of a tokenizer that has none.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if add_bos is None:
        return tokenizer, adds_bos(tokenizer)
    if not add_bos:
        return tokenizer, False  # whoever encodes says add_special_tokens=False
    if tokenizer.bos_token is None:
        raise InputError("a BOS is wanted, and the tokenizer has none: leave --add-bos out.")
    if not adds_bos(tokenizer):
        bos = (str(tokenizer.bos_token), int(tokenizer.bos_token_id))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    if not adds_bos(tokenizer):
        raise InputError("the tokenizer cannot be made to add a BOS: leave --add-bos out.")
    return tokenizer, True


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: TaskSet,
    settings: TaskSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    silent: bool = False,
) -> dict[str, Any] | None:
    """Score a model. Its modes and the state of every random generator are left as they were.

    Args:
        model: On the device where it is to run.
        tokenizer: The model's.
        tasks: As `load_tasks` gives them. They keep their number of solved examples: load them
            again for other settings.
        settings: How.
        rank, world_size: Of this process among those that share the questions; all of them have
            to call this, each with a whole model.
        silent: Show no progress.

    Returns:
        Plain values, None on other ranks than 0: `add_bos` (what was done), and `tasks`: for every
        task and group its `alias`, `n_shot`, `version`, `questions`, `metrics`, `stderr`, and
        `inputs_sha256` (of its questions, prompts and answers; None for a group).

    Raises:
        InputError: The tokenizer or the model cannot do what a task needs.
    """
    from lm_eval.evaluator import evaluate

    tokenizer, bos = with_bos(tokenizer, settings.add_bos)
    if settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: leave --chat-template out.")
    with quiet(), isolate_rng(), evaluating(model), _progress(silent):
        harness = _harness(model, tokenizer, bos, settings, rank, world_size)
        try:
            results: Any = evaluate(
                harness,
                task_dict=_prepare(tasks, settings),
                limit=settings.limit,
                log_samples=True,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            text = str(error).strip().split("\n", maxsplit=1)[0][:300]
            raise InputError(f"lm-eval cannot run {', '.join(tasks.names)}: {text}") from error
    if results is None:
        return None
    return {"add_bos": bos, "tasks": _plain(results)}


def _prepare(tasks: TaskSet, settings: TaskSettings) -> Any:
    """The tasks with their number of examples, and every generator seeded, as lm-eval does it."""
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    loaded = tasks.manager.load(list(tasks.items))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        wanted = own if settings.num_fewshot is None else settings.num_fewshot
        task.set_config(key="num_fewshot", value=0 if own == 0 or wanted is None else wanted)
        task.set_fewshot_seed(seed=settings.seed)
    return loaded


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[None]:
    # lm-eval has no switch for its progress bars, which look up sys.stderr when they start.
    with contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
        yield


def _harness(
    model: PreTrainedModel,
    tokenizer: Any,
    add_bos: bool,
    settings: TaskSettings,
    rank: int,
    world_size: int,
) -> Any:
    """lm-eval's view of the model, with torch.distributed between its ranks."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if world_size == 1:
                return tensor
            parts = [torch.zeros_like(tensor) for _ in range(world_size)]
            torch.distributed.all_gather(parts, tensor)
            return torch.stack(parts)

        def barrier(self) -> None:
            if world_size > 1:
                torch.distributed.barrier()

    harness = InMemory(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        add_bos_token=add_bos,
    )
    harness._rank, harness._world_size = rank, world_size
    return harness


def _plain(results: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        metrics, errors = {}, {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            label = metric if filtered == "none" else f"{metric}/{filtered}"
            if metric.endswith("_stderr"):
                errors[label.replace("_stderr", "", 1)] = float(value)
            else:
                metrics[label] = float(value)
        if not metrics:
            continue
        counts = results["n-samples"].get(name, {})
        samples = (results.get("samples") or {}).get(name)
        found[name] = {
            "alias": str(values.get("alias", name)).strip(" -"),
            "n_shot": results["n-shot"].get(name),
            "version": results["versions"].get(name),
            "questions": counts.get("effective"),
            "metrics": metrics,
            "stderr": errors,
            "inputs_sha256": None if samples is None else _hash(samples),
        }
    return found


def _hash(samples: list[dict[str, Any]]) -> str:
    """Of what was asked, in the order of the questions whatever rank they were on."""
    lines = sorted(
        f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}"
        for sample in samples
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def average(tasks: Mapping[str, Any]) -> float | None:
    """Mean accuracy over the paper's commonsense tasks; None if one of them is missing."""
    found = [tasks[name]["metrics"].get("acc") for name in COMMONSENSE if name in tasks]
    if len(found) < len(COMMONSENSE) or None in found:
        return None
    return float(sum(found) / len(found))
