"""The operations of a melded layer as they are run: ours, the alternatives, and what is right.

Inputs are random numbers, the same in every run. `gpu` chooses Triton's kernels, which run on CUDA
tensors, and in Triton's interpreter on those of the CPU; without it ours is what a CPU run calls.
Alternatives: `plain` and `unfused` are plain torch, `unfused` with one pass for each step (and our
quantiser after a norm or a SwiGLU); `compile` is `torch.compile` of that; `_scaled_mm` has its
scales ready and `bf16 mm` 16-bit operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_checks import Run, Setup
from benchmarks.kernel_costs import COSTS, Layer, shape_of
from falqon.fp8 import E4M3, E5M2, Format, amax_of, compute_scale, decode, quantize
from falqon.kernels import (
    Quantize,
    backbone_matmul,
    melded_matmul,
    proxy_grad,
    rms_norm_quantize,
    row_update,
    swiglu_quantize,
)
from falqon.kernels.row_update import LARGEST
from falqon.recipe import Granularity, ScaleRounding

ROUNDING: ScaleRounding = "power_of_two"
EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """One operation on one layer.

    Attributes:
        name: of the operation, a key of `COSTS`.
        layer: its sizes.
    """

    name: str
    layer: Layer

    @property
    def shape(self) -> str:
        """Sizes for people."""
        return shape_of(self.name, self.layer)

    def build(self, device: torch.device, gpu: bool, compiled: bool = True) -> Setup | None:
        """Make inputs and implementations; None if a CPU run has no such operation.

        Args:
            device: of the inputs.
            gpu: run Triton's kernels.
            compiled: have `torch.compile` among the alternatives.
        """
        return _BUILDERS[self.name](Site(self.layer, device, gpu, compiled))


def cases(layers: list[Layer], only: list[str] | None = None) -> list[Case]:
    """All operations of some layers, in the order of `COSTS`; equal ones once."""
    found: dict[tuple[str, str], Case] = {}
    for name in COSTS:
        for layer in layers:
            fits = name not in ("rms_norm", "swiglu") or name in layer.before
            if fits and (only is None or name in only):
                case = Case(name, layer)
                found.setdefault((name, case.shape), case)
    return list(found.values())


@dataclass
class Site:
    """Where and with which sizes an operation is set up, and what inputs look like there."""

    layer: Layer
    device: torch.device
    gpu: bool
    compiled: bool

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers, float32."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device)

    def values(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers, bfloat16."""
        return self.random(*shape, seed=seed).to(torch.bfloat16)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Codes of a weight and its A, uint8 [out + r, in], and their scale [1]."""
        x = self.layer
        return quantize(self.random(x.out + x.rank, x.n_in, seed=3) / x.n_in**0.5, E4M3)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Run]:
        """`torch.compile` of a function as an alternative; forgets what was compiled before."""
        if not self.compiled:
            return {}
        torch.compiler.reset()
        return {"compile": partial(torch.compile(function, dynamic=False), *arguments)}


def _dequantized(result: Any) -> Tensor:
    codes, scale = result[:2]
    values: Tensor = decode(codes, E4M3) / scale
    return values


def _values(codes: Tensor, fmt: Format) -> Tensor:
    return codes.view(fmt.dtype).float()  # torch's own cast, not the table of `fp8.decode`


def plain_quantize(
    x: Tensor, granularity: Granularity, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` to E4M3 without its short cuts: everything in float32."""
    wide = x.float()
    if scale is None:
        scale = compute_scale(amax_of(wide, granularity), E4M3, ROUNDING)
    codes = (wide * scale).clamp(-E4M3.max, E4M3.max).to(E4M3.dtype)
    return codes.view(torch.uint8), scale


def _quantize(site: Site, granularity: Granularity) -> Setup:
    x = site.values(site.layer.tokens, site.layer.n_in)
    plain = partial(plain_quantize, x, granularity)
    ours: Run = partial(quantize, x, E4M3, granularity, ROUNDING)
    others: dict[str, Run] = {"plain": plain}
    if site.gpu:
        from falqon.kernels.quantize_triton import quantize_triton

        others = {"unfused": ours}
        ours = partial(quantize_triton, x, E4M3, granularity, ROUNDING)
    others |= site.compile(quantize, x, E4M3, granularity, ROUNDING)
    return Setup(ours, plain, "same codes", _dequantized, others)


def _delayed(
    x: Tensor, scale: Tensor, cast: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast, amax and number of values beyond the scale, one after the other."""
    codes, _ = cast(x, scale=scale)
    return codes, scale, amax_of(x, "per_tensor"), (x.abs() > E4M3.max / scale).sum()


def _quantize_delayed(site: Site) -> Setup:
    x = site.values(site.layer.tokens, site.layer.n_in)
    scale = compute_scale(amax_of(x, "per_tensor"), E4M3, ROUNDING)
    cast = partial(quantize, fmt=E4M3, granularity="per_tensor", rounding=ROUNDING)
    plain = partial(_delayed, x, scale, partial(plain_quantize, granularity="per_tensor"))
    others: dict[str, Run] = {"plain": plain}
    module = Quantize(E4M3, "per_tensor", ROUNDING, delayed=True).train()
    module.scale = scale
    ours: Run = partial(module, x)
    if site.gpu:
        from falqon.kernels.quantize_triton import quantize_delayed_triton

        def ours() -> tuple[Tensor, Tensor]:
            return quantize_delayed_triton(x, E4M3, scale, True)[0], scale

        others = {"unfused": partial(_delayed, x, scale, cast)}
    others |= site.compile(_delayed, x, scale, cast)
    return Setup(ours, plain, "same codes", _dequantized, others)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as in Llama: float32 statistics, rounded, times the weight, rounded."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)
    return weight * (wide * inverse).to(x.dtype)


def _rms_norm(site: Site) -> Setup:
    x = site.values(site.layer.tokens, site.layer.n_in)
    weight = (1 + site.random(site.layer.n_in, seed=1) / 4).to(x.dtype)
    fused: Run = partial(rms_norm_quantize, x, weight, EPSILON, E4M3, ROUNDING)
    if site.gpu:
        from falqon.kernels.rms_norm_quantize_triton import rms_norm_quantize_triton

        fused = partial(rms_norm_quantize_triton, x, weight, EPSILON, E4M3, ROUNDING)
    return _producer(site, _norm, (x, weight), fused)


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _swiglu(site: Site) -> Setup:
    x = site.layer
    gate, up = (site.values(x.tokens, x.n_in, seed=seed) for seed in (0, 1))
    fused: Run = partial(swiglu_quantize, gate, up, E4M3, ROUNDING)
    if site.gpu:
        from falqon.kernels.swiglu_quantize_triton import swiglu_quantize_triton

        fused = partial(swiglu_quantize_triton, gate, up, E4M3, ROUNDING)
    return _producer(site, _activate, (gate, up), fused)


def _producer(
    site: Site, produce: Callable[..., Tensor], inputs: tuple[Tensor, ...], fused: Run
) -> Setup:
    """What makes a layer's input, quantised in the same operation."""

    def sequence(*given: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(produce(*given), E4M3, "per_token", ROUNDING)

    def plain() -> tuple[Tensor, Tensor]:
        return plain_quantize(produce(*inputs), "per_token")

    others: dict[str, Run] = {"plain": plain}
    if site.gpu:
        from falqon.kernels.quantize_triton import quantize_triton

        def unfused() -> Any:
            return quantize_triton(produce(*inputs), E4M3, "per_token", ROUNDING)

        others = {"unfused": unfused}
    others |= site.compile(sequence, *inputs)
    return Setup(fused, plain, "near codes", _dequantized, others)


def _joined(result: Any) -> Tensor:
    """Results side by side: a tensor, or tensors, or lists of a tensor for each layer."""
    parts = (result,) if isinstance(result, Tensor) else result
    flat = [x for part in parts for x in ([part] if isinstance(part, Tensor) else part)]
    return torch.cat([x for x in flat if x.shape[1]], dim=1).float()


@dataclass
class _Product:
    """`left [T, K] x right [K, N]` of codes, and the ways of others to compute it."""

    left: Tensor
    left_scale: Tensor
    fmt: Format
    right: Tensor
    right_scale: Tensor

    def plain(self) -> Tensor:
        """Dequantised and multiplied in float32."""
        left = _values(self.left, self.fmt) / self.left_scale
        return left @ (_values(self.right, E4M3) / self.right_scale)

    def setup(self, ours: Run, gpu: bool) -> Setup:
        """A right operand that lies row-major is transposed in the time of `_scaled_mm`."""
        inverse = 1.0 / self.left_scale
        unit = (1.0 / self.right_scale).reshape(1, 1).expand(1, self.right.shape[1]).contiguous()
        left = self.left.view(self.fmt.dtype)

        def scaled_mm() -> Tensor:
            right = self.right.t().contiguous().t().view(E4M3.dtype)  # copies only if needed
            return torch._scaled_mm(left, right, inverse, unit, out_dtype=torch.bfloat16)

        pair = (
            (_values(self.left, self.fmt) / self.left_scale).to(torch.bfloat16),
            (_values(self.right, E4M3) / self.right_scale).to(torch.bfloat16),
        )
        others: dict[str, Run] = {} if gpu else {"plain": self.plain}
        others |= {"_scaled_mm": scaled_mm, "bf16 mm": partial(torch.mm, *pair)}
        return Setup(ours, self.plain, "product", _joined, others)


def _melded_matmul(site: Site) -> Setup:
    x = site.layer
    codes, scale = site.merged()
    left, left_scale = quantize(site.values(x.tokens, x.n_in), E4M3, "per_token")
    ours: Run = partial(
        melded_matmul, left, left_scale, [codes], [scale], [None], x.rank, torch.bfloat16, True
    )
    if site.gpu:
        from falqon.kernels.matmul_triton import matmul_triton
        from falqon.kernels.scaled_matmul import ADAPTER

        segments = ((0, x.out, 0, 0), (x.out, x.rank, 0, ADAPTER))
        ours = partial(
            matmul_triton, left, left_scale, "e4m3", codes, scale, segments, torch.bfloat16
        )
    return _Product(left, left_scale, E4M3, codes.t(), scale).setup(ours, site.gpu)


def _dx(site: Site, row_major: bool) -> Setup | None:
    x = site.layer
    if not site.gpu and not row_major:
        return None
    codes, scale = site.merged()
    grad, grad_scale = quantize(site.values(x.tokens, x.out), E5M2, "per_token")
    ours: Run = partial(
        backbone_matmul, grad, grad_scale, [codes], scale, x.rank, torch.bfloat16, True
    )
    if site.gpu:
        from falqon.kernels.matmul_triton import matmul_triton
        from falqon.kernels.transpose_triton import transpose_triton

        def ours() -> Any:
            right = codes if row_major else transpose_triton(codes, x.out, (), x.rank)
            cuts = () if row_major else None
            whole, dtype = ((0, x.n_in, 0, 0),), torch.bfloat16
            return matmul_triton(
                grad, grad_scale, "e5m2", right, scale, whole, dtype, cuts=cuts, rank=x.rank
            )

    return _Product(grad, grad_scale, E5M2, codes[: x.out], scale).setup(ours, site.gpu)


def _transpose(site: Site) -> Setup | None:
    if not site.gpu:
        return None
    from falqon.kernels.transpose_triton import transpose_triton

    x, (codes, _) = site.layer, site.merged()

    def plain() -> Tensor:
        return codes[: x.out].t().contiguous()

    ours = partial(transpose_triton, codes, x.out, (), x.rank)
    return Setup(ours, plain, "same codes", partial(_values, fmt=E4M3), {"plain": plain})


def _proxy_grad(site: Site) -> Setup:
    x = site.layer
    grad, adapter = site.values(x.tokens, x.out, seed=1), site.values(x.tokens, x.rank, seed=2)

    def plain() -> Tensor:
        return grad.float().t() @ adapter.float()

    ours: Run = partial(proxy_grad, grad, adapter)
    others: dict[str, Run] = {"plain": plain}
    if site.gpu:
        from falqon.kernels.proxy_grad_triton import proxy_grad_triton

        ours = partial(proxy_grad_triton, grad, adapter)
        others = {"bf16 mm": partial(torch.mm, grad.t(), adapter)}
    return Setup(ours, plain, "product", _joined, others)


def plain_row_update(codes: Tensor, rows: Tensor | None, change: Tensor) -> None:
    """`row_update` without its safeguards and counts, by torch's own casts."""
    split = codes.shape[0] - change.shape[1]
    where: Any = slice(0, split) if rows is None else rows
    target = _values(codes[where], E4M3) + change @ _values(codes[split:], E4M3)
    codes[where] = target.clamp(-E4M3.max, E4M3.max).to(E4M3.dtype).view(torch.uint8)


def _row_update(site: Site, everything: bool) -> Setup:
    x = site.layer
    codes, scale = site.merged()
    count = x.out if everything else x.rows
    # A quarter as large as the weights: an update that does nothing cannot pass for a right one.
    change = site.random(count, x.rank, seed=4) / (4 * x.rank**0.5)
    chosen = torch.randperm(x.out, generator=torch.Generator().manual_seed(5))[:count]
    rows = None if everything else chosen.to(site.device)
    where: Any = slice(0, x.out) if rows is None else rows

    def on_copy(update: Callable[[Tensor, Tensor], Any]) -> Run:
        """Add the change and take it back in turn, so that codes stay as large as they are."""
        mine, signs = codes.clone(), cycle((change, -change))

        def run() -> Tensor:
            update(mine, next(signs))
            return mine

        return run

    def ours(mine: Tensor, by: Tensor) -> Any:
        if not site.gpu:
            return row_update(mine, scale, rows, by)
        from falqon.kernels.row_update import RowWrite
        from falqon.kernels.row_update_triton import launch_row_updates

        write = RowWrite(mine, scale, rows, by)
        return launch_row_updates([write], LARGEST, None, [None])

    def plain(mine: Tensor, by: Tensor) -> None:
        plain_row_update(mine, rows, by)

    return Setup(
        on_copy(ours),
        on_copy(plain),
        "near codes",
        lambda mine: _values(mine[where], E4M3),
        {"plain": on_copy(plain)},
        lambda mine: mine[where],
    )


_BUILDERS: dict[str, Callable[[Site], Setup | None]] = {
    "quantize_token": partial(_quantize, granularity="per_token"),
    "quantize_tensor": partial(_quantize, granularity="per_tensor"),
    "quantize_delayed": _quantize_delayed,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "melded_matmul": _melded_matmul,
    "dx": partial(_dx, row_major=False),
    "dx_row_major": partial(_dx, row_major=True),
    "transpose": _transpose,
    "proxy_grad": _proxy_grad,
    "row_update": partial(_row_update, everything=False),
    "row_update_all": partial(_row_update, everything=True),
}
