"""Answers to a batch of prompts: what `train.py predict` and `falqon generate` share.

Shapes: b prompts, s tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from falqon.errors import InputError

# End-of-turn tokens of common chat templates, where the tokenizer has them as special tokens.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the most likely token.
        top_p: Sample from the most likely tokens that together have this probability.

    Raises:
        InputError: For a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must not be negative.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")

    def arguments(self) -> dict[str, Any]:
        """Of transformers' `generate`; nothing but what is set here shapes the distribution."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's own, and the tokenizer's end and end-of-turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = set(own if isinstance(own, list) else [own])
    for token in (tokenizer.eos_token, *_END_OF_TURN):
        known = tokenizer.get_vocab().get(token)
        if known in tokenizer.all_special_ids:
            ends.add(known)
    return sorted(end for end in ends if end is not None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()  # not inference_mode: what is gathered of sharded weights lives on
def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    together: bool = False,
) -> list[str]:
    """Answer a batch of prompts. Sampling draws from torch's global generator.

    Args:
        model: On the device where it is to run.
        tokenizer: The model's.
        input_ids: int64 [b, s], padded on the left.
        attention_mask: int64 [b, s].
        sampling: How.
        streamer: Gets the tokens as they come; for one prompt.
        together: Take as many steps as every other rank, as those that share weights have to.

    Returns:
        b answers, without prompt, special tokens, and white space around them.
    """
    pad = tokenizer.pad_token_id
    with evaluating(model):
        tokens = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            streamer=streamer,
            synced_gpus=together,
            **sampling.arguments(),
        )
    answers: list[str] = tokenizer.batch_decode(
        tokens[:, input_ids.shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in answers]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """A batch of prompts, padded on the left so that all of them end in the last column.

    Args:
        prompts: Token ids of b prompts.
        pad_id: Id to pad with.

    Returns:
        Token ids and attention mask, each int64 [b, s].
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, width - len(tokens) :] = 1
    return ids, mask
