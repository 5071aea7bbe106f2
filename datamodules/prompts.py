"""From an example to text, with the characters marked that the model learns to write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from datamodules.examples import Example
from falqon.errors import InputError
from falqon.prompts import ASSISTANT, HUMAN, alpaca_template, with_context


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one example.

    Attributes:
        text: Prompt and responses, as the model sees them (without a BOS added by the tokenizer).
        spans: Half-open character ranges of `text` that are supervised, in order: every response
            with its end-of-turn token.
        head: Number of characters of `text` before the first user's words; truncation keeps them.
        prompt: Text up to the last response, from which the model would generate.
        question: The prompt as a reader would read it, without template.
        reference: The last response.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    head: int
    prompt: str
    question: str
    reference: str


class PromptStyle(Protocol):
    """Turns examples into text.

    Attributes:
        adds_bos: Whether a BOS goes in front if the tokenizer adds one. Chat templates write their
            own.
    """

    adds_bos: bool

    def render(self, example: Example) -> Rendered:
        """Renders one example."""
        ...


class AlpacaPrompt:
    """The Alpaca prompt, one response, then the EOS token.

    Args:
        eos_token: Text of the EOS token.
    """

    adds_bos = True

    def __init__(self, eos_token: str) -> None:
        self.eos_token = eos_token

    def render(self, example: Example) -> Rendered:
        """Renders a single-turn example; the response and the EOS token are supervised."""
        instruction, response = example.turns
        template = alpaca_template(example.context)
        prompt = template.format(instruction=instruction, input=example.context)
        text = f"{prompt}{response}{self.eos_token}"
        return Rendered(
            text=text,
            spans=((len(prompt), len(text)),),
            head=template.index("{instruction}"),
            prompt=prompt,
            question=_question(example),
            reference=response,
        )


class GuanacoPrompt:
    """`### Human: ...### Assistant: ...` turns, with the EOS token after every assistant turn.

    Args:
        eos_token: Text of the EOS token.
    """

    adds_bos = True

    def __init__(self, eos_token: str) -> None:
        self.eos_token = eos_token

    def render(self, example: Example) -> Rendered:
        """Renders a conversation; every assistant turn and its EOS token are supervised."""
        text, prompt = "", ""
        spans: list[tuple[int, int]] = []
        for user, assistant in _pairs(example):
            prompt = f"{text}{HUMAN} {user}{ASSISTANT}"
            # The space belongs to the response: most tokenizers join it to the first word.
            text = f"{prompt} {assistant}{self.eos_token}"
            spans.append((len(prompt), len(text)))
        return Rendered(
            text=text,
            spans=tuple(spans),
            head=len(HUMAN) + 1,
            prompt=prompt,
            question=_question(example),
            reference=example.turns[-1],
        )


class ChatPrompt:
    """The tokenizer's own chat template.

    The supervised characters are found by rendering the conversation up to each assistant turn:
    that must be how the whole conversation starts. A turn ends with the first special token after
    its text (`<|im_end|>`, `<|eot_id|>`, `</s>` ...); white space after that is the template's, not
    the model's.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.

    Raises:
        InputError: If the tokenizer has no chat template.
    """

    adds_bos = False

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"prompt: chat needs a chat template, and the tokenizer {tokenizer.name_or_path!r} "
                "has none. Use prompt: alpaca (Alpaca) or prompt: guanaco (OASST1), or the "
                "tokenizer of an instruction-tuned model."
            )
        self.tokenizer = tokenizer
        specials = {str(token) for token in tokenizer.all_special_tokens}
        specials |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted((s for s in specials if s), key=lambda s: (-len(s), s))
        # With no special token at all nothing may match, an empty alternative least of all.
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._end_of_turn = re.compile(rf"\s*(?:{alternatives})")

    def render(self, example: Example) -> Rendered:
        """Renders a conversation; every assistant turn with its end-of-turn token is supervised.

        Raises:
            InputError: If the template refuses the conversation, or renders it in a way in which
                the assistant turns cannot be found.
        """
        messages = _messages(example)
        text = self._apply(messages, False, example)
        spans: list[tuple[int, int]] = []
        prompt = ""
        for turn in range(1, len(messages), 2):
            prompt = self._apply(messages[:turn], True, example)
            spans.append(self._span(text, prompt, messages, turn, example))
        head = text.find(messages[0]["content"].strip())
        return Rendered(
            text=text,
            spans=tuple(spans),
            head=max(head, 0),
            prompt=prompt,
            question=_question(example),
            reference=example.turns[-1],
        )

    def _span(
        self, text: str, prompt: str, messages: list[dict[str, str]], turn: int, example: Example
    ) -> tuple[int, int]:
        """Characters of one assistant turn within the text of the whole conversation."""
        start = len(prompt)
        opened = text.startswith(prompt)
        if not opened:  # the generation prompt says more than the history, e.g. "<think>"
            before = self._apply(messages[:turn], False, example)
            if not text.startswith(before):
                raise self._unusable(example, "earlier turns change when later ones are added")
            start = len(before)
        stop = self._stop(text, start, messages, turn, example)
        content = messages[turn]["content"].strip()
        first = text.find(content, start, stop)
        at = first
        while at >= 0:
            match = self._end_of_turn.match(text, at + len(content), stop)
            if match:
                return (start if opened else at), match.end()
            at = text.find(content, at + 1, stop)
        if first < 0:
            raise self._unusable(example, "it changes the text of an assistant turn")
        return (start if opened else first), stop  # a template without an end-of-turn token

    def _stop(
        self, text: str, start: int, messages: list[dict[str, str]], turn: int, example: Example
    ) -> int:
        """Upper bound of an assistant turn: the end of the text or the start of the next turn."""
        if turn + 1 == len(messages):
            return len(text)
        through = self._apply(messages[: turn + 1], False, example)
        if text.startswith(through):
            return len(through)
        following = messages[turn + 1]["content"].strip()
        own = messages[turn]["content"].strip()
        found = text.find(following, max(text.find(own, start), start) + len(own))
        return found if found >= 0 else len(text)

    def _apply(self, messages: list[dict[str, str]], generation: bool, example: Example) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateError as error:
            raise self._unusable(example, f"it refuses the conversation: {error}") from error

    def _unusable(self, example: Example, reason: str) -> InputError:
        return InputError(
            f"{example.where}: the chat template of {self.tokenizer.name_or_path!r} cannot be used "
            f"to mark the responses: {reason}. Use prompt: alpaca (Alpaca) or prompt: guanaco "
            "(OASST1), or another tokenizer."
        )


def _pairs(example: Example) -> list[tuple[str, str]]:
    return list(zip(example.turns[::2], example.turns[1::2], strict=True))


def _first_user(example: Example) -> str:
    return with_context(example.turns[0], example.context)


def _messages(example: Example) -> list[dict[str, str]]:
    contents = (_first_user(example), *example.turns[1:])
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def _question(example: Example) -> str:
    contents = (_first_user(example), *example.turns[1:-1])
    if len(contents) == 1:
        return contents[0]
    names = ("User", "Assistant")
    return "\n\n".join(f"{names[i % 2]}: {text}" for i, text in enumerate(contents))
