"""From nn.Linear to MeldedLinear: SVD initialisation and the walk over a model (paper Alg. 1)."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, all_finite, compute_scale, dequantize, largest, quantize
from falqon.linear import MeldedLinear
from falqon.recipe import Adapter, Fp8Recipe, MeldRecipe
from falqon.svd import SHARED, one_thread, single_threads, truncated_svd

_AT_ONCE = 8  # layers of up to `SHARED` weights that are melded at a time, if there are threads


@dataclass(frozen=True)
class MeldedInfo:
    """What melding did to one layer.

    Attributes:
        out_features, in_features: shape of its weight.
        captured: share of the squared norm of the quantisation error (of the weight, if A is from
            that) which the rank-r adapter holds; 0 for a random A.
    """

    out_features: int
    in_features: int
    captured: float


@dataclass
class MeldReport:
    """What `meld` converted and what it did not.

    Attributes:
        converted: by full module name.
        skipped: reason by full module name, for every linear layer that was left alone.
        adapter: where A comes from, see `MeldRecipe`.
        grouped: layers that run as one, by full name of the module that has them.
        not_grouped: reason by full name, for every block of a known family that was left alone.
        bytes_before, bytes_after: of the converted layers' weights; after includes scales and A,
            not B.
    """

    converted: dict[str, MeldedInfo] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    adapter: Adapter = "svd_weight"
    grouped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    not_grouped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        if not self.converted:
            return "melded: nothing"
        captured = sum(i.captured for i in self.converted.values()) / len(self.converted)
        adapters = {
            "svd_error": f"the adapters hold {captured:.1%} of the quantisation error",
            "svd_weight": f"the adapters hold {captured:.1%} of the weights",
            "kaiming": "the adapters are random",
        }[self.adapter]
        lines = [
            f"melded {len(self.converted)} linear layers to FP8: "
            f"{self.bytes_before / 2**20:.1f} MiB of weights became "
            f"{self.bytes_after / 2**20:.1f} MiB; {adapters}"
        ]
        if self.grouped:
            kinds = sorted({"/".join(members) for members in self.grouped.values()})
            lines.append(f"run as one: {', '.join(kinds)}, {len(self.grouped)} groups")
        lines += [f"left alone: {fqn} ({reason})" for fqn, reason in self.skipped.items()]
        lines += [f"not grouped: {fqn} ({reason})" for fqn, reason in self.not_grouped.items()]
        return "\n".join(lines)


def _svd_adapter(matrix: Tensor, recipe: MeldRecipe, seed: int) -> tuple[Tensor, float]:
    """`sqrt(S) V^T` float32 [r, in], and the share of the squared norm that the rank holds."""
    values, right = truncated_svd(matrix, recipe, seed)
    adapter = matrix.new_zeros(recipe.rank, matrix.shape[1])
    adapter[: len(values)] = values.sqrt()[:, None] * right
    with one_thread():  # as many sums as there are threads would be others
        norm = matrix.square().sum()
    return adapter, float(values.square().sum() / norm) if norm > 0 else 1.0


def _kaiming_adapter(weight: Tensor, recipe: MeldRecipe, seed: int) -> Tensor:
    """Uniform in +-1/sqrt(in), as LoRA's A is; drawn on the CPU to be the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    bound = weight.shape[1] ** -0.5
    random = torch.rand(recipe.rank, weight.shape[1], generator=generator, device="cpu")
    return ((2 * random - 1) * bound).to(weight.device)


@torch.no_grad()
def meld_weight(
    weight: Tensor, fp8: Fp8Recipe, recipe: MeldRecipe, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Merged codes of one weight: `[Q(W); Q(A)]` with a shared scale (paper eq. 6 to 9, Alg. 1).

    A is what `recipe.adapter` says: `sqrt(S) V^T` of the rank-r SVD of W, or of the quantisation
    error W - DQ(Q(W)) (the paper's); rows beyond the rank are zero.

    Args:
        weight: [out, in], floating.
        fp8: FP8 recipe; with `emulate: none` W and A stay float32 and the scale is 1.
        recipe: rank and SVD settings.
        seed: of the randomised SVD.

    Returns:
        codes uint8 (or float32) [out + r, in]; scale float32 [1]; share of the squared norm of the
        decomposed matrix that the adapter holds (0 for `kaiming`).
    """
    weight = weight.detach().to(torch.float32)
    rounding = fp8.weight_scale_rounding
    limit = largest(weight)
    scale = compute_scale(limit, E4M3, rounding).reshape(1)
    codes, _ = quantize(weight, E4M3, rounding=rounding, scale=scale)
    if recipe.adapter == "svd_error":
        adapter, captured = _svd_adapter(weight - dequantize(codes, scale, E4M3), recipe, seed)
        if (reach := largest(adapter)) > limit:  # A shares the scale, so it must fit as well
            limit = reach
            scale = compute_scale(limit, E4M3, rounding).reshape(1)
            codes, _ = quantize(weight, E4M3, rounding=rounding, scale=scale)
            adapter, captured = _svd_adapter(weight - dequantize(codes, scale, E4M3), recipe, seed)
    else:
        if recipe.adapter == "svd_weight":
            adapter, captured = _svd_adapter(weight, recipe, seed)
        else:
            adapter, captured = _kaiming_adapter(weight, recipe, seed), 0.0
        # It shares the weight's scale, and there has to be large enough to have digits.
        if limit > 0 and (reach := largest(adapter)) > 0:
            adapter *= reach.clamp(limit / 256, limit) / reach
    if fp8.emulate == "none":
        return torch.cat([weight, adapter]), torch.ones_like(scale), captured
    adapter_codes, _ = quantize(adapter, E4M3, rounding=rounding, scale=scale)
    return torch.cat([codes, adapter_codes]), scale, captured


@torch.no_grad()
def meld_linear(
    linear: nn.Linear,
    fp8: Fp8Recipe | None = None,
    recipe: MeldRecipe | None = None,
    *,
    name: str = "linear",
    device: torch.device | str | None = None,
) -> tuple[MeldedLinear, float]:
    """Meld one linear layer.

    Args:
        linear: the layer; not changed.
        fp8, recipe: settings, the defaults if None.
        name: full module name, for errors and the seed of the SVD.
        device: where to compute and to put the result; the layer's own if None.

    Returns:
        The melded layer and what its adapter holds, see `meld_weight`.

    Raises:
        InputError: for NaN or infinity in the weight, a weight without data, or a rank larger than
            in_features.
    """
    fp8, recipe = fp8 or Fp8Recipe(), recipe or MeldRecipe()
    weight = linear.weight
    if weight.is_meta:
        raise InputError(f"{name}.weight has no data (meta device); load the weights first.")
    _check_rank(name, linear, recipe)
    target = torch.device(device) if device is not None else weight.device
    weight = weight.detach().to(target)
    if not all_finite(weight):
        raise InputError(
            f"{name}.weight holds NaN or infinity; the checkpoint is damaged or was saved from a "
            "diverged run. Use another checkpoint, or exclude that layer."
        )
    seed = zlib.crc32(name.encode()) ^ recipe.seed
    codes, scale, captured = meld_weight(weight, fp8, recipe, seed)
    melded = MeldedLinear(
        linear.in_features,
        linear.out_features,
        recipe.rank,
        bias=linear.bias is not None,
        recipe=fp8,
        device=target,
        lora_scaling=recipe.lora_scaling,
    )
    melded.codes.data, melded.scale.data = codes, scale
    if linear.bias is not None:
        melded.bias = nn.Parameter(linear.bias.detach().to(target), requires_grad=False)
    melded.train(linear.training)
    return melded, captured


def melded_layers(module: nn.Module) -> dict[str, MeldedLinear]:
    """All melded layers of a module by full name, in the order of `named_modules`."""
    return {n: m for n, m in module.named_modules() if isinstance(m, MeldedLinear)}


def meld(
    model: nn.Module,
    fp8: Fp8Recipe | None = None,
    recipe: MeldRecipe | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[str, Tensor], None] | None = None,
    store: torch.device | str | None = None,
) -> MeldReport:
    """Meld the linear layers of a model in place, in turn; small ones on a CPU up to eight at once.

    Every original weight is dropped as soon as its layer is melded, so what is added to the model's
    memory is one layer's worth, or that of eight small ones. Layers that are melded already are
    left as they are. Everything but the proxy buffers B is frozen. Then blocks of known families
    are swapped for ones that run their melded layers in groups, unless the recipe says not to.

    Args:
        model: any module, for example a Hugging Face causal LM.
        fp8, recipe: settings, the defaults if None.
        device: where to compute and to put melded layers; each layer's own if None.
        progress: called with the layer's name, its number from 1, and how many there are.
        keep: called with the layer's name and its original weight [out, in], before it is dropped.
        store: where melded layers are put in the end; where they were computed if None.

    Returns:
        What was converted, and what was not and why.

    Raises:
        InputError: if no layer is left to meld, and as `meld_linear` does; layers before the one
            at fault are melded by then.
    """
    fp8, recipe = fp8 or Fp8Recipe(), recipe or MeldRecipe()
    if isinstance(model, (nn.Linear, MeldedLinear)):
        raise InputError("a single layer cannot be replaced in place; use falqon.meld_linear.")
    report = MeldReport(adapter=recipe.adapter)
    targets, report.skipped = plan(model, recipe)

    def melded_one(name: str) -> tuple[MeldedLinear, float]:
        return meld_linear(_linear(model, name), fp8, recipe, name=name, device=device)

    ahead = _at_once(model, targets, device)
    with closing(_in_turn(melded_one, targets, ahead)) as results:
        for number, (name, (melded, captured)) in enumerate(results, 1):
            linear = _linear(model, name)
            if store is not None:
                melded = melded.to(store)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, melded)
            if keep is not None:
                keep(name, linear.weight.detach())
            report.converted[name] = MeldedInfo(linear.out_features, linear.in_features, captured)
            report.bytes_before += linear.weight.numel() * linear.weight.element_size()
            report.bytes_after += melded.codes.numel() * melded.codes.element_size() + 4
            del linear, melded
            if progress is not None:
                progress(name, number, len(targets))
    proxies = {id(layer.B) for layer in melded_layers(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in proxies)
    if recipe.groups:
        _group(model, report)
    return report


_Result = TypeVar("_Result")


def _in_turn(
    function: Callable[[str], _Result], names: list[str], ahead: int
) -> Generator[tuple[str, _Result]]:
    """Names and what the function makes of them, in their order; some are begun ahead."""
    if ahead == 1:
        yield from ((name, function(name)) for name in names)
        return
    with one_thread(), single_threads(ahead) as pool:
        begun: deque[Future[_Result]] = deque()
        waiting = iter(names)
        try:
            for name in names:
                begun += [pool.submit(function, n) for n in islice(waiting, ahead - len(begun))]
                yield name, begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _at_once(model: nn.Module, names: list[str], device: torch.device | str | None) -> int:
    """How many layers to meld at a time: 1 if one has threads enough for itself, or a GPU."""
    weights = [_linear(model, name).weight for name in names]
    devices = {torch.device(device or weight.device).type for weight in weights}
    largest_one = max((weight.numel() for weight in weights), default=0)
    if devices != {"cpu"} or largest_one > 2 * SHARED:
        return 1
    return min(torch.get_num_threads(), _AT_ONCE, _AT_ONCE * SHARED // largest_one)


def _group(model: nn.Module, report: MeldReport) -> None:
    # Not at the top: melding itself knows no transformers, and is to work without its model code.
    try:
        from falqon.blocks import group_blocks
    except ImportError as error:
        report.not_grouped["model"] = f"this version of transformers lacks what is needed: {error}"
        return
    report.grouped, report.not_grouped = group_blocks(model)


def targets(model: nn.Module, recipe: MeldRecipe) -> dict[str, nn.Linear]:
    """The linear layers that `meld` would convert, by full name."""
    return {n: _linear(model, n) for n, reason in _reasons(model, recipe) if reason is None}


def plan(model: nn.Module, recipe: MeldRecipe) -> tuple[list[str], dict[str, str]]:
    """What `meld` is going to do, checked before the first layer is touched.

    Args:
        model: its weights are not looked at; they may be on the meta device.
        recipe: rank and patterns.

    Returns:
        Names of the layers to meld; reasons by name of those to leave alone.

    Raises:
        InputError: if no layer is left to meld and none is melded, or for a rank that is too large.
    """
    names: list[str] = []
    skipped: dict[str, str] = {}
    for name, reason in _reasons(model, recipe):
        if reason is None:
            names.append(name)
        else:
            skipped[name] = reason
    if not names and not melded_layers(model):
        reasons = "; ".join(f"{n}: {r}" for n, r in skipped.items()) or "it has no nn.Linear"
        raise InputError(f"no layer of {type(model).__name__} can be melded ({reasons}).")
    for name in names:
        _check_rank(name, _linear(model, name), recipe)
    return names, skipped


def _reasons(model: nn.Module, recipe: MeldRecipe) -> Iterator[tuple[str, str | None]]:
    """Every linear layer's name with the reason to leave it alone, or None to meld it."""
    heads = set() if recipe.output_embedding else _output_embeddings(model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            others = [n for n in owners[id(module.weight)] if n != f"{name}.weight"]
            yield name, _reason_to_skip(name, module, others, id(module) in heads, recipe)


def _output_embeddings(model: nn.Module) -> set[int]:
    """Ids of the output embeddings: what Hugging Face models say, or modules named lm_head."""
    heads = set()
    for name, module in model.named_modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if head is not None:
            heads.add(id(head))
        if name.rpartition(".")[2] == "lm_head":
            heads.add(id(module))
    return heads


def _reason_to_skip(
    name: str, linear: nn.Linear, tied_to: list[str], is_head: bool, recipe: MeldRecipe
) -> str | None:
    pattern = next((p for p in recipe.exclude if fnmatchcase(name, p)), None)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    if not any(fnmatchcase(name, p) for p in recipe.include):
        return "not included"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, not a plain nn.Linear"
    if is_head:
        return "the output embedding"
    return f"its weight is tied to {tied_to[0]}" if tied_to else None


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _check_rank(name: str, linear: nn.Linear, recipe: MeldRecipe) -> None:
    if recipe.rank > linear.in_features:
        raise InputError(
            f"rank {recipe.rank} is larger than the {linear.in_features} input features of {name}; "
            f"use at most {linear.in_features}, or exclude that layer."
        )
