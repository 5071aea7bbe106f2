"""The text around a prompt: what a model was trained to answer to, for training and for use."""

from __future__ import annotations

from typing import Any, Literal, get_args

from falqon.errors import InputError

PromptFormat = Literal["chat", "alpaca", "guanaco", "plain"]
PROMPT_FORMATS: tuple[str, ...] = get_args(PromptFormat)

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The Stanford Alpaca prompt for rows with an input."""

ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
"""The Stanford Alpaca prompt for rows without an input."""

HUMAN, ASSISTANT = "### Human:", "### Assistant:"
"""Turn headers of openassistant-guanaco."""


def alpaca_template(context: str) -> str:
    """The Alpaca prompt for a row with this input, with fields `instruction` and `input`."""
    return ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT


def with_context(text: str, context: str) -> str:
    """A user's words and, below them, the input that they are about."""
    return f"{text}\n\n{context}" if context.strip() else text


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a BOS in front of a text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def choose_format(
    given: str | None, recorded: str | None, tokenizer: Any, where: str = "the model"
) -> PromptFormat:
    """The prompt format to use.

    Args:
        given: What the user asked for; None for what is known.
        recorded: What the model was trained with, if that is known.
        tokenizer: Decides if nothing else does: its chat template if it has one, else plain text.
        where: How to name the model in an error.

    Raises:
        InputError: An unknown format, or `chat` for a tokenizer without a chat template.
    """
    template = getattr(tokenizer, "chat_template", None)
    chosen = given or recorded or ("chat" if template else "plain")
    if chosen not in PROMPT_FORMATS:
        raise InputError(
            f"prompt format {chosen!r} is unknown; choose one of {', '.join(PROMPT_FORMATS)}."
        )
    if chosen == "chat" and not template:
        raise InputError(
            f"the tokenizer of {where} has no chat template. Choose another prompt format: "
            "alpaca, guanaco or plain."
        )
    return chosen  # type: ignore[return-value]


def render_prompt(form: PromptFormat, tokenizer: Any, text: str, context: str = "") -> str:
    """A single-turn prompt as the model sees it, up to where it answers.

    Args:
        form: Prompt format.
        tokenizer: Its chat template is used with `chat`.
        text: The user's words.
        context: An input that they are about.

    Raises:
        InputError: If the chat template refuses the prompt.
    """
    if form == "alpaca":
        return alpaca_template(context).format(instruction=text, input=context)
    words = with_context(text, context)
    if form == "guanaco":
        return f"{HUMAN} {words}{ASSISTANT}"
    if form == "plain":
        return words
    import jinja2

    try:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses the prompt {words[:40]!r}: {error}") from error
    return rendered


def encode_prompt(form: PromptFormat, tokenizer: Any, text: str, context: str = "") -> list[int]:
    """Token ids of a single-turn prompt, as in training: chat templates write their own BOS."""
    rendered = render_prompt(form, tokenizer, text, context)
    bos = [tokenizer.bos_token_id] if form != "chat" and adds_bos(tokenizer) else []
    return [*bos, *tokenizer(rendered, add_special_tokens=False)["input_ids"]]
