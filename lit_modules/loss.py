"""Cross entropy over supervised tokens only, without logits for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Positions whose logits are in float32 at a time; in the backward pass they are computed again, so
# that of all positions only the model's own 16-bit logits stay.
_CHUNK = 512
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def supervised_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed next-token loss of the supervised tokens, in float32.

    The output embedding is applied to the supervised positions alone: with a vocabulary of tens of
    thousands, logits of prompts and pads would cost more memory than anything else in the step.

    Args:
        model: a Hugging Face causal LM (any module with `get_output_embeddings`).
        batch: `input_ids` and `labels` int64 [b, s] (-100: not supervised, not shifted), and
            `attention_mask` and `position_ids` [b, s] where there are any.

    Returns:
        Sum of the losses, a float32 scalar with a graph even if nothing is supervised, and the
        number of supervised tokens, an int64 scalar.
    """
    labels = batch["labels"]
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
    mask = targets != -100
    count = mask.sum()
    if not mask.any():
        mask = torch.zeros_like(mask)
        mask[0, 0] = True

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][mask].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    parts = zip(logits[0].split(_CHUNK), targets[mask].split(_CHUNK), strict=True)
    losses = [
        checkpoint(_summed_cross_entropy, part, target, use_reentrant=False)
        for part, target in parts
    ]
    return torch.stack(losses).sum(), count


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
