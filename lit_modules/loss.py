"""Cross entropy over supervised tokens only, without logits for the others."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from falqon.groups import has_hooks
from falqon.kernels.native import ops, products
from falqon.kernels.wide import product

# Positions whose logits are in float32 at a time; in the backward pass they are computed again, so
# that of all positions only the model's own 16-bit logits stay.
_CHUNK = 512
# Bytes of logits that there are at a time on the fused path. A matmul with the output embedding has
# to read it all, so the fewer the better.
_LOGIT_BYTES = 2**27
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CHANGES_LOGITS: WeakSet[nn.Module] = WeakSet()


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `h W^T`, with the gradient of h made in the forward pass.

    Of the logits there are only those of one chunk at a time, in 16 bits. What is saved is what
    dL/dh is put together of, in float32: the targets' rows of W, and the sum of all others times
    the exponentials of their logits, [T, h] each in 16 bits; and a factor of both for each row.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        want = hidden.requires_grad
        total = torch.zeros((), dtype=torch.float32)
        others, sums, at_targets = [], [], []
        natively = products.takes_dense(weight)
        through = products.dense_grad if natively else product
        rows = max(1, _LOGIT_BYTES // (weight.shape[0] * weight.element_size()))
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _room(len(part), len(weight), part)
            if natively and products.fits(len(part), weight.shape):
                products.dense(part, weight, logits)
            else:
                product(part, weight.t(), out=logits)
            losses, parts = ops.cross_entropy(logits, target, want)
            total += losses.sum()
            if parts is not None:
                others.append(through(logits, weight))
                sums.append(parts[0])
                at_targets.append(parts[1])
        if want:
            parts_of_rows = (torch.cat(others), torch.cat(sums), torch.cat(at_targets))
            ctx.save_for_backward(*parts_of_rows, weight[targets])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others, sums, at_targets, of_targets = ctx.saved_tensors
        out = others.to(torch.float32, copy=True).mul_((grad / sums).unsqueeze(1))
        out.addcmul_(of_targets.float(), (grad * at_targets).unsqueeze(1))
        return out.to(others.dtype), None, None


_KEPT = threading.local()


def _room(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for logits [rows, columns], the same for all calls of a thread.

    Every step has another number of supervised tokens, so that an allocator gives back what was
    freed and asks the system for new memory, which costs a fault a page.
    """
    size, kept = rows * columns, getattr(_KEPT, "logits", None)
    if kept is None or len(kept) < size or kept.dtype != like.dtype:
        kept = _KEPT.logits = None  # not both at a time
        with torch.inference_mode(False):  # others may write to it, too
            kept = _KEPT.logits = torch.empty(size, dtype=like.dtype, device=like.device)
    return kept[:size].view(rows, columns)


def supervised_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed next-token loss of the supervised tokens, in float32.

    The output embedding is applied to the supervised positions alone: with a vocabulary of tens of
    thousands, logits of prompts and pads would cost more memory than anything else in the step. On
    a CPU, with a frozen output embedding, they exist for a chunk of positions at a time.

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
    # Waits for the device, once and at the start; what follows does not.
    positions = (targets != -100).flatten().nonzero()[:, 0]
    count = torch.full((), len(positions), device=labels.device)
    nothing = not len(positions)
    if nothing:
        positions = torch.zeros(1, dtype=torch.int64, device=labels.device)
    selected_targets = targets.flatten()[positions]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if not nothing and model not in _CHANGES_LOGITS and _is_fusible(head):
        found = _hidden(model, head, batch, positions)
        if found is not None:
            selected, logits = found
            loss = _LinearCrossEntropy.apply(selected, _whole(head), selected_targets)
            # Adds nothing. FSDP2 gathers weights for the backward pass when it comes to the output.
            return loss + logits.sum(), count
        _CHANGES_LOGITS.add(model)

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[positions].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(**_inputs(batch), use_cache=False).logits
    finally:
        hook.remove()
    parts = zip(logits[0].split(_CHUNK), selected_targets.split(_CHUNK), strict=True)
    losses = [
        checkpoint(_summed_cross_entropy, part, target, use_reentrant=False)
        for part, target in parts
    ]
    return torch.stack(losses).sum(), count


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def _is_fusible(head: nn.Module) -> bool:
    """Whether the output embedding is a frozen, plain, unwatched matrix that the CPU path takes."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not has_hooks(head)
        and ops.usable(_local(head.weight))
    )


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _whole(head: nn.Module) -> Tensor:
    """The weight of the output embedding, gathered if it is cut up."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _hidden(
    model: nn.Module, head: nn.Module, batch: dict[str, Any], positions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Inputs of the output embedding at the supervised positions, [n, h]; logits of no position.

    None for a model that changes what the output embedding gives, as some cap their logits.
    """
    seen: list[Tensor] = []

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0].flatten(0, 1)[positions])
        return (args[0][:, :0], *args[1:])  # no position, but a result that can be told apart

    def note(head: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        seen.append(out)

    hooks = (head.register_forward_pre_hook(select), head.register_forward_hook(note))
    try:
        logits = model(**_inputs(batch), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    is_plain = len(seen) == 2 and logits is seen[1] and ops.usable(seen[0])
    return (seen[0], seen[1]) if is_plain else None


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
