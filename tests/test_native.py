"""The CPU path's compiled operations against plain torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from falqon.errors import InputError
from falqon.fp8 import E4M3, E5M2, Format, decode, encode, quantize
from falqon.kernels.native import build, ops, products, proxy
from falqon.kernels.rms_norm_quantize import rms_norm_grad, rms_norm_quantize
from falqon.kernels.row_update import Origin, row_update
from tests.threads import threads

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
BF16 = torch.bfloat16


def all_values() -> Tensor:
    """Every bfloat16, [65536]: infinities and NaN included."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for which NaN it is."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        a[~nan].view(torch.int16), b[~nan].view(torch.int16)
    )


def reference(x: Tensor, fmt: Format) -> Tensor:
    codes, scale = quantize(x, fmt, "per_token")
    return decode(codes, fmt, BF16) * (1.0 / scale).to(BF16)


@needs_compiler
def test_is_compiled_and_rounds_as_torch() -> None:
    assert ops.usable(torch.zeros(1, 1, dtype=BF16))
    assert not ops.usable(torch.zeros(1, 1))


@needs_compiler
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_quantized_is_that_of_plain_torch(fmt: Format) -> None:
    values = all_values()
    for rows in (values[:, None], values.view(256, 256), values[values.isfinite()].view(-1, 255)):
        assert same(ops.quantized([rows], [1.0], fmt is E5M2), reference(rows, fmt))
    x = torch.randn(7, 77, dtype=BF16) * 1e-3
    x[2] = 0
    x[3, 5], x[4, 0], x[5, 1] = torch.nan, torch.inf, -torch.inf
    assert same(ops.quantized([x], [1.0], fmt is E5M2), reference(x, fmt))
    assert ops.quantized([x[:0]], [1.0]).shape == (0, 77)


@needs_compiler
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_quantized_rows_of_every_size(fmt: Format) -> None:
    torch.manual_seed(0)
    sizes = torch.arange(-126, 127)[:, None]
    # Values over 24 powers of two: normal, subnormal and vanishing in FP8 within one row.
    spread = torch.ldexp(torch.randn(len(sizes), 130), torch.randint(-24, 1, (len(sizes), 130)))
    rows = torch.ldexp(spread, sizes).to(BF16)
    rows = torch.where(rows.isfinite(), rows, 1.0)
    assert same(ops.quantized([rows], [1.0], fmt is E5M2), reference(rows, fmt))
    assert same(ops.quantized([rows[:, 1:34]], [1.0], fmt is E5M2), reference(rows[:, 1:34], fmt))


@needs_compiler
def test_values_of_every_code() -> None:
    codes = torch.arange(256).to(torch.uint8)
    for given in (codes, codes[3:], codes.view(16, 16).t(), codes[:0]):
        assert same_floats(ops.values(given), given.view(torch.float8_e4m3fn).float())


def same_floats(a: Tensor, b: Tensor) -> bool:
    """Signs of zeros included; but for which NaN it is."""
    a, b = (torch.where(x.isnan(), 1e30, x).contiguous().view(torch.int32) for x in (a, b))
    return torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("chosen", [True, False])
def test_rows_are_rounded_written_and_counted(chosen: bool) -> None:
    torch.manual_seed(0)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(middles, middles.new_tensor(x)) for x in (0.0, torch.inf)]
    hard = torch.cat([values, middles, *around, torch.tensor([464.0, 1e9, 1e-45, torch.inf])])
    hard = torch.cat([hard, -hard, torch.tensor([torch.nan])])
    spread = torch.ldexp(torch.randn(3 * len(hard)), torch.randint(-14, 10, (3 * len(hard),)))
    target = torch.stack([hard, *spread.view(3, -1)]) + 0.0  # -0 and a change of 0 is 0
    rows = torch.tensor([5, 0, 3, 4]) if chosen else None
    codes = torch.randint(0, 256, (6, len(hard)), dtype=torch.uint8)
    codes = torch.where(codes % 128 == 127, codes - 1, codes)
    codes[0, ::2] = encode(target, E4M3)[1, ::2]
    adapter = encode(torch.randn(2, len(hard)) * 3, E4M3)
    untouched, change = torch.cat([codes, adapter]), torch.randn(4, 2)
    wanted = change @ decode(adapter, E4M3)
    where = rows if chosen else slice(4)
    expected, old = untouched.clone(), untouched[where]
    new = encode(target, E4M3)
    expected[where] = new
    merged, one = untouched.clone(), torch.tensor([1.0])
    done = proxy.write_rows(merged, one, rows, change, (target, torch.zeros(4, 2)))
    assert torch.equal(merged, expected)
    counts = [4, new.numel(), int((new != old).sum()), int((new & 127 == 126).sum())]
    assert done[:4].tolist() == counts and done[4].isnan()
    finite = [1, 2, 3]
    some = torch.arange(3) if chosen else None
    again = untouched.clone()
    origin = (target[finite], torch.zeros(3, 2))
    done = proxy.write_rows(again, one, some, change[finite], origin)
    landed = (decode(new[finite], E4M3) - decode(untouched[:3], E4M3)).double()
    torch.testing.assert_close(done[4], (landed * wanted[finite]).sum(), rtol=1e-5, atol=0.1)
    torch.testing.assert_close(done[5], wanted[finite].double().square().sum(), rtol=1e-6, atol=0)
    assert proxy.write_rows(again, one, None, change[:0]).tolist() == [0] * 6
    for outside in (6, -1):
        with pytest.raises(AssertionError):
            proxy.write_rows(merged, one, torch.tensor([outside]), change[:1])


@needs_compiler
@pytest.mark.parametrize("kind", ["codes at hand", "codes", "weights"])
@pytest.mark.parametrize("every_row", [True, False])
def test_a_row_update_is_that_of_plain_torch(
    kind: str, every_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    out, n, rank, scale = 37, 170, 8, torch.tensor([16.0])
    codes = encode(torch.randn(out + rank, n) * 16, E4M3)
    rows = None if every_row else torch.tensor([30, 2, 17, 4])
    change = torch.randn(out if rows is None else 4, rank) * 0.05
    change[1], change[2, 3] = 0, torch.nan
    values = encode(torch.randn(len(change), n) * 16, E4M3)
    if kind == "weights":
        values = torch.randn(len(change), n, dtype=BF16)  # type: ignore[assignment]
    origin = None if kind == "codes at hand" else Origin(values, torch.randn_like(change) * 0.1)
    results = []
    for switch in ("on", "off"):
        monkeypatch.setenv("FALQON_NATIVE", "auto" if switch == "on" else "off")
        own = codes.clone()
        counts, rest = row_update(own, scale, rows, change, origin=origin)
        assert rest is None
        results.append((own, counts))
    (ours, counted), (plain, expected) = results
    assert torch.equal(ours, plain) and not torch.equal(ours, codes)
    for a, b in zip(counted, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(expected.wanted))


@needs_compiler
def test_square_sums() -> None:
    tensors = [torch.randn(n) * 10.0**e for n, e in ((1, 0), (1000, -20), (7, 15), (0, 0))]
    sums = ops.square_sums(tensors)
    assert sums is not None
    torch.testing.assert_close(sums, torch.stack([t.double().square().sum() for t in tensors]))
    assert ops.square_sums([torch.zeros(3, dtype=BF16)]) is None
    assert ops.square_sums([torch.zeros(4, 4).t()[1:]]) is None
    assert ops.square_sums([torch.full((3,), torch.nan)]).isnan().all()  # type: ignore[union-attr]


@needs_compiler
def test_quantized_parts_share_a_scale() -> None:
    a, b = torch.randn(9, 33, dtype=BF16), torch.randn(9, 80, dtype=BF16)[:, 7:40]
    ours = ops.quantized([a, b], [1.0, 0.25], e5m2=True)
    joined = reference(torch.cat([a, b * 0.25], dim=1), E5M2)
    joined[:, 33:] *= 4
    assert torch.equal(ours, joined)


@needs_compiler
@pytest.mark.parametrize("scale", [1.0, 2.0**9, 2.0**-20])
def test_decode(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).view(24, 32)
    out = ops.decoded([codes], [torch.tensor([scale])], rank=8)
    assert same(out, decode(codes, E4M3, BF16) / scale)


@needs_compiler
def test_decode_of_a_group_puts_adapters_behind_all_backbones() -> None:
    codes = [torch.randint(256, (out + 3, 17), dtype=torch.uint8) for out in (5, 1, 40)]
    scales = [torch.tensor([s]) for s in (1.0, 4.0, 2.0**-7)]
    values = [decode(c, E4M3, BF16) / s.bfloat16() for c, s in zip(codes, scales, strict=True)]
    out = ops.decoded(codes, scales, rank=3)
    assert same(out, torch.cat([v[:-3] for v in values] + [v[-3:] for v in values]))


@needs_compiler
@pytest.mark.parametrize("width", [31, 255, 256])
def test_swiglu_for_every_gate(width: int) -> None:
    gate = all_values()
    gate = gate[gate.isfinite()]
    gate = gate[: len(gate) // width * width].view(-1, width)
    up = torch.randn(gate.shape).to(BF16)
    grad = torch.randn(gate.shape).to(BF16)
    silu = functional.silu(gate)
    assert same(ops.swiglu_quantized(gate, up), reference(silu * up, E4M3))
    assert same(ops.swiglu_quantized(gate, up, rounded=False), silu * up)
    of_gate, of_up = ops.swiglu_grad(grad, gate, up)
    assert same(of_up, grad * silu)
    assert same(of_gate, torch.ops.aten.silu_backward(grad * up, gate))


@needs_compiler
@pytest.mark.parametrize("n", [576, 33, 1000, 4096, 11008])
@pytest.mark.parametrize("sums_as_torch", [True, False])
def test_rms_norm(n: int, sums_as_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sums_as_torch:  # as where torch sums in another order
        monkeypatch.setattr(ops, "sums_as_torch", lambda: False)
    elif not ops.sums_as_torch():
        pytest.skip("torch sums rows in another order on this processor")
    x, grad = torch.randn(50, n).to(BF16) * 3, torch.randn(50, n).to(BF16)
    weight = torch.randn(n).to(BF16)
    codes, scale, inverse = rms_norm_quantize(x, weight, 1e-5, E4M3, "power_of_two")
    expected = decode(codes, E4M3, BF16) * (1.0 / scale).to(BF16)
    values, ours = ops.rms_norm_quantized(x, weight, 1e-5)
    assert torch.equal(values, expected)
    assert torch.equal(ours, inverse)
    normed, _, _ = rms_norm_quantize(x, weight, 1e-5, None, "power_of_two")
    assert torch.equal(ops.rms_norm_quantized(x, weight, 1e-5, rounded=False)[0], normed)
    # The mean is summed in another order: a last bit now and then.
    ours, theirs = (f(grad, x, weight, inverse).float() for f in (ops.rms_norm_grad, rms_norm_grad))
    assert (ours != theirs).float().mean() < 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("classes", [5, 1000, 3001])
def test_cross_entropy(classes: int) -> None:
    logits = (torch.randn(13, classes) * 4).to(BF16)
    targets = torch.randint(0, classes, (13,))
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    kept = logits.clone()
    torch.testing.assert_close(
        ops.cross_entropy(kept, targets, False)[0].double(), expected.detach(), rtol=1e-6, atol=1e-5
    )
    assert torch.equal(kept, logits)
    losses, parts = ops.cross_entropy(kept, targets, True)
    assert parts is not None
    sums, at_targets = parts
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    places = (torch.arange(13), targets)
    assert (kept[places] == 0).all()
    torch.testing.assert_close(at_targets.double(), exact.grad[places], rtol=1e-5, atol=1e-6)
    largest = exact.detach().amax(-1, keepdim=True)
    expected_sums = (exact.detach() - largest).exp().sum(-1)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-6, atol=0)
    exact.grad[places] = 0
    found = kept.double() / sums.double().unsqueeze(1)
    torch.testing.assert_close(found, exact.grad, rtol=2**-8, atol=1e-7)


@needs_compiler
def test_exponentials_at_the_edges() -> None:
    """Next to the smallest float32, below it, and no number; 16 at a time and one by one."""
    edges = [0.0, -1e-3, -1.0, -50.0, -86.5, -87.0, -88.0, -100.0, -1e30, -float("inf")]
    for classes in (len(edges), 64):
        logits = torch.full((2, classes), -3.0).to(BF16)
        logits[0, : len(edges)] = torch.tensor(edges).to(BF16)
        logits[1, 3] = float("nan")
        expected = logits[0].double().exp()
        ops.cross_entropy(logits, torch.tensor([1, 1]), True)
        expected[1] = 0.0  # the target
        torch.testing.assert_close(logits[0].double(), expected, rtol=2**-8, atol=2**-125)
        assert not bool(logits[0, 6 : len(edges)].any())
        assert bool(logits[1, 3].isnan())


@needs_compiler
def test_cross_entropy_of_logits_that_are_shut_out() -> None:
    logits = torch.zeros(1, 40, dtype=BF16)
    logits[0, [1, 39]] = -torch.inf
    losses, _ = ops.cross_entropy(logits, torch.tensor([5]), True)
    torch.testing.assert_close(losses, torch.full((1,), 38.0).log())
    assert (logits[0, [1, 5, 39]] == 0).all()  # the target as well
    assert (logits[0] == 1).sum() == 37


@needs_compiler
def test_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(101, 300).to(BF16), torch.randn(300).to(BF16)
    inverse = torch.rand(101, 1)
    targets = torch.randint(0, 300, (101,))

    def logits_and_parts() -> list[Tensor]:
        logits = x.clone()
        losses, parts = ops.cross_entropy(logits, targets, True)
        assert parts is not None
        return [logits, losses, *parts]

    def results() -> list[Tensor]:
        return [
            ops.quantized([x], [1.0]),
            ops.rms_norm_grad(x, x, weight, inverse),
            *ops.rms_norm_quantized(x, weight, 1e-5),
            *ops.swiglu_grad(x, x, x),
            *logits_and_parts(),
            ops.square_sums([x.float(), inverse]),  # type: ignore[list-item]
        ]

    with threads(1):
        one = results()
    with threads(3):
        assert all(map(torch.equal, one, results()))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing compiled or loaded yet, and an empty cache."""
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)
    return monkeypatch


def test_without_a_compiler(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    assert build.library() is None
    assert "no C++ compiler" in build.describe()


@needs_compiler
def test_compiler_that_fails(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", shutil.which("false") or "false")
    assert build.library() is None
    assert "could not compile" in build.describe()
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_is_compiled_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert build.library() is not None
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    assert build.library() is not None
    assert [made] == list(tmp_path.iterdir())
    assert made.stat().st_mtime_ns == before
    assert str(made) in build.describe()


@needs_compiler
@pytest.mark.skipif(products.unit() is None, reason="not an x86 processor with AVX2")
def test_without_amx_where_the_system_refuses_it(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(build, "_is_refused", lambda library: True)
    found, place = build._load()
    assert found is not None and found.falqon_unit() in (2, 3, 4)  # what there is besides AMX
    assert len(list(tmp_path.iterdir())) == 2 and Path(place).parent == tmp_path


@pytest.mark.parametrize("unit", range(-1, 5))
def test_a_refusal_is_told(unit: int) -> None:
    library: Any = SimpleNamespace(falqon_unit=lambda: unit)
    library.falqon_unit.restype = None
    assert build._is_refused(library) == (unit == -1)


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")
    assert build.library() is None
    assert not ops.usable(torch.zeros(1, 1, dtype=BF16))
    monkeypatch.setenv("FALQON_NATIVE", "on")
    with pytest.raises(InputError, match="FALQON_NATIVE is 'on'; choose auto or off"):
        build.library()
