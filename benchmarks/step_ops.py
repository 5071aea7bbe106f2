"""What one kernel launch costs, and which kernels a linear layer launches with each method.

Shape legend: T tokens, `in`/`out` features, r adapter rank. Bytes are those that must cross the
device memory's bus if every operand is read once and every result written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from benchmarks.devices import Device, Precision
from falqon.linear import MeldedLinear
from falqon.recipe import Granularity

SIZE = {"fp8": 1, "bf16": 2, "fp32": 4}
"""Bytes of an element by precision."""


@dataclass(frozen=True)
class Op:
    """One kind of kernel call, or a few that always come together.

    Attributes:
        name: what it does.
        kind: row of the breakdown: `gemm`, `thin gemm`, `quantise`, `transpose`, `dequantise`,
            `attention`, `elementwise`, `head and loss`, `optimizer`.
        read, written: bytes.
        flops: of matmuls (a multiplication and an addition are two); element by element work is
            bound by memory on every device in the table, its arithmetic is not counted.
        precision: the units that do them.
        launches: kernels.
        phase: `forward`, `recompute`, `backward` or `update`; set by what runs the op.
    """

    name: str
    kind: str
    read: int
    written: int
    flops: int = 0
    precision: Precision = "fp32"
    launches: int = 1
    phase: str = ""

    def seconds(self, device: Device) -> float:
        """Time at the published peaks: the longer of moving the bytes and doing the FLOPs."""
        moving = (self.read + self.written) / device.bandwidth
        return max(moving, self.flops / device.peak(self.precision))


def gemm(
    name: str,
    m: int,
    n: int,
    k: int,
    precision: Precision,
    out: int = 2,
    accumulate: bool = False,
    kind: str = "gemm",
) -> Op:
    """`[m, k] @ [k, n]`, operands of one precision, `out` bytes a result; `accumulate`: added."""
    written = m * n * out
    read = (m * k + k * n) * SIZE[precision] + (written if accumulate else 0)
    return Op(name, kind, read, written, 2 * m * n * k, precision)


def quantise(
    name: str, rows: int, columns: int, granularity: Granularity = "per_tensor", size: int = 2
) -> Op:
    """Amax, scale and cast to one byte of a tensor with `size` bytes an element.

    One scale for the tensor needs the whole of it before the first cast, hence two reads and three
    kernels; a row fits on chip, so that one scale a row needs one of each.
    """
    elements = rows * columns
    if granularity == "per_token":
        return Op(name, "quantise", elements * size, elements + 4 * rows)
    return Op(name, "quantise", 2 * elements * size, elements + 4, launches=3)


def transpose(name: str, rows: int, columns: int) -> Op:
    """A transposed copy of FP8 codes: FP8 tensor cores want both operands K-major."""
    return Op(name, "transpose", rows * columns, rows * columns)


def elementwise(
    name: str, elements: int, read: int, written: int, launches: int = 1, kind: str = "elementwise"
) -> Op:
    """`read` and `written`: bytes an element."""
    return Op(name, kind, elements * read, elements * written, launches=launches)


Saved = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Listing:
    """The kernels of one module, and what it keeps.

    Attributes:
        forward: its forward pass.
        backward: what of the backward pass always runs.
        grad_input: what runs only if the input needs a gradient.
        saved: shape and dtype of the tensors made and kept for the backward pass.
        keeps_input: the input is kept as well.
        scratch: bytes of temporaries in use at once.
    """

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    grad_input: tuple[Op, ...] = ()
    saved: tuple[Saved, ...] = ()
    keeps_input: bool = False
    scratch: int = 0


@dataclass(frozen=True)
class Settings:
    """What is the same for every method of one table.

    Attributes:
        batch: rows of a step.
        tokens: tokens of a row.
        rank: r.
        rows: k, rows written in each melded layer and step.
        dropout: LoRA dropout is on (two more passes over every input, and a mask).
        cached_transpose: the transposed FP8 weight is kept instead of made in every step.
    """

    batch: int = 16
    tokens: int = 527
    rank: int = 64
    rows: int = 10
    dropout: bool = False
    cached_transpose: bool = False

    @property
    def total(self) -> int:
        """T, tokens of a step."""
        return self.batch * self.tokens


def melded(layer: MeldedLinear, settings: Settings) -> Listing:
    """A melded layer of its own, as the paper describes it: nothing fused with its neighbours.

    Assumed of dL/dB: in FP8, from the codes of dL/dO that exist anyway and O_A quantised, each
    transposed, because the contraction runs over tokens. O goes on as a strided view, O_A is a
    copy.
    """
    t, r, recipe = settings.total, layer.rank, layer.recipe
    merged, n_in = layer.codes.shape
    out = merged - r
    forward = (
        quantise("quantise x", t, n_in, recipe.activations),
        gemm("melded GEMM", t, merged, n_in, "fp8"),
        elementwise("copy O_A", t * r, 2, 2),
    )
    backward = (
        quantise("quantise dO", t, out, recipe.gradients),
        quantise("quantise O_A", t, r),
        transpose("transpose dO codes", t, out),
        transpose("transpose O_A codes", t, r),
        gemm("dB", out, r, t, "fp8", out=4, kind="thin gemm"),
    )
    grad_input: tuple[Op, ...] = (gemm("dx", t, n_in, out, "fp8"),)
    if not settings.cached_transpose:
        grad_input = (transpose("transpose W codes", out, n_in), *grad_input)
    scratch = max(t * n_in, t * out + (0 if settings.cached_transpose else out * n_in))
    saved: tuple[Saved, ...] = (((t, r), torch.bfloat16),)
    return Listing(forward, backward, grad_input, saved, scratch=scratch)


class Frozen(nn.Module):
    """A frozen linear layer with a LoRA adapter beside it: shapes and parameters, no arithmetic.

    Args:
        linear: the layer it stands for, on the meta device.
        rank: r.
        storage: `bf16`, or `nf4`: 4-bit codes, an 8-bit scale for every 64 of them and a float32
            scale for every 256 of those (double quantisation).

    Attributes:
        A, B: float32 [r, in] and [out, r], trainable: peft keeps adapters of 16-bit models so.
        weights: what is stored of the frozen weight.
    """

    def __init__(self, linear: nn.Linear, rank: int, storage: str = "bf16") -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, self.in_features, device="meta"))
        self.B = nn.Parameter(torch.empty(self.out_features, rank, device="meta"))
        weights = linear.weight.numel()
        sizes = [
            (weights // 2 + weights // 64, torch.uint8),
            (weights // (64 * 256), torch.float32),
        ]
        if storage == "bf16":
            sizes = [(weights, torch.bfloat16)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(n, dtype=d, device="meta"), requires_grad=False)
            for n, d in sizes
        )


def lora(layer: Frozen, settings: Settings) -> Listing:
    """16-bit LoRA as peft computes it under autocast: `base(x) + B(A(x)) * scaling`.

    Without one thing: for float32 adapters peft casts x to float32, and autocast casts it back.
    """
    t, n_in, out, r = settings.total, layer.in_features, layer.out_features, layer.rank
    adapter = (n_in + out) * r
    drop = (elementwise("dropout", t * n_in, 2, 3),) if settings.dropout else ()
    undrop = (elementwise("dropout backward", t * n_in, 3, 2),) if settings.dropout else ()
    forward = (
        gemm("base GEMM", t, out, n_in, "bf16"),
        *drop,
        elementwise("cast A and B", adapter, 4, 2, launches=2),
        gemm("O_A", t, r, n_in, "bf16", kind="thin gemm"),
        gemm("O_A B^T", t, out, r, "bf16", kind="thin gemm"),
        elementwise("times scaling", t * out, 2, 2),
        elementwise("add to base", t * out, 4, 2),
    )
    backward = (
        elementwise("dO times scaling", t * out, 2, 2),
        gemm("dB", out, r, t, "bf16", kind="thin gemm"),
        gemm("dO_A", t, r, out, "bf16", kind="thin gemm"),
        gemm("dA", r, n_in, t, "bf16", kind="thin gemm"),
        elementwise("cast dA and dB", adapter, 2, 4, launches=2),
    )
    grad_input = (
        gemm("base dx", t, n_in, out, "bf16"),
        gemm("adapter dx", t, n_in, r, "bf16", kind="thin gemm"),
        *undrop,
        elementwise("add dx", t * n_in, 4, 2),
    )
    saved: list[Saved] = [((t, r), torch.bfloat16), ((adapter,), torch.bfloat16)]
    if settings.dropout:
        saved += [((t, n_in), torch.bfloat16), ((t, n_in), torch.uint8)]
    return Listing(forward, backward, grad_input, tuple(saved), True, scratch=4 * t * out)


def qlora(layer: Frozen, settings: Settings) -> Listing:
    """`lora` with a base of NF4, which is made 16-bit before each of its two GEMMs."""
    listing = lora(layer, settings)
    weights = layer.in_features * layer.out_features
    stored = sum(p.numel() * p.element_size() for p in layer.weights)
    unpack = Op("dequantise NF4", "dequantise", stored, 2 * weights, launches=2)
    return replace(
        listing,
        forward=(unpack, *listing.forward),
        grad_input=(unpack, *listing.grad_input),
        scratch=listing.scratch + 2 * weights,
    )


def _float8(
    name: str, t: int, n_in: int, out: int, weight: int, by_weight: bool = True
) -> tuple[list[Op], list[Op], list[Op]]:
    """Forward, dW and dx of one torchao Float8Linear with one dynamic scale a tensor.

    `weight`: bytes of an element of the weight; `by_weight`: whether dW is computed.
    """
    kind = "gemm" if weight == SIZE["bf16"] else "thin gemm"  # adapters are float32
    forward = [
        quantise(f"{name}: cast x", t, n_in),
        quantise(f"{name}: cast W", out, n_in, size=weight),
        gemm(f"{name}: GEMM", t, out, n_in, "fp8", kind=kind),
    ]
    grad_weight = [quantise(f"{name}: cast dO", t, out)]
    if by_weight:
        grad_weight += [
            transpose(f"{name}: transpose dO", t, out),
            transpose(f"{name}: transpose x", t, n_in),
            gemm(f"{name}: dW", out, n_in, t, "fp8", kind=kind),
        ]
    grad_input = [
        transpose(f"{name}: transpose W", out, n_in),
        gemm(f"{name}: dx", t, n_in, out, "fp8", kind=kind),
    ]
    return forward, grad_weight, grad_input


def torchao(layer: Frozen, settings: Settings, frozen_gradient: bool = False) -> Listing:
    """Base, A and B each a Float8Linear of torchao, one dynamic scale a tensor; weights 16-bit.

    As torchao/float8/float8_linear.py (commit 024fe94) does it: every Float8Linear casts its own
    operands and keeps the FP8 input and the FP8 weight until its backward pass. Casts are taken as
    compiled to one amax pass and one cast pass.

    Args:
        layer: the layer.
        settings: of the step.
        frozen_gradient: also count the gradient of the frozen weight, which the public autograd
            function of torchao computes without asking whether it is needed.
    """
    t, n_in, out, r = settings.total, layer.in_features, layer.out_features, layer.rank
    base = _float8("base", t, n_in, out, 2, frozen_gradient)
    a = _float8("A", t, n_in, r, 4)
    b = _float8("B", t, r, out, 4)
    forward = (
        *base[0],
        *a[0],
        *b[0],
        elementwise("times scaling", t * out, 2, 2),
        elementwise("add to base", t * out, 4, 2),
    )
    scale = elementwise("dO times scaling", t * out, 2, 2)
    backward = (scale, *base[1], *b[1], *b[2], *a[1])
    grad_input = (*base[2], *a[2], elementwise("add dx", t * n_in, 4, 2))
    fp8 = torch.uint8
    saved = (((t, n_in), fp8), ((t, n_in), fp8), ((t, r), fp8), ((out, n_in), fp8))
    wasted = 2 * n_in * out if frozen_gradient else 0
    return Listing(forward, backward, grad_input, saved, scratch=4 * t * out + wasted)


@dataclass
class Totals:
    """Sums over ops.

    Attributes:
        seconds: by kind, at a device's peaks.
        launches: kernels.
        moved: bytes read and written.
        flops: by precision.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    launches: int = 0
    moved: int = 0
    flops: dict[str, int] = field(default_factory=dict)

    def add(self, op: Op, times: int, device: Device) -> None:
        """Add an op that runs so many times."""
        self.seconds[op.kind] = self.seconds.get(op.kind, 0.0) + times * op.seconds(device)
        self.launches += times * op.launches
        self.moved += times * (op.read + op.written)
        self.flops[op.precision] = self.flops.get(op.precision, 0) + times * op.flops


def totals(ops: Mapping[Op, int], device: Device) -> Totals:
    """Sums over ops, given with how often each runs, at the peaks of a device."""
    result = Totals()
    for op, times in ops.items():
        result.add(op, times, device)
    return result
