"""Whether implementations of an operation agree, which is asked before any of them is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Run = Callable[[], Any]
Rule = Literal["same codes", "near codes", "product"]
PRODUCT_DB = 50.0
"""A result of our matmuls must be this near. One rounding to bfloat16 leaves about 57 dB."""
SAME_QUANTITY_DB = 25.0
"""What an alternative must reach to be timed. It may round at other places than we do, which turns
some codes into their neighbours; FP8's own rounding leaves about 31 dB."""


class WrongResultError(Exception):
    """An operation does not compute what its reference does, so its time means nothing."""


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@dataclass
class Setup:
    """One operation with inputs, ready to run.

    Attributes:
        ours: runs our implementation.
        reference: plain torch in float32; says what is right.
        rule: how near ours must be: `same codes`, `near codes` (where sums may run in another
            order: at most one code in a thousand is the neighbour of the right one) or `product`
            (`PRODUCT_DB`).
        values: float32 tensor of what any of them returned.
        others: alternatives by name.
        codes: uint8 tensor of what ours or the reference returned.
    """

    ours: Run
    reference: Run
    rule: Rule
    values: Callable[[Any], Tensor]
    others: dict[str, Run] = field(default_factory=dict)
    codes: Callable[[Any], Tensor] = _first


def decibels(ours: Tensor, exact: Tensor) -> float:
    """Signal to noise of a result, dB; -inf if it is not finite or of another shape."""
    if ours.shape != exact.shape or not bool(ours.isfinite().all()):
        return float("-inf")
    noise = (ours.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def check(what: str, setup: Setup) -> dict[str, str]:
    """Run everything once and compare it with the reference.

    Args:
        what: names the operation in an error.
        setup: what to run.

    Returns:
        Reasons not to time alternatives, by their name.

    Raises:
        WrongResultError: if ours is not what the reference is.
    """
    right = setup.reference()
    result = setup.ours()
    problem = (_product if setup.rule == "product" else _codes)(setup, result, right)
    if problem:
        raise WrongResultError(f"{what} does not compute what its reference does: {problem}.")
    refused = {}
    for name, run in setup.others.items():
        try:
            near = decibels(setup.values(run()), setup.values(right))
        except Exception as error:  # a library that cannot do it here is a finding, not our failure
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            refused[name] = f"failed: {first}"
            continue
        if near < SAME_QUANTITY_DB:
            refused[name] = f"other result: {near:.0f} dB"
    return refused


def _in_order(codes: Tensor) -> Tensor:
    """Numbers in the order of the values, one apart for neighbours; 0 for both zeros.

    Sums in another order may come out on the other side of zero.
    """
    magnitude = (codes & 0x7F).to(torch.int16)
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def _product(setup: Setup, result: Any, right: Any) -> str:
    near = decibels(setup.values(result), setup.values(right))
    return "" if near >= PRODUCT_DB else f"{near:.1f} dB, needed are {PRODUCT_DB:.0f}"


def _codes(setup: Setup, result: Any, right: Any) -> str:
    """What is wrong with codes and scales; empty if nothing is."""
    exact = setup.rule == "same codes"
    ours, codes = setup.codes(result), setup.codes(right)
    if ours.shape != codes.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(codes.shape)}"
    if not isinstance(result, Tensor):
        off = (result[1] != right[1]).flatten()
        number = int(off.sum())
        if number > (0 if exact else len(off) // 1000):
            return f"{number} of {len(off)} scales differ"
        if number:  # with another scale all codes of a row are others
            ours, codes = ours[~off], codes[~off]
    order = (lambda x: x.to(torch.int16)) if exact else _in_order
    apart = (order(ours) - order(codes)).abs()
    number, most = int(apart.count_nonzero()), int(apart.max())
    if number and (exact or most > 1 or number > 1 + codes.numel() // 1000):
        return f"{number} of {codes.numel()} codes differ, by up to {most}"
    return ""
