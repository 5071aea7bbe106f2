"""OASST1: OpenAssistant conversations of one or several turns."""

from __future__ import annotations

from typing import Any, Literal

from datamodules.base import InstructionDataModule
from datamodules.examples import Example
from datamodules.prompts import ChatPrompt, GuanacoPrompt, PromptStyle
from datamodules.sources import read_rows
from datamodules.threads import ThreadOptions, read_threads
from falqon.errors import InputError


class OASST1DataModule(InstructionDataModule):
    """Data in the form of `OpenAssistant/oasst1` or `timdettmers/openassistant-guanaco`.

    Threads of one message tree are never in both the training and the validation set.

    Args:
        prompt: `chat`: the tokenizer's chat template; `guanaco`: `### Human: ...### Assistant: ...`
            with the EOS token after every assistant turn.
        threads: `best`: one thread a tree, along the best-ranked replies; `all`: every path from
            the first message to a last answer, with the turns that they share repeated.
        lang: Language code that every message must have, as `en`; left out, all languages.
        include_synthetic: Whether to use messages written by a model.
        **kwargs: See `InstructionDataModule`.

    Raises:
        InputError: If a setting is out of range.
    """

    def __init__(
        self,
        *,
        prompt: Literal["chat", "guanaco"] = "chat",
        threads: Literal["best", "all"] = "best",
        lang: str | None = None,
        include_synthetic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if prompt not in ("chat", "guanaco"):
            raise InputError(f"prompt: {prompt!r} is unknown; use chat or guanaco.")
        if threads not in ("best", "all"):
            raise InputError(f"threads: {threads!r} is unknown; use best or all.")
        self.prompt = prompt
        self.thread_options = ThreadOptions(threads, lang, include_synthetic)

    def make_style(self) -> PromptStyle:
        """The tokenizer's chat template or Human and Assistant headers."""
        if self.prompt == "chat":
            return ChatPrompt(self.tokenizer)
        return GuanacoPrompt(self.eos_token())

    def read_examples(self, path: str, key: str) -> list[Example]:
        """Reads trees, messages or guanaco texts as threads."""
        return read_threads(read_rows(path, key), self.thread_options)
