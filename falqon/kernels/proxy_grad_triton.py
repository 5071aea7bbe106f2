"""Triton kernel of `proxy_grad`: `(dL/dO)^T O_A`, straight from the 16-bit gradient.

The sum runs over tokens, of which there are far more than results, so it is cut into parts that run
at the same time. How many depends on the shape alone, each part is summed from its first token to
its last, and torch adds the parts: no atomics, the same bits every time on one kind of device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.kernels.devices import on_device
from falqon.kernels.triton_fp8 import widen

TOKENS_A_PART = 1024
WARPS = 4
STAGES = 3


@triton.jit  # type: ignore[untyped-decorator]
def proxy_grad_kernel(  # type: ignore[no-untyped-def]
    grad,  # [count, features], row stride given
    adapter,  # [count, rank], row stride given
    parts,  # float32 [parts, features, rank]
    count,
    features,
    rank,
    grad_stride,
    adapter_stride,
    EXACT: tl.constexpr,  # multiply in float32
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,  # columns of O_A at a time
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One part of the tokens by a block of output features by a block of the rank."""
    part = tl.program_id(1)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    j = tl.program_id(2) * RANK + tl.arange(0, RANK)
    t = tl.arange(0, BLOCK_TOKENS)
    sums = tl.zeros((BLOCK_OUT, RANK), tl.float32)
    for at in tl.range(part * TOKENS, min(count, (part + 1) * TOKENS), BLOCK_TOKENS):
        token = (at + t).to(tl.int64)
        known = token < count
        at_grad = token[:, None] * grad_stride + o[None, :]
        g = tl.load(grad + at_grad, mask=known[:, None] & (o < features)[None, :], other=0.0)
        at_adapter = token[:, None] * adapter_stride + j[None, :]
        a = tl.load(adapter + at_adapter, mask=known[:, None] & (j < rank)[None, :], other=0.0)
        if EXACT:
            sums = tl.dot(tl.trans(widen(g)), widen(a), sums, input_precision="ieee")
        else:
            sums = tl.dot(tl.trans(g), a, sums)
    inside = (o < features)[:, None] & (j < rank)[None, :]
    line = part.to(tl.int64) * features + o
    tl.store(parts + line[:, None] * rank + j[None, :], sums, mask=inside)


def tile(exact: bool) -> dict[str, int]:
    """Output features and tokens of a tile; float32 operands take twice the registers."""
    return (
        {"BLOCK_OUT": 32, "BLOCK_TOKENS": 32} if exact else {"BLOCK_OUT": 128, "BLOCK_TOKENS": 64}
    )


def proxy_grad_triton(grad: Tensor, adapter: Tensor) -> Tensor:
    """`proxy_grad` by the kernel.

    Args:
        grad: dL/dO [T, out], floating; rows may be apart, values of a row may not.
        adapter: O_A [T, r], same dtype; rows may be apart as well.

    Returns:
        float32 [out, r].
    """
    (count, features), rank = grad.shape, adapter.shape[1]
    grad, adapter = (x if x.stride(1) == 1 else x.contiguous() for x in (grad, adapter))
    number = max(1, triton.cdiv(count, TOKENS_A_PART))
    parts = torch.empty(number, features, rank, dtype=torch.float32, device=grad.device)
    exact = grad.dtype == torch.float32
    blocks: dict[str, Any] = {
        "TOKENS": TOKENS_A_PART,
        "RANK": min(64, max(16, triton.next_power_of_2(rank))),
        **tile(exact),
    }
    if parts.numel():
        with on_device(grad.device):
            proxy_grad_kernel[
                (
                    triton.cdiv(features, blocks["BLOCK_OUT"]),
                    number,
                    triton.cdiv(rank, blocks["RANK"]),
                )
            ](
                grad,
                adapter,
                parts,
                count,
                features,
                rank,
                grad.stride(0),
                adapter.stride(0),
                EXACT=exact,
                **blocks,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return parts[0] if number == 1 else parts.sum(dim=0)
