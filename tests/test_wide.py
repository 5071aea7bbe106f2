"""Products of bfloat16 matrices in float32, where a CPU has no 16-bit ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from falqon.kernels import wide
from falqon.kernels.native import build, products
from falqon.kernels.wide import product
from lit_modules.loss import supervised_loss
from tests.test_native_layers import batch, model

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def widens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "WIDENS", True)


def factors(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape).to(BF16) for shape in ((m, k), (k, n), (m, n)))  # type: ignore[return-value]


@pytest.mark.parametrize("parts", [10**9, 500])
@pytest.mark.parametrize(("m", "k", "n"), [(12, 40, 96), (20, 96, 40), (3, 64, 64)])
@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_results_are_rounded_once(
    m: int, k: int, n: int, is_turned: bool, begins: bool, parts: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(wide, "_AT_ONCE", parts)
    a, b, onto = factors(m, k, n)
    if is_turned:
        b = b.t().contiguous().t()
    exact = a.double() @ b.double() + (onto.double() if begins else 0)
    found = product(a, b, onto.clone() if begins else None)
    assert found.dtype == BF16
    assert is_rounded_once(found, exact)
    if not begins:
        out = torch.empty_like(found)
        assert product(a, b, out=out) is out
        assert torch.equal(out, found)


def is_rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Within half a step of the last bit, and the error of float32 sums."""
    return bool(((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all())


def test_matrices_side_by_side() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 10, 32).to(BF16), torch.randn(3, 32, 20).to(BF16)
    found = product(a, b)
    assert found.dtype == BF16
    assert is_rounded_once(found, a.double() @ b.double())


@pytest.mark.parametrize("parts", [10**9, 500])
def test_autocast_narrows_nothing(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_AT_ONCE", parts)
    a, b, _ = factors(12, 40, 96)
    with torch.autocast("cpu", dtype=BF16), Products() as seen:
        found = product(a, b)
    assert seen.dtypes == {torch.float32}
    assert torch.equal(found, product(a, b))


@pytest.mark.parametrize("begins", [True, False])
def test_compiled_code(begins: bool) -> None:
    a, b, onto = factors(12, 40, 96)

    def run(a: Tensor, b: Tensor, onto: Tensor) -> Tensor:
        return product(a, b, onto.clone() if begins else None)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, onto), run(a, b, onto))


def test_other_dtypes_are_left_alone() -> None:
    a, b, onto = (x.double() for x in factors(8, 16, 8))
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(product(a, b, onto.clone()), torch.addmm(onto, a, b))


class Products(TorchDispatchMode):
    """Sees the dtypes of matrix products."""

    NAMES = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_scaled_dot_product_flash_attention")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.removesuffix("_for_cpu") in self.NAMES:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor) and len(args[0])}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_no_product_of_melded_layers_is_in_16_bits(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", native)
    monkeypatch.setattr(products, "present", lambda: False)
    made, plugin = model()
    given = batch()
    seen = Products()
    with seen:
        if native == "auto":
            loss, _ = supervised_loss(made, given)
        else:  # the loss and attention are torch's own then
            ids = given["input_ids"]
            embedded = made.model.embed_tokens(ids)  # type: ignore[union-attr, operator]
            mlp = made.model.layers[0].mlp  # type: ignore[union-attr, index]
            loss = mlp(embedded).float().sum()  # type: ignore[operator]
        loss.backward()
    assert seen.dtypes == {torch.float32}
    grads = [layer.B.grad for layer in plugin.layers.values()]
    assert any(grad is not None and bool(grad.any()) for grad in grads)


def test_few_rows_are_multiplied_as_they_are() -> None:
    a, b, _ = factors(4, 64, 96)
    b = b.t().contiguous().t()
    with Products() as seen:
        product(a, b)
    assert seen.dtypes == {BF16}
    with Products() as seen:
        product(a, b.contiguous())
    assert seen.dtypes == {torch.float32}
