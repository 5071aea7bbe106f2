"""What of a learned change is left when it is rounded to FP8, by the way of rounding.

    python -m benchmarks.rounding --data alpaca.json --steps 60 --rate 1e-3

One training with the policy `live` gives each layer a change `C = T A` of its weight W. Then all of
`W + C` is rounded in several ways, from the same weights, and of the error `E = Q(W + C) - (W + C)`
printed are, over all layers (sums of squares, roots of their ratios):

    landed       length of `Q(W + C) - W` along C, over the length of C, counted in A's row space
    in A         E in the row space of A, over C: what of the change itself is wrong
    weights      E, over C
    outputs      E x, over C x, for the layer's inputs x on training examples, of unit length
    flipped      codes that differ from those of W rounded to nearest
    loss, KL     held-out loss with 16-bit inputs; divergence of its predictions from those of W + C

The ways: to nearest; stochastic; derived from the codes of W instead of W (`written: codes`); and
compensated (`falqon.kernels.compensated`) with the second moment of the inputs, with `A^T A` alone,
and with the sum of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.learning import Study, add_study_arguments, dequantized, parse_method
from falqon.errors import InputError
from falqon.fp8 import E4M3, dequantize
from falqon.kernels import Origin, RowWrite, compensation
from falqon.kernels.row_update import row_updates
from falqon.linear import MeldedLinear
from falqon.moments import InputMoments
from falqon.precision import FalqonPrecision
from lit_modules.loss import MODEL_INPUTS

WAYS = ("nearest", "stochastic", "codes", "compensated", "compensated, A", "compensated, both")


class Trained(NamedTuple):
    """A layer after the training.

    Attributes:
        layer: with the codes of W rounded to nearest.
        weight: W, floating [out, in].
        total: T, float32 [out, r].
        moment: second moment of the inputs, float32 [in, in].
    """

    layer: MeldedLinear
    weight: Tensor
    total: Tensor
    moment: Tensor


@dataclass
class Sums:
    """Sums of squares and products over layers; see the module."""

    change: float = 0.0
    landed: float = 0.0
    in_a: float = 0.0
    weights: float = 0.0
    outputs: float = 0.0
    change_outputs: float = 0.0
    flipped: float = 0.0
    codes: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, trained: Trained, before: Tensor, after: Tensor) -> None:
        """Count one layer whose codes [out + r, in] were `before` and are `after`."""
        layer, out = trained.layer, trained.layer.out_features
        adapter = layer.dequantized_adapter().double()
        weight, change = trained.weight.double(), trained.total.double() @ adapter
        value = dequantize(after[:out], layer.scale, E4M3, torch.float32).double()
        error = value - weight - change
        basis = torch.linalg.qr(adapter.t()).Q  # [in, r]
        moment = trained.moment.double()
        self.change += float(change.square().sum())
        self.landed += float((((value - weight) @ basis) * (change @ basis)).sum())
        self.in_a += float((error @ basis).square().sum())
        self.weights += float(error.square().sum())
        self.outputs += float(((error @ moment) * error).sum())
        self.change_outputs += float(((change @ moment) * change).sum())
        self.flipped += int((before[:out] != after[:out]).sum())
        self.codes += out * before.shape[1]
        self.values[name] = after

    def cells(self) -> list[str]:
        """For a line of the table."""
        ratios = (
            self.landed / self.change,
            (self.in_a / self.change) ** 0.5,
            (self.weights / self.change) ** 0.5,
            (self.outputs / self.change_outputs) ** 0.5,
        )
        return [*(f"{ratio:.3f}" for ratio in ratios), f"{self.flipped / self.codes:.1%}"]


def train(study: Study, args: argparse.Namespace) -> tuple[nn.Module, FalqonPrecision]:
    """A model after the training, with what it learned in T and B."""
    method = parse_method("live:adapter=svd_error", (args.rate,), ())
    model, plugin = study.prepare(method, args.seed)
    assert plugin is not None
    study.train(model, plugin, method, args.rate, args.seed, lambda step: None)
    return model, plugin


def collect(study: Study, model: nn.Module, plugin: FalqonPrecision) -> dict[str, Trained]:
    """W, T and the second moments; afterwards the model is W, rounded to nearest."""
    assert plugin.proxy_update is not None
    with InputMoments(plugin.layers) as moments:
        study.calibrate(model, plugin)
    found = {}
    for name, layer in plugin.layers.items():
        state = plugin.proxy_update.states[name]
        assert state.original is not None and state.applied is not None
        total = state.applied.to(layer.B.device) + layer.pending()
        weight = state.original.to(layer.B.device)
        found[name] = Trained(layer, weight, total, moments.moment(name))
        layer.B.data.zero_()
        layer.live = False
        blank = Origin(weight, torch.zeros_like(total))
        # A row whose change is zero is left alone: one too small to change anything is not.
        tiny = torch.full_like(total, 1e-30)
        row_updates([RowWrite(layer.codes.data, layer.scale, None, tiny, 0, blank)])
    return found


def rounded(way: str, index: int, trained: Trained) -> Tensor:
    """Codes [out + r, in] of a layer's W + C."""
    layer, weight, total, moment = trained
    codes = layer.codes.detach().clone()
    origin, given = Origin(weight, total), None
    if way == "codes":
        origin = Origin(codes[: layer.out_features].clone(), total)
    elif way.startswith("compensated"):
        adapter = layer.dequantized_adapter()
        of_a = adapter.t() @ adapter
        of_a *= moment.trace() / of_a.trace()
        given = compensation(
            {"compensated": moment, "compensated, A": of_a}.get(way, moment + of_a)
        )
    change = torch.where(total == 0, 1e-30, total)  # all rows are written
    write = RowWrite(codes, layer.scale, None, change, index, origin, None, given)
    row_updates([write], "stochastic" if way == "stochastic" else "nearest")
    return codes


@torch.no_grad()
def predictions(study: Study, model: nn.Module) -> Iterator[Tensor]:
    """Log probabilities of each held-out batch's supervised positions, [n, vocabulary]."""
    model.eval()
    for batch in study.validation:
        mask = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
        inputs = {k: v.to(study.args.device) for k, v in batch.items() if k in MODEL_INPUTS}
        yield model(**inputs, use_cache=False).logits[mask].float().log_softmax(dim=-1)


def divergence(study: Study, exact: nn.Module, model: nn.Module) -> float:
    """Mean KL of a model's predictions from the exact one's, nats a token."""
    total, count = 0.0, 0
    pairs = zip(predictions(study, exact), predictions(study, model), strict=True)
    for wanted, found in pairs:
        total += float((wanted.exp() * (wanted - found)).sum())
        count += len(wanted)
    return total / count


def exact_model(study: Study, plugin: FalqonPrecision, trained: dict[str, Trained]) -> nn.Module:
    """The base with W + C, in its own dtype."""
    model = dequantized(study.base, plugin)
    for name, (layer, weight, total, _) in trained.items():
        linear: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        linear.data = (weight.float() + total @ layer.dequantized_adapter()).to(linear.dtype)
    return model


def table(study: Study, model: nn.Module, plugin: FalqonPrecision) -> list[str]:
    """Lines of Markdown."""
    trained = collect(study, model, plugin)
    exact = exact_model(study, plugin, trained)
    lines = [
        "| rounding | landed | in A | weights | outputs | flipped | loss | KL |",
        "|---|---|---|---|---|---|---|---|",
        f"| none (bfloat16) | | | | | | {study.loss(exact):.4f} | |",
    ]
    start = {name: part.layer.codes.detach().clone() for name, part in trained.items()}
    for way in WAYS:
        sums = Sums()
        for index, (name, part) in enumerate(trained.items()):
            sums.add(name, part, start[name], rounded(way, index, part))
        for name, part in trained.items():
            part.layer.codes.data.copy_(sums.values[name])
        served = dequantized(study.base, plugin)
        for name, part in trained.items():
            part.layer.codes.data.copy_(start[name])
        ends = (f"{study.loss(served):.4f}", f"{divergence(study, exact, served):.4f}")
        lines.append("| " + " | ".join([way, *sums.cells(), *ends]) + " |")
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Train, round, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_study_arguments(parser)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        study = Study(args)
        lines = table(study, *train(study, args))
    except InputError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
