"""Matrix products and attention by the processor's instructions against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, decode
from falqon.kernels.native import attention, build, melded, ops, products
from falqon.recipe import Fp8Recipe
from tests.threads import threads

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not products.present(), reason="the processor has no AVX2"),
]
BF16 = torch.bfloat16


class Group:
    """Random layers with one input, and what goes forward and backward through them."""

    def __init__(self, tokens: int, columns: int, outs: tuple[int, ...], rank: int) -> None:
        torch.manual_seed(0)
        self.rank, self.outs = rank, outs
        codes = [torch.randint(256, (out + rank, columns), dtype=torch.uint8) for out in outs]
        for code in codes:
            code[(code & 0x7F) == 0x7F] = 3  # no NaN
        self.codes = [nn.Parameter(code, requires_grad=False) for code in codes]
        self.scales = [torch.tensor([2.0 ** (6 + i)]) for i in range(len(outs))]
        self.proxies = [torch.randn(out, rank) * 0.05 for out in outs]
        self.factors = [1.0 + i for i in range(len(outs))]
        self.x = torch.randn(tokens, columns).to(BF16)
        # As q, k and v of one tensor: rows are apart.
        self.grads = torch.randn(tokens, sum(outs)).to(BF16).split(list(outs), dim=1)

    def run(
        self, pending: bool = True, rounded: bool = True, known: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Results by name; backward goes on with `known` O_A, so that its own sums are compared."""
        given = (self.codes, self.scales)
        proxies = self.proxies if pending else []
        acting = (self.rank, proxies, self.factors)
        biases = [None] * len(self.outs)
        outs, adapters = melded.forward(self.x, *given, biases, *acting)
        wanted = (rounded, True, [True] * len(outs))
        if known is not None:
            given_back = [known[f"adapter {i}"] for i in range(len(outs))]
        else:
            given_back = adapters
        of_x, of_proxies = melded.backward(self.grads, *given, *acting, given_back, *wanted)
        assert of_x is not None
        found = {"x": of_x}
        for i, parts in enumerate(zip(outs, adapters, of_proxies, strict=True)):
            for name, part in zip(("out", "adapter", "proxy"), parts, strict=True):
                assert part is not None
                found[f"{name} {i}"] = part
        return found

    def with_pending_columns(
        self, adapters: list[Tensor], rounded: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs and gradient of the input by torch, pending changes as columns of the weights."""
        given = (self.codes, self.scales, self.rank)
        weights, of_adapters = melded._decoded(*given)
        acting = melded._acting(self.proxies, self.factors)
        parts = zip(adapters, acting, weights.split(list(self.outs)), strict=True)
        outs = [torch.cat([a, self.x], 1) @ torch.cat([b, w], 1).t() for a, b, w in parts]
        left = list(self.grads)
        if rounded:
            units = [float(self.scales[0] / scale) for scale in self.scales]
            left = [ops.quantized(left, units, e5m2=True)]
        thin = [grad @ b for grad, b in zip(self.grads, acting, strict=True)]
        return outs, torch.cat([*thin, *left], 1) @ torch.cat([of_adapters, weights])


def differences(ours: Tensor, theirs: Tensor) -> float:
    """Share of values that are not equal; a last bit of the largest ones is all that differs."""
    most = 2**-8 * float(theirs.abs().max())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=most)
    return float((ours != theirs).float().mean())


SHAPES = [
    (64, 64, (64, 32, 32), 32),
    (77, 96, (64,), 8),
    (33, 32, (96, 96), 40),
    (300, 576, (576, 192, 192), 64),
    (129, 576, (1536, 1536), 64),
    (130, 1536, (576,), 64),
    (1100, 64, (64,), 16),
    (650, 1536, (64, 1536), 40),  # more rows than a thread has at a time
    (200, 2048, (64, 64, 2048), 64),  # more panels of adapters, and of B, than at a time
]


def most_differences(name: str, shape: tuple[int, int, tuple[int, ...], int]) -> float:
    """Share of values that may differ: more where torch adds up long sums in parts."""
    in_parts = products.unit() == "AVX2" or (name == "x" and shape == SHAPES[-1])
    return 5e-3 if in_parts and products.unit() != "AMX" else 1e-3


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_are_those_of_torch(
    shape: tuple[int, int, tuple[int, ...], int],
    pending: bool,
    rounded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(*shape)
    assert products.takes(group.codes, shape[0], shape[3])
    ours = group.run(pending, rounded)
    monkeypatch.setattr(products, "takes", lambda *args: False)
    theirs = group.run(pending, rounded, known=ours)
    if pending:
        # What is pending is summed first, and not rounded before the rest is added.
        adapters = [ours[f"adapter {i}"] for i in range(len(group.outs))]
        outs, of_input = group.with_pending_columns(adapters, rounded)
        theirs |= {f"out {i}": out for i, out in enumerate(outs)} | {"x": of_input}
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert tensor.dtype == theirs[name].dtype
        assert differences(tensor, theirs[name]) < most_differences(name, shape), name


def first_to_last(left: Tensor, right: Tensor) -> Tensor:
    """`left right` with float32 sums, of each pair of terms the second one first."""
    total = torch.zeros(left.shape[0], right.shape[1])
    for k in range(0, left.shape[1], 2):
        for j in (k + 1, k):  # products are exact in float64, so that a sum is rounded once
            exact = total.double() + left[:, j, None].double() * right[j].double()
            total = exact.float()
    return total.to(BF16)


@pytest.mark.skipif(products.unit() == "AMX", reason="the order within a pair is that of vectors")
@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", SHAPES[2:6] + SHAPES[-2:], ids=str)
def test_sums_run_from_first_to_last(
    shape: tuple[int, int, tuple[int, ...], int], rounded: bool, pending: bool
) -> None:
    group = Group(*shape)
    found = group.run(pending, rounded)
    some = slice(32)  # columns, of which all are alike
    weights, of_adapters = melded._decoded(group.codes, group.scales, group.rank)
    acting = melded._acting(group.proxies, group.factors)
    parts = zip(acting, weights.split(list(group.outs)), strict=True)
    for i, (proxy, weight) in enumerate(parts):
        left, right = group.x, weight.t()[:, some]
        if pending:
            left = torch.cat([found[f"adapter {i}"], left], 1)
            right = torch.cat([proxy.t()[:, some], right])
        assert torch.equal(found[f"out {i}"][:, some], first_to_last(left, right))
    grads = list(group.grads)
    if rounded:
        units = [float(group.scales[0] / scale) for scale in group.scales]
        grads = [ops.quantized(grads, units, e5m2=True)]
    right = weights[:, some]
    if pending:
        pairs = zip(group.grads, acting, strict=True)
        grads = [*(first_to_last(grad, proxy) for grad, proxy in pairs), *grads]
        right = torch.cat([of_adapters[:, some], right])
    left = torch.cat(grads, 1)
    assert torch.equal(found["x"][:, some], first_to_last(left, right))


@pytest.mark.parametrize("power", [-110, -6, 110, 122])
def test_all_codes_are_decoded(power: int) -> None:
    if power == 122 and products.unit() in ("AMX", "AVX512-BF16"):
        pytest.skip("its products take numbers below 2^-126 as zero")
    group = Group(64, 64, (64,), 32)
    codes = torch.arange(96 * 64).reshape(96, 64) % 256
    codes[codes & 0x7F == 0x7F] = 3
    group.codes = [nn.Parameter(codes.to(torch.uint8), requires_grad=False)]
    group.scales = [torch.tensor([2.0**power])]
    group.x = torch.eye(64).to(BF16)
    group.grads = (torch.eye(64).to(BF16),)
    expected = decode(group.codes[0], E4M3) / group.scales[0]
    found = group.run(pending=False, rounded=False)
    assert torch.equal(found["out 0"].float(), expected[:64].t())
    assert torch.equal(found["x"].float(), expected[:64])
    group.codes[0].view(-1)[5] = 0xFF  # NaN
    outs = group.run(pending=False, rounded=False)["out 0"]
    assert bool(outs[:, 0].isnan().all()) and not bool(outs[:, 1:].isnan().any())


def test_pending_changes_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(130, 576, (96, 64), 32)
    ours = group.run()
    monkeypatch.setattr(products, "takes", lambda *args: False)
    theirs = group.run()
    weights, _ = melded._decoded(group.codes, group.scales, group.rank)
    acting = melded._acting(group.proxies, group.factors)
    parts = zip(weights.double().split(list(group.outs)), acting, strict=True)
    for i, (weight, proxy) in enumerate(parts):
        pending = ours[f"adapter {i}"].double() @ proxy.double().t()
        exact = pending + group.x.double() @ weight.t()
        error, other = ((found[f"out {i}"].double() - exact).abs() for found in (ours, theirs))
        step = 2.0**-8  # half of one of the last bit
        of_sums = 1e-5 * float(exact.abs().max())
        assert bool((error <= step * 1.01 * exact.abs() + of_sums).all())
        assert bool((other <= step * 1.01 * (exact.abs() + pending.abs()) + of_sums).all())
        assert float(error.mean()) < float(other.mean())


@pytest.mark.parametrize("shape", [*SHAPES[:4], *SHAPES[-2:]], ids=str)
def test_threads_change_nothing(shape: tuple[int, int, tuple[int, ...], int]) -> None:
    group = Group(*shape)
    with threads(1):
        one = group.run()
    for count in (2, 3, 7, 13):  # of these some have nothing to do
        with threads(count):
            many = group.run()
        assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("pending", [True, False])
def test_group_is_its_layers(pending: bool) -> None:
    group = Group(130, 96, (64, 96, 32), 24)
    whole = group.run(pending)
    for i, part in enumerate(zip(group.codes, group.scales, group.proxies, strict=True)):
        code, scale, proxy = part
        acting = [proxy] if pending else []
        (out,), (adapter,) = products.forward(
            group.x, [code], [scale], 24, acting, [group.factors[i]]
        )
        assert torch.equal(out, whole[f"out {i}"]) and torch.equal(adapter, whole[f"adapter {i}"])


def test_tokens_do_not_depend_on_their_neighbours() -> None:
    group = Group(300, 96, (64, 96), 16)
    whole = group.run()
    group.x, group.grads = group.x[101:240], tuple(g[101:240] for g in group.grads)
    part = group.run()
    for name in ("x", "out 0", "out 1", "adapter 0", "adapter 1"):
        assert torch.equal(part[name], whole[name][101:240])


def test_what_is_not_wanted_is_not_made() -> None:
    group = Group(40, 64, (64, 32), 8)
    _, adapters = products.forward(group.x, group.codes, group.scales, 8, [], [1.0, 1.0])
    given = (group.grads, group.codes, group.scales, 8, [], [1.0, 1.0], adapters, True)
    of_x, (first, second) = products.backward(*given, False, [False, True])
    assert of_x is None and first is None and second is not None
    all_x, (_, same) = products.backward(*given, True, [True, True])
    assert all_x is not None and same is not None
    assert torch.equal(second, same)


def test_nan_gets_through() -> None:
    group = Group(64, 64, (64,), 32)
    group.x[5, 7] = torch.nan
    group.grads[0][9, 3] = torch.inf
    found = group.run(rounded=False)
    assert found["out 0"][5].isnan().all()
    assert not found["out 0"][6].isnan().any()
    assert not found["x"][9].isfinite().any()
    code = group.codes[0].data
    code[3, 4] = 0x7F
    assert group.run()["out 0"][:, 3].isnan().all()
    assert decode(code, E4M3, BF16)[3, 4].isnan()


@pytest.mark.parametrize(
    ("tokens", "columns", "out", "rank", "fits"),
    [
        (64, 64, 64, 5, True),
        (31, 64, 64, 8, False),
        (64, 48, 64, 8, False),
        (64, 64, 80, 8, False),
    ],
)
def test_shapes_that_are_taken(
    tokens: int, columns: int, out: int, rank: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [nn.Parameter(torch.zeros(out + rank, columns, dtype=torch.uint8), requires_grad=False)]
    assert products.takes(codes, tokens, rank) == fits
    assert melded.takes(Fp8Recipe(), codes, [torch.zeros(tokens, columns, dtype=BF16)])
    monkeypatch.setattr(products, "present", lambda: False)
    assert not products.takes(codes, tokens, rank)


def heads_of(
    batch: int, length: int, heads: int, kv: int, d: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Query, key and value as parts of one tensor; cosines, sines, and a gradient."""
    torch.manual_seed(0)
    joined = torch.randn(batch, length, (heads + 2 * kv) * d).to(BF16)
    parts = joined.split([heads * d, kv * d, kv * d], dim=-1)
    angles = torch.rand(batch, length, d // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(BF16) for f in (torch.cos, torch.sin))
    grad = torch.randn(batch, length, heads, d).to(BF16)
    given = [part.unflatten(-1, (-1, d)).requires_grad_() for part in parts]
    return given, cos, sin, grad


def documents(batch: int, length: int) -> attention.Ranges:
    """Queries that see their own document up to themselves, and some that see nothing."""
    first = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        for start in (length // 3 + row, length // 2 + 3):
            first[row, start:] = start
    last = torch.arange(1, length + 1).expand(batch, length).clone()
    last[0, -3:] = first[0, -3:]
    return attention.Ranges(first, last)


ATTENTION = [(2, 77, 6, 2, 32), (1, 40, 4, 4, 64), (3, 200, 9, 3, 64), (2, 33, 8, 1, 96)]


def attended(shape: tuple[int, int, int, int, int]) -> list[Tensor]:
    given, cos, sin, grad = heads_of(*shape)
    ranges = documents(*shape[:2])
    out = attention.attend(*given, cos, sin, ranges, shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_is_as_exact_as_with_matmuls_of_torch(
    shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, length, heads, kv, d = shape
    given, cos, sin, grad = heads_of(*shape)
    ranges = documents(batch, length)
    assert products.attends(d)
    q, k, v = (x.detach().double().requires_grad_() for x in given)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos.double()[:, :, None] + turned * sin.double()[:, :, None]

    keys, values = (x.repeat_interleave(heads // kv, 2) for x in (rotated(k), v))
    scores = torch.einsum("bqhd,bkhd->bhqk", rotated(q), keys) * d**-0.5
    at = torch.arange(length)
    seen = ((at >= ranges.first[..., None]) & (at < ranges.last[..., None]))[:, None]
    p = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    exact = torch.einsum("bhqk,bkhd->bqhd", p, values)
    exact_all = [exact.detach(), *torch.autograd.grad(exact, (q, k, v), grad.double())]
    ours = attended(shape)
    monkeypatch.setattr(products, "attends", lambda d: False)
    theirs = attended(shape)
    for a, b, c in zip(ours, theirs, exact_all, strict=True):
        error, others = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error < 1.05 * others
        assert error < 0.008


def test_threads_do_not_change_attention() -> None:
    for shape in ATTENTION[:2]:
        with threads(1):
            one = attended(shape)
        for count in (2, 5):
            with threads(count):
                many = attended(shape)
            assert all(map(torch.equal, one, many))


def test_nan_of_any_bits_gets_through() -> None:
    group = Group(40, 64, (64,), 8)
    group.proxies[0][3, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    group.proxies[0][5, 2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    found = group.run()["out 0"].isnan()
    assert found[:, [3, 5]].all() and found.sum() == 80


def test_attention_hands_on_nan() -> None:
    given, cos, sin, _ = heads_of(1, 40, 2, 1, 32)
    with torch.no_grad():
        given[0][0, 20, 1, 3] = torch.nan
    ranges = attention._causal(1, 40)
    out = attention.attend(*given, cos, sin, ranges, 0.2)
    assert out[0, 20, 1].isnan().all()
    assert out.isnan().sum() == 32


@pytest.mark.parametrize("shape", [(1, 64, 32), (33, 96, 32), (100, 1120, 96), (300, 2048, 576)])
def test_gradient_through_the_output_embedding(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    tokens, out, columns = shape
    weight, grad = torch.randn(out, columns).to(BF16), torch.randn(tokens, out).to(BF16)
    assert products.takes_dense(weight)
    with threads(1):
        ours = products.dense_grad(grad, weight)
    exact = grad.double() @ weight.double()
    assert (ours.double() - exact).norm() < 0.002 * exact.norm()
    for count in (2, 5):
        with threads(count):
            assert torch.equal(ours, products.dense_grad(grad, weight))
    assert not products.takes_dense(weight[:-1]) and not products.takes_dense(weight.t())


# Tokens, rows and columns of the matrix; the last one has more panels than a thread has room for.
DENSE = [(32, 64, 32), (33, 96, 32), (100, 1120, 96), (300, 2048, 576), (40, 1216, 1536)]


@pytest.mark.parametrize("shape", DENSE)
def test_logits(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    tokens, out, columns = shape
    x, weight = torch.randn(tokens, columns).to(BF16), torch.randn(out, columns).to(BF16)
    found = []
    for count in (1, 2, 5):
        found.append(torch.full((tokens, out), torch.nan, dtype=BF16))
        with threads(count):
            products.dense(x, weight, found[-1])
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert differences(found[0], x @ weight.t()) < 1e-3


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_memory_for_panels_is_enough(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    behind = 4096
    given: list[Tensor] = []

    def guarded(size: int) -> Tensor:
        given.append(torch.full((size + behind,), 1.5, dtype=BF16))
        return given[-1]

    monkeypatch.setattr(products, "memory", guarded)
    with threads(count):
        for shape in SHAPES:
            Group(*shape).run()
        for heads in ATTENTION:
            attended(heads)
        for shape in DENSE:
            tokens, out, columns = shape
            grad, weight = (
                torch.zeros(tokens, out, dtype=BF16),
                torch.zeros(out, columns, dtype=BF16),
            )
            products.dense_grad(grad, weight)
            products.dense(torch.zeros(tokens, columns, dtype=BF16), weight, grad)
    assert len(given) == 2 * len(SHAPES) + 2 * len(ATTENTION) + 2 * len(DENSE)
    assert all((work[-behind:] == 1.5).all() for work in given)


def test_proxies_of_any_layout() -> None:
    group = Group(40, 64, (64,), 8)
    expected = group.run()
    group.proxies = [proxy.t().contiguous().t() for proxy in group.proxies]
    found = group.run()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_for_panels_grows() -> None:
    small = products.memory(10)
    assert products.memory(small.numel()).data_ptr() == small.data_ptr()
    assert products.memory(small.numel() + 1).numel() == small.numel() + 1


def test_profiler_sees_the_products() -> None:
    group = Group(40, 64, (64,), 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        group.run()
    names = {event.name for event in profile.events()}
    assert {"falqon::matmul", "falqon::matmul_grad"} <= names
