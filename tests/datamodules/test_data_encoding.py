"""Prompts, masks and truncation: what is supervised is the response and its end, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from datamodules.encoding import Encoder, truncate
from datamodules.examples import Example
from datamodules.prompts import AlpacaPrompt, ChatPrompt, GuanacoPrompt
from falqon.errors import InputError

ONE = Example(("Name a colour.", "Red, of course."))
WITH_INPUT = Example(("Add one.", "Three."), context="Two")
MULTI = Example(("Two plus two?", "Four.", "And one?", "  Five,\n\n  I think. "))


def supervised_texts(tokenizer: Any, tokens: Any, mask: Any) -> list[str]:
    pairs = zip(tokens.tolist(), mask.tolist(), strict=True)
    groups = groupby(pairs, lambda pair: pair[1])
    return [tokenizer.decode([t for t, _ in group]) for learned, group in groups if learned]


def encode(tokenizer: Any, style: Any, example: Example, max_length: int = 512) -> tuple[str, Any]:
    """Full text and supervised stretches of one example, as decoded from the tokens."""
    encoded = Encoder(tokenizer, style, max_length).encode([example])
    tokens, mask = encoded.rows[0]
    return tokenizer.decode(tokens.tolist()), supervised_texts(tokenizer, tokens, mask)


# --- prompts ----------------------------------------------------------------------------------


def test_alpaca_prompt_is_the_published_one(tokenizer: Any) -> None:
    text, learned = encode(tokenizer, AlpacaPrompt("</s>"), ONE)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
        "Red, of course.</s>"
    )
    assert learned == ["Red, of course.</s>"]


def test_alpaca_prompt_with_input(tokenizer: Any) -> None:
    text, learned = encode(tokenizer, AlpacaPrompt("</s>"), WITH_INPUT)
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd one.\n\n### Input:\nTwo\n\n### Response:Three.</s>"
    )
    assert learned == ["Three.</s>"]


def test_braces_in_an_instruction_are_left_alone(tokenizer: Any) -> None:
    text, _ = encode(tokenizer, AlpacaPrompt("</s>"), Example(("Use {input} and {x}.", "ok")))
    assert "Use {input} and {x}." in text


def test_guanaco_prompt_supervises_every_answer_with_eos(tokenizer: Any) -> None:
    text, learned = encode(tokenizer, GuanacoPrompt("</s>"), MULTI)
    assert text == (
        "### Human: Two plus two?### Assistant: Four.</s>### Human: And one?### Assistant:"
        "   Five,\n\n  I think. </s>"
    )
    assert learned == [" Four.</s>", "   Five,\n\n  I think. </s>"]


def test_chat_prompt_supervises_every_answer_with_its_end_of_turn(tokenizer: Any) -> None:
    text, learned = encode(tokenizer, ChatPrompt(tokenizer), MULTI)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo plus")
    assert learned == ["Four.<|im_end|>", "  Five,\n\n  I think. <|im_end|>"]
    assert text.endswith("<|im_end|>\n")  # the line break after it is the template's


def test_chat_puts_the_input_below_the_instruction(tokenizer: Any) -> None:
    text, learned = encode(tokenizer, ChatPrompt(tokenizer), WITH_INPUT)
    assert "user\nAdd one.\n\nTwo<|im_end|>" in text
    assert learned == ["Three.<|im_end|>"]


def test_chat_without_a_template_names_the_remedy(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="prompt: chat needs a chat template.*prompt: alpaca"):
        ChatPrompt(make_tokenizer(template=None))


LOOP = "{% for m in messages %}"
TEMPLATES = {
    # The end of the whole text is marked too, so an early turn is no prefix of the whole (Phi-3).
    "closing eos": (
        LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
    ),
    # Only the last answer gets an empty block of thoughts (Qwen3).
    "thoughts in the last turn": (
        LOOP + "<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The generation prompt says more than the history (DeepSeek-R1).
    "generation prompt with thoughts": (
        LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # Text is trimmed and there is no header (Llama 2).
    "trimmed": (
        LOOP + "{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("closing eos", ["Four.<|im_end|>", "  Five,\n\n  I think. <|im_end|>"]),
        (
            "thoughts in the last turn",
            ["Four.<|im_end|>", "<think>\n\n</think>\n\n  Five,\n\n  I think. <|im_end|>"],
        ),
        ("generation prompt with thoughts", ["Four.<|im_end|>", "Five,\n\n  I think. <|im_end|>"]),
        ("trimmed", [" Four. </s>", " Five,\n\n  I think. </s>"]),
    ],
)
def test_templates_in_the_field(
    make_tokenizer: Callable[..., Any], name: str, expected: list[str]
) -> None:
    tokenizer = make_tokenizer(template=TEMPLATES[name])
    assert encode(tokenizer, ChatPrompt(tokenizer), MULTI)[1] == expected


def test_an_answer_that_reads_like_the_template(make_tokenizer: Callable[..., Any]) -> None:
    """ "think" and "end" also occur in `<think>` and `<|im_end|>`."""
    tokenizer = make_tokenizer(template=TEMPLATES["thoughts in the last turn"])
    _, learned = encode(tokenizer, ChatPrompt(tokenizer), Example(("a", "end", "b", "think")))
    assert learned == ["end<|im_end|>", "<think>\n\n</think>\n\nthink<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP + "{{ m['content'] | upper }}<|im_end|>{% endfor %}", "changes the text"),
        ("{{ messages | length }}" + LOOP + "{{ m['content'] }}{% endfor %}", "earlier turns"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)
def test_an_unusable_template_is_explained(
    make_tokenizer: Callable[..., Any], template: str, reason: str
) -> None:
    style = ChatPrompt(make_tokenizer(template=template))
    with pytest.raises(InputError, match=rf"f, row 3: the chat template .*{reason}"):
        style.render(Example(("a", "b"), where="f, row 3"))


def test_real_smollm2_chat(smollm2: Any) -> None:
    """The template adds a default system prompt; the mask must be right behind it."""
    text, learned = encode(smollm2, ChatPrompt(smollm2), MULTI)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert learned == ["Four.<|im_end|>", "  Five,\n\n  I think. <|im_end|>"]
    code = Example(
        ("Write a loop.", "\tfor i in x:\n        print(i)\n\n\n    # caf\u00e9 \u4f60 2024\n")
    )
    assert encode(smollm2, ChatPrompt(smollm2), code)[1] == [code.turns[1] + "<|im_end|>"]


def test_real_smollm2_tokens_are_those_of_its_own_template(smollm2: Any) -> None:
    style = ChatPrompt(smollm2)
    encoder = Encoder(smollm2, style, 512)
    messages = [
        {"role": "user", "content": ONE.turns[0]},
        {"role": "assistant", "content": ONE.turns[1]},
    ]
    tokens, mask = encoder.encode([ONE]).rows[0]
    expected = smollm2.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokens.tolist() == expected
    prompt = smollm2.apply_chat_template(
        messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encoder.encode_prompts([style.render(ONE)])[0].tolist() == prompt
    assert int(np.argmax(mask)) == len(prompt)  # supervised from the first generated token on


def test_real_smollm2_alpaca(smollm2: Any) -> None:
    text, learned = encode(smollm2, AlpacaPrompt(smollm2.eos_token), WITH_INPUT)
    assert text.startswith("Below is an instruction")  # its BOS is not added by the tokenizer
    assert learned == ["Three.<|im_end|>"]


def test_a_response_that_starts_with_white_space_leaves_the_prompt_tokens_alone(
    smollm2: Any,
) -> None:
    """One token holds a line break and blanks; it must not join the prompt to the response."""
    style = ChatPrompt(smollm2)
    encoder = Encoder(smollm2, style, 512)
    for response in ("\n\n  Five.", "   x"):
        example = Example(("a", response, "b", response))
        tokens, mask = encoder.encode([example]).rows[0]
        prompt = encoder.encode_prompts([style.render(example)])[0]
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert supervised_texts(smollm2, tokens, mask) == [response + "<|im_end|>"] * 2


# --- BOS and tokens ---------------------------------------------------------------------------


def test_bos_is_added_once_if_the_tokenizer_adds_one(make_tokenizer: Callable[..., Any]) -> None:
    adding = make_tokenizer(adds_bos=True)
    text, _ = encode(adding, AlpacaPrompt("</s>"), ONE)
    assert text.startswith("<s>Below") and text.count("<s>") == 1
    adding.chat_template = "<s>" + adding.chat_template
    text, _ = encode(adding, ChatPrompt(adding), ONE)
    assert text.startswith("<s><|im_start|>") and text.count("<s>") == 1
    assert encode(make_tokenizer(), AlpacaPrompt("</s>"), ONE)[0].startswith("Below")


def test_the_first_token_is_never_supervised(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template=LOOP + "{{ m['content'] }}</s>{% endfor %}")
    _, mask = Encoder(tokenizer, ChatPrompt(tokenizer), 64).encode([ONE]).rows[0]
    assert mask.any() and not mask[0]


def test_a_slow_tokenizer_is_refused(tokenizer: Any) -> None:
    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(InputError, match="'slow' gives no character offsets"):
        Encoder(Slow(), AlpacaPrompt("</s>"), 64)


# --- truncation -------------------------------------------------------------------------------


def cut(prompt: int, response: int, room: int, head: int = 0, bos: int = 0) -> tuple[Any, Any]:
    """Truncates tokens 0, 1, 2, ... of which the last `response` are supervised."""
    tokens = np.arange(prompt + response, dtype=np.int32)
    return truncate(tokens, tokens >= prompt, room, head, bos)


def test_what_fits_stays() -> None:
    tokens, mask = cut(10, 6, 16)
    assert tokens.tolist() == list(range(16)) and mask.sum() == 6


def test_a_long_prompt_gives_way_to_the_response() -> None:
    tokens, mask = cut(100, 8, 16)
    assert tokens.tolist() == list(range(92, 108)) and mask.sum() == 8


def test_the_head_of_a_long_prompt_stays() -> None:
    tokens, _ = cut(100, 6, 16, head=4, bos=1)
    assert tokens.tolist() == [0, 1, 2, 3, *range(94, 106)]
    tokens, _ = cut(100, 6, 16, head=30, bos=1)  # too long a head: the BOS only
    assert tokens.tolist() == [0, *range(91, 106)]


def test_a_long_response_is_cut_at_its_end() -> None:
    tokens, mask = cut(3, 50, 16)
    assert tokens.tolist() == list(range(16)) and mask.sum() == 13


def test_prompt_and_response_both_too_long_share_the_room() -> None:
    tokens, mask = cut(50, 50, 16)
    assert tokens.tolist() == [*range(46, 50), *range(50, 62)] and mask.sum() == 12


def test_several_turns_are_cut_after_the_last_supervised_token_that_fits() -> None:
    supervised = np.zeros(40, dtype=np.bool_)
    supervised[5:10] = True
    supervised[30:] = True
    tokens, mask = truncate(np.arange(40, dtype=np.int32), supervised, 16, 2, 0)
    assert tokens.tolist() == list(range(10)) and mask.sum() == 5


def test_no_end_of_turn_is_faked_on_a_cut_response(tokenizer: Any) -> None:
    example = Example(("Say it.", "word " * 100))
    encoded = Encoder(tokenizer, AlpacaPrompt("</s>"), 64).encode([example])
    tokens, _ = encoded.rows[0]
    assert len(tokens) == 64 and encoded.counts.truncated == 1
    assert tokenizer.eos_token_id not in tokens


def test_a_long_question_keeps_template_opening_ending_and_response(tokenizer: Any) -> None:
    example = Example(("start " + "middle " * 100 + "finish", "Yes."))
    text, learned = encode(tokenizer, ChatPrompt(tokenizer), example, max_length=128)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "start" not in text.removeprefix("<|im_start|>system").split("user\n")[1][:5]
    assert "finish<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>" in text
    assert learned == ["Yes.<|im_end|>"]
    encoder = Encoder(tokenizer, ChatPrompt(tokenizer), 128)
    prompt = encoder.encode_prompts([encoder.style.render(example)])[0]
    assert len(prompt) == 128
    assert tokenizer.decode(prompt.tolist()).endswith("finish<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("max_length", [8, 9, 15, 16, 33, 64])
def test_every_length_keeps_something_to_learn(tokenizer: Any, max_length: int) -> None:
    examples = [Example(("q" * n, "a" * m)) for n in (1, 30, 200) for m in (1, 30, 200)]
    for style in (AlpacaPrompt("</s>"), ChatPrompt(tokenizer), GuanacoPrompt("</s>")):
        encoded = Encoder(tokenizer, style, max_length).encode(examples)
        assert len(encoded.rows) == len(examples)
        assert encoded.rows.lengths.max() <= max_length
        assert all(mask.any() and not mask[0] for _, mask in (encoded.rows[i] for i in range(9)))


def test_blank_responses_are_skipped_and_counted(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, AlpacaPrompt("</s>"), 64)
    encoded = encoder.encode([Example(("a", " \n")), ONE, Example(("b", ""))])
    assert encoded.kept == [1] and encoded.counts.skipped_blank == 2 and encoded.counts.skipped == 2


def test_nothing_supervised_is_skipped_and_counted(tokenizer: Any) -> None:
    class Mute(AlpacaPrompt):
        def render(self, example: Example) -> Any:
            rendered = super().render(example)
            return type(rendered)(rendered.text, (), 0, "", "", "")

    encoded = Encoder(tokenizer, Mute("</s>"), 64).encode([ONE])
    assert len(encoded.rows) == 0 and encoded.counts.skipped_unsupervised == 1
