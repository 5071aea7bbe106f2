"""Triton kernels in Triton's interpreter, bit for bit against their references.

Run by test_triton.py in a process of its own: the interpreter is chosen when kernels are defined.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.fp8 import E4M3, decode, encode, encode_stochastic
from falqon.kernels import devices
from falqon.kernels import row_update_triton as triton_module
from falqon.kernels.row_update import LARGEST, Origin, RowWrite, row_update, row_updates
from falqon.kernels.row_update_triton import launch_row_updates
from falqon.kernels.triton_fp8 import decode_e4m3, encode_e4m3, encode_e4m3_stochastic
from tests.policies import random


@triton.jit
def decode_kernel(codes, values, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(values + at, decode_e4m3(tl.load(codes + at).to(tl.int32)))


@triton.jit
def encode_kernel(x, bits, codes, number, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < number, other=0.0)
    if STOCHASTIC:
        noise = tl.load(bits + at, mask=at < number, other=0).to(tl.uint32)
        code = encode_e4m3_stochastic(value, noise)
    else:
        code = encode_e4m3(value)
    tl.store(codes + at, code.to(tl.uint8), mask=at < number)


def encoded(x: Tensor, bits: Tensor | None = None) -> Tensor:
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    grid = (triton.cdiv(x.numel(), 1024),)
    given = x if bits is None else bits
    encode_kernel[grid](x, given, codes, x.numel(), STOCHASTIC=bits is not None, BLOCK=1024)
    return codes


def inputs() -> Tensor:
    """All bfloat16 values, ties of neighbouring codes and what lies next to them, random ones."""
    bfloat = torch.arange(1 << 16).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    points = decode(torch.arange(0x7F, dtype=torch.uint8), E4M3)
    middles = (points[1:] + points[:-1]) / 2
    around = [middles, *(middles.nextafter(torch.tensor(x)) for x in (torch.inf, -torch.inf))]
    ties = torch.cat([*around, *(-x for x in around)])
    return torch.cat([bfloat, ties, random(5000), random(5000) * 2.0**-8, 1e3 * random(5000)])


def test_every_code_is_decoded() -> None:
    codes, values = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    decode_kernel[(1,)](codes, values, BLOCK=256)
    assert torch.equal(values.view(torch.int32)[:127], decode(codes, E4M3).view(torch.int32)[:127])
    torch.testing.assert_close(values, decode(codes, E4M3), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(values[128])


def test_rounding_to_nearest() -> None:
    x = inputs()
    ours, expected = encoded(x), encode(x, E4M3)
    finite = ~torch.isnan(x)
    assert torch.equal(ours[finite], expected[finite])
    assert ((ours[~finite] & 0x7F) == 0x7F).all()


def test_stochastic_rounding() -> None:
    x = inputs()
    bits = torch.randint(0, 1 << 32, x.shape, generator=torch.Generator().manual_seed(1))
    ours, expected = encoded(x, bits), encode_stochastic(x, E4M3, bits)
    finite = ~torch.isnan(x)
    assert torch.equal(ours[finite], expected[finite])


SHAPES = [(1, 1, 1, 1), (15, 16, 1, 3), (17, 129, 5, 17), (40, 64, 16, 40), (37, 150, 129, 20)]
ORIGINS = ["none", "codes", "bfloat16", "float32"]


def case(out: int, features: int, rank: int, count: int, kind: str) -> dict[str, Any]:
    """Operands whose products and sums are exact in float32, so that any order gives the same.

    B are multiples of 1/64 up to 1, A has values of at most 5 bits in a range of 2^6.
    """
    generator = torch.Generator().manual_seed(out + features)
    codes = torch.randint(0, 256, (out + rank, features), generator=generator).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    codes[out:] = encode((6 * random(rank, features, seed=2)).round().clamp(-15, 15), E4M3)
    change = (20 * random(count, rank, seed=3)).round().clamp(-64, 64) / 64
    origin = None
    if kind != "none":
        values = codes[torch.randperm(out, generator=generator)[:count]].clone()
        total = change + (9 * random(count, rank, seed=4)).round() / 64
        if kind != "codes":
            values = decode(values, E4M3).to(getattr(torch, kind)) * 0.3125
        origin = Origin(values, total)
    return {
        "codes": codes,
        "scale": torch.tensor([4.0]),
        "rows": torch.randperm(out, generator=generator)[:count],
        "proxy": change,
        "origin": origin,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ORIGINS)
@pytest.mark.parametrize("counter", [None, (2**40 + 11, 5, 2), (3, 2**31 - 1, 70000)])
def test_row_update(
    shape: tuple[int, int, int, int], kind: str, counter: tuple[int, int, int] | None
) -> None:
    given = case(*shape, kind)
    codes, change, origin = given["codes"], given["proxy"], given["origin"]
    if len(change) > 6:
        change[1] = 0.0
        change[3, 0], change[4, -1], change[6, 0] = torch.nan, torch.inf, 2 * LARGEST
    rows = given["rows"] if len(given["rows"]) < len(codes) - change.shape[1] else None
    expected = codes.clone()
    gram_inverse = torch.eye(change.shape[1])
    counts, kept = row_update(
        expected,
        given["scale"],
        rows,
        change,
        "nearest" if counter is None else "stochastic",
        counter or (0, 0, 0),
        origin,
        gram_inverse,
    )
    before = codes.clone()
    out = len(codes) - change.shape[1]
    wide = torch.zeros(codes.shape[1], out + 3, dtype=torch.uint8)  # as of a group
    transposed = wide[:, 2 : out + 2]
    transposed.copy_(codes[:out].t())
    seed, step, layer = counter or (0, 0, 0)
    write = RowWrite(codes, given["scale"], rows, change, layer, origin, gram_inverse)
    counted, summed, rest = launch_row_updates(
        [write], LARGEST, None if counter is None else (seed, step), [transposed]
    )[0]
    assert torch.equal(codes, expected)
    assert torch.equal(transposed, codes[:out].t())
    assert not wide[:, :2].any() and not wide[:, -1].any()
    assert counted.tolist() == [int(c) for c in counts[:4]]
    assert len(change) < 7 or not torch.equal(codes, before)
    sums = torch.stack([counts.projection, counts.wanted]) * 16
    torch.testing.assert_close(summed, sums, rtol=1e-5, atol=1e-3)
    assert rest is not None and kept is not None
    adapter = decode(codes[len(codes) - change.shape[1] :].contiguous(), E4M3)
    torch.testing.assert_close(rest @ adapter.t(), kept, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", ORIGINS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_a_group_is_written_in_one_launch(
    kind: str, stochastic: bool, some: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs, features, rank = (40, 16, 21), 70, 5
    cases = [case(out, features, rank, out, kind) for out in outs]
    parts = [len(each["codes"]) for each in cases]
    launches: list[Any] = []

    def launch(*arguments: Any) -> Any:
        launches.append(arguments)
        return launch_row_updates(*arguments)

    monkeypatch.setattr(triton_module, "launch_row_updates", launch)
    both = []
    for together in (False, True):
        stack = torch.cat([each["codes"] for each in cases])
        writes = []
        for number, (each, codes) in enumerate(zip(cases, stack.split(parts), strict=True)):
            rows, change, origin = each["rows"], each["proxy"], each["origin"]
            if not some:
                rows = None
            elif number != 1:  # numbers of rows that blocks do not divide, and none at all
                keep = 19 if number == 0 else 0
                rows, change = rows[:keep], change[:keep]
                if origin is not None:
                    origin = Origin(origin.values[:keep], origin.total[:keep])
            scale = each["scale"] * 2.0**number
            inverse = torch.eye(rank)
            writes.append(RowWrite(codes, scale, rows, change, 7 + number, origin, inverse))
        monkeypatch.setattr(devices, "uses_kernels", lambda _, together=together: together)
        launches.clear()
        rounding: Any = "stochastic" if stochastic else "nearest"
        results = row_updates(writes, rounding, seed=3, step=2)
        assert len(launches) == together
        both.append((stack, results))
    (expected, reference), (ours, results) = both
    assert torch.equal(ours, expected)
    for (counts, kept), (mine, rest) in zip(reference, results, strict=True):
        assert [int(x) for x in mine[:4]] == [int(x) for x in counts[:4]]
        for a, b in zip(mine[4:], counts[4:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
        assert kept is not None and rest is not None
        torch.testing.assert_close(rest, kept, rtol=1e-5, atol=1e-2)


def test_row_update_of_no_rows() -> None:
    given = case(8, 20, 4, 8, "none")
    before = given["codes"].clone()
    none = torch.zeros(0, dtype=torch.int64)
    write = RowWrite(given["codes"], given["scale"], none, torch.zeros(0, 4))
    counted, summed, rest = launch_row_updates([write], LARGEST, None, [None])[0]
    assert not counted.any() and not summed.any() and rest is None
    assert torch.equal(given["codes"], before)
