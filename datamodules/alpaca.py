"""Alpaca: an instruction, perhaps an input, and one response."""

from __future__ import annotations

from typing import Any, Literal

from datamodules.base import InstructionDataModule
from datamodules.cells import require_columns, text_cell
from datamodules.examples import Example
from datamodules.prompts import AlpacaPrompt, ChatPrompt, PromptStyle
from datamodules.sources import read_rows
from falqon.errors import InputError


class AlpacaDataModule(InstructionDataModule):
    """Data in the form of `tatsu-lab/alpaca`: columns instruction, output and, optionally, input.

    Args:
        prompt: `alpaca`: the Stanford Alpaca prompt and the EOS token; `chat`: the tokenizer's chat
            template, with the input below the instruction.
        **kwargs: See `InstructionDataModule`.

    Raises:
        InputError: If a setting is out of range.
    """

    def __init__(self, *, prompt: Literal["alpaca", "chat"] = "alpaca", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if prompt not in ("alpaca", "chat"):
            raise InputError(f"prompt: {prompt!r} is unknown; use alpaca or chat.")
        self.prompt = prompt

    def make_style(self) -> PromptStyle:
        """The Alpaca prompt or the tokenizer's chat template."""
        if self.prompt == "chat":
            return ChatPrompt(self.tokenizer)
        return AlpacaPrompt(self.eos_token())

    def read_examples(self, path: str, key: str) -> list[Example]:
        """Reads rows of instruction, input and output; a null input counts as empty."""
        table = read_rows(path, key)
        examples: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            require_columns(row, ("instruction", "output"), where)
            turns = (text_cell(row, "instruction", where), text_cell(row, "output", where))
            context = "" if row.get("input") is None else text_cell(row, "input", where)
            examples.append(Example(turns=turns, context=context, where=where))
        return examples
