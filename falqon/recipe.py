"""Settings of the method: frozen, validated, and a few named ones.

Three questions, one class each: how tensors are rounded to FP8 (`Fp8Recipe`), how a linear layer
becomes a melded one (`MeldRecipe`), and how what was learned enters the FP8 codes
(`UpdateRecipe`). All fields are plain values, so a recipe can be written in YAML, stored in a
checkpoint and compared on resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from falqon.errors import InputError

Granularity = Literal["per_token", "per_tensor"]
ScaleRounding = Literal["power_of_two", "none"]
Rounding = Literal["nearest", "stochastic"]
FlushRounding = Literal["same", "compensated"]
Adapter = Literal["svd_error", "svd_weight", "kaiming"]
Selection = Literal["l1", "norm", "flips"]
Written = Literal["drop", "project", "codes", "weights"]


def _one_of(owner: str, key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"{owner}.{key} is {value!r}; choose one of {', '.join(map(str, choices))}."
        )


@dataclass(frozen=True)
class Fp8Recipe:
    """How weights, activations and gradients are rounded to FP8 (paper sec. 4, notation of eq. 3).

    Weights and activations are E4M3, output gradients E5M2, scales FP32.

    Attributes:
        activations: one scale a row of the input (`per_token`) or one for all of it
            (`per_tensor`, the paper's).
        gradients: the same for the gradient of the output.
        scaling: `dynamic` takes the amax of the tensor at hand. `delayed` takes the largest amax of
            the last `amax_history` optimizer steps, so that one pass over the tensor can quantise;
            it needs `per_tensor` scales.
        amax_history: length of the delayed history, in optimizer steps.
        weight_scale_rounding: `power_of_two` rounds the weight scale down to a power of two, which
            is exact in bf16 and lets servers fuse layers without touching a code; `none` is the
            paper's.
        scale_rounding: the same for the scales of activations and gradients.
        emulate: `fp8`; `weights` to round weights alone, so that inputs and gradients keep their 16
            bits, for devices without FP8 units, which decode the codes anyway; or `none` to compute
            without any FP8 rounding (weights are then kept in float32): the same adapters in high
            precision, to compare with.

    Raises:
        InputError: for a value that is not one of those above.
    """

    activations: Granularity = "per_token"
    gradients: Granularity = "per_token"
    scaling: Literal["dynamic", "delayed"] = "dynamic"
    amax_history: int = 16
    weight_scale_rounding: ScaleRounding = "power_of_two"
    scale_rounding: ScaleRounding = "power_of_two"
    emulate: Literal["fp8", "weights", "none"] = "fp8"

    def __post_init__(self) -> None:
        name = type(self).__name__
        _one_of(name, "activations", self.activations, get_args(Granularity))
        _one_of(name, "gradients", self.gradients, get_args(Granularity))
        _one_of(name, "scaling", self.scaling, ("dynamic", "delayed"))
        _one_of(name, "weight_scale_rounding", self.weight_scale_rounding, get_args(ScaleRounding))
        _one_of(name, "scale_rounding", self.scale_rounding, get_args(ScaleRounding))
        _one_of(name, "emulate", self.emulate, ("fp8", "weights", "none"))
        steps = self.amax_history
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(
                f"{name}.amax_history is {steps!r}; it must be a whole number of at least 1."
            )
        if self.scaling == "delayed" and self.emulate == "weights":
            raise InputError(
                f"{name}.scaling 'delayed' is about scales of activations and gradients, and with "
                "emulate 'weights' these are not rounded: leave scaling out."
            )
        if self.scaling == "delayed" and (self.activations, self.gradients) != (
            "per_tensor",
            "per_tensor",
        ):
            raise InputError(
                f"{name}.scaling 'delayed' keeps one amax a tensor and step: set activations and "
                "gradients to 'per_tensor', or scaling to 'dynamic' (per-token scales need only "
                "one pass anyway)."
            )


RECIPES: dict[str, Fp8Recipe] = {
    "default": Fp8Recipe(),
    "paper": Fp8Recipe(
        activations="per_tensor",
        gradients="per_tensor",
        weight_scale_rounding="none",
        scale_rounding="none",
    ),
    "weights": Fp8Recipe(emulate="weights"),
    "none": Fp8Recipe(emulate="none"),
}
"""Named FP8 recipes: `default`, `paper` (arXiv:2510.24061), `weights` (inputs and gradients stay in
16 bits), and `none` (no FP8 rounding)."""


def fp8_recipe(recipe: str | Mapping[str, Any] | Fp8Recipe) -> Fp8Recipe:
    """Make a recipe from a name, or from fields that differ from a named one.

    Args:
        recipe: a name in `RECIPES`; fields of `Fp8Recipe`, with `base` naming the recipe they
            change (`default` if left out); or a recipe, returned as it is.

    Raises:
        InputError: for an unknown name or field, or a value that is not allowed.
    """
    if isinstance(recipe, Fp8Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        changes = dict(recipe)
        base = fp8_recipe(changes.pop("base", "default"))
        known = {f.name for f in fields(Fp8Recipe)}
        for key in changes:
            if key not in known:
                raise InputError(
                    f"unknown key {key!r} in the FP8 recipe; it has base, "
                    f"{', '.join(sorted(known))}."
                )
        return replace(base, **changes)
    if recipe not in RECIPES:
        raise InputError(f"unknown FP8 recipe {recipe!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]


@dataclass(frozen=True)
class MeldRecipe:
    """How linear layers become melded layers (paper sec. 4.1, Alg. 1).

    Attributes:
        rank: adapter rank r.
        include: shell-style patterns of full module names to meld.
        exclude: patterns to leave alone.
        output_embedding: meld the output embedding (lm_head) as well, if it is included.
        adapter: where A comes from: `svd_weight`, the leading right singular vectors of the weight
            times the roots of their singular values; `svd_error`, the same of the quantisation
            error (the paper's); `kaiming`, uniform random numbers in +-1/sqrt(in), LoRA's. The
            first is several times longer than the others, and learning rates are as many times
            smaller. It and the last are scaled where the weight's FP8 scale, which A shares, is
            not made for their size.
        lora_alpha: as in LoRA: what B A changes in the weight is multiplied by lora_alpha / rank.
            None leaves it as it is, the paper's.
        svd: `randomized` (`falqon.svd.sketched_svd`; exact for weights that are small for it, see
            `falqon.svd.truncated_svd`) or `full`.
        oversampling: columns of the randomised SVD's sketch beyond the rank.
        power_iterations: products of the sketch with `D^T D`, up to four to a polynomial.
        seed: of its sketch and of `kaiming`.
        groups: in models of a known family, run the layers of an attention or MLP that share an
            input (q/k/v, gate/up) as one: see `falqon.blocks`. Names and weights are the same, and
            so is the forward pass; gradients of inputs are rounded once instead of once a layer.

    Raises:
        InputError: for a value out of range.
    """

    rank: int = 64
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    output_embedding: bool = False
    adapter: Adapter = "svd_weight"
    lora_alpha: float | None = None
    svd: Literal["randomized", "full"] = "randomized"
    oversampling: int = 16
    power_iterations: int = 12
    seed: int = 0
    groups: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank is {self.rank!r}; it must be a whole number of at least 1.")
        _one_of(name, "svd", self.svd, ("randomized", "full"))
        _one_of(name, "adapter", self.adapter, get_args(Adapter))
        alpha = self.lora_alpha
        if alpha is not None and (
            isinstance(alpha, bool)
            or not isinstance(alpha, (int, float))
            or not 0 < alpha < math.inf
        ):
            raise InputError(f"lora_alpha is {alpha!r}; it must be a positive number, or None.")
        for key in ("oversampling", "power_iterations"):
            if getattr(self, key) < 0:
                raise InputError(f"{name}.{key} is {getattr(self, key)}; it must not be negative.")
        for key in ("include", "exclude"):
            if isinstance(getattr(self, key), str):  # it would be read letter by letter
                raise InputError(f"{name}.{key} is one string; give a list of patterns.")
        if not isinstance(self.groups, bool):
            raise InputError(f"{name}.groups is {self.groups!r}; write true or false.")
        if not self.include:
            raise InputError(f"{name}.include is empty, so nothing would be melded; use ['*'].")

    @property
    def lora_scaling(self) -> float:
        """Factor of B A: `lora_alpha / rank`, 1 without lora_alpha."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank


@dataclass(frozen=True)
class UpdateRecipe:
    """How the proxy buffer B enters the FP8 codes after an optimizer step (paper sec. 4.3, eq. 15).

    A policy is a choice on each of a few independent questions; a preset is a name for choices.
    Row i's pending change is `B[i] A`: what the optimizer did to it since the row was last written.

    Attributes:
        preset: the name it was made from, for logs and checkpoints.
        rows: rows written in each layer and write: a number, `rank` (as many as the rank), `all`,
            or a fraction of the layer's rows in (0, 1), rounded up. Layers with fewer rows write
            all of them.
        select: which rows: those with the largest `l1` norm of B[i] (the paper's), the largest
            `norm` of B[i] A, or the most codes expected to flip (`flips`).
        max_age: write every row at least once in so many steps, by writing the longest unwritten
            ones in addition to `rows`; None for no such promise.
        threshold: leave a selected row alone if a smaller share of its codes is expected to flip.
        every: optimizer steps from one write to the next.
        unselected: rows that were not selected `keep` accumulating, or are cleared (`clear`).
        written: what becomes of the part of a written row's change that rounding did not let land.
            `drop`: lost (the paper's). `project`: its projection on the rows of A returns to B[i].
            `codes`: none is lost for good, the row is derived again from its original codes and all
            of its change so far, `Q(DQ(W0q[i]) + (sum of B[i]) A)`. `weights`: the same from the
            original weights, `Q(W0[i] + (sum of B[i]) A)`.
        live: the pending change takes part in forward and backward, `O + O_A B^T`.
        rounding: of the written codes.
        flush_rounding: of the codes that `flush` writes: the `same`, or `compensated`, so that
            errors cancel in the layers' outputs (see `falqon.kernels.compensated`). The latter
            looks at the inputs that training data gives the layers.
        calibration_rows: training examples that it looks at.
        calibration_memory: bytes of second moments that it may hold at once, one [in, in] float32
            matrix a layer. With fewer the examples are run through the model more often.
        seed: seed of stochastic rounding.

    Raises:
        InputError: for a value out of range.
    """

    preset: str
    rows: int | float | str
    select: Selection = "l1"
    max_age: int | None = None
    threshold: float = 0.0
    every: int = 1
    unselected: Literal["keep", "clear"] = "keep"
    written: Written = "drop"
    live: bool = False
    rounding: Rounding = "nearest"
    flush_rounding: FlushRounding = "same"
    calibration_rows: int = 96
    calibration_memory: int = 2 * 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        _one_of(name, "select", self.select, get_args(Selection))
        _one_of(name, "unselected", self.unselected, ("keep", "clear"))
        _one_of(name, "written", self.written, get_args(Written))
        if not isinstance(self.live, bool):
            raise InputError(f"{name}.live is {self.live!r}; write true or false.")
        _one_of(name, "rounding", self.rounding, get_args(Rounding))
        _one_of(name, "flush_rounding", self.flush_rounding, get_args(FlushRounding))
        for key, value in (
            ("every", self.every),
            ("max_age", self.max_age),
            ("calibration_rows", self.calibration_rows),
            ("calibration_memory", self.calibration_memory),
        ):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise InputError(f"{name}.{key} is {value!r}; use a whole number of at least 1.")
        if self.max_age is not None and self.max_age < self.every:
            raise InputError(
                f"{name}.max_age is {self.max_age}, but rows are written every {self.every} steps."
            )
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold <= 1:
            raise InputError(f"{name}.threshold is {self.threshold!r}; it is a share, 0 to 1.")
        if self.threshold and self.max_age is not None:
            raise InputError(
                f"{name}.threshold leaves rows unwritten and max_age promises to write them; set "
                "one of them."
            )
        if self.threshold and self.unselected == "clear":
            raise InputError(
                f"{name}.threshold keeps small changes until they are worth writing and unselected "
                "'clear' drops them; set one of them."
            )
        rows = self.rows
        help_text = "use a whole number of at least 1, 'rank', 'all', or a fraction"
        if isinstance(rows, str):
            _one_of(name, "rows", rows, ("rank", "all"))
        elif (
            isinstance(rows, bool)
            or not isinstance(rows, (int, float))
            or not math.isfinite(rows)
            or rows <= 0
        ):
            raise InputError(f"rows is {rows!r}, out of range; {help_text} between 0 and 1.")
        elif rows > 1 and rows != int(rows):
            raise InputError(f"rows is {rows!r}; {help_text} between 0 and 1.")
        elif isinstance(rows, float) and rows >= 1:
            # 1.0 could be meant as one row or as all of them.
            if rows == 1:
                raise InputError("rows is 1.0; write 1 for one row, or 'all' for every row.")
            object.__setattr__(self, "rows", int(rows))

    @property
    def keeps_originals(self) -> bool:
        """Written rows are derived from original codes or weights."""
        return self.written in ("codes", "weights")

    def rows_of(self, out_features: int, rank: int) -> int:
        """Number of rows to write in a layer of `out_features` rows and adapter rank `rank`."""
        if self.rows == "rank":
            return min(rank, out_features)
        if self.rows == "all":
            return out_features
        if isinstance(self.rows, float):
            return max(1, math.ceil(self.rows * out_features))
        return min(int(self.rows), out_features)


PRESETS: dict[str, UpdateRecipe] = {
    "paper": UpdateRecipe(preset="paper", rows=10),
    "released": UpdateRecipe(preset="released", rows="rank", unselected="clear"),
    "feedback": UpdateRecipe(preset="feedback", rows="rank", written="project"),
    "anchored": UpdateRecipe(preset="anchored", rows="rank", written="codes"),
    "master": UpdateRecipe(preset="master", rows="rank", written="weights"),
    "live": UpdateRecipe(preset="live", rows="rank", written="weights", live=True),
    "compensated": UpdateRecipe(
        preset="compensated",
        rows="rank",
        every=8,
        written="weights",
        live=True,
        flush_rounding="compensated",
    ),
}
"""Named update policies, described in docs/method.md. `paper` is the paper's rule, `released` that
of its published code."""


DEFAULT_PRESET = "compensated"
"""Policy of `FalqonPrecision`, and what a mapping without `preset` changes."""


def update_recipe(
    update: str | Mapping[str, Any] | UpdateRecipe,
    rows: int | float | str | None = None,
    **changes: Any,
) -> UpdateRecipe:
    """Make a policy from a preset's name, or from fields that differ from a preset.

    Args:
        update: a name in `PRESETS`; fields of `UpdateRecipe`, with `preset` naming the preset they
            change (`compensated` if left out); or a recipe.
        rows, changes: further fields to change, None leaves `rows` as it is.

    Raises:
        InputError: for an unknown preset or field, or a value out of range.
    """
    if rows is not None:
        changes["rows"] = rows
    if isinstance(update, UpdateRecipe):
        return replace(update, **changes)
    if isinstance(update, Mapping):
        fields_given = dict(update)
        known = {f.name for f in fields(UpdateRecipe)}
        for key in fields_given:
            if key not in known:
                raise InputError(
                    f"unknown key {key!r} in the update policy; it has {', '.join(sorted(known))}."
                )
        update = fields_given.pop("preset", DEFAULT_PRESET)
        changes = {**fields_given, **changes}
    if update not in PRESETS:
        raise InputError(
            f"unknown update preset {update!r}; choose one of {', '.join(sorted(PRESETS))}."
        )
    return replace(PRESETS[update], **changes)


def as_plain(recipe: Fp8Recipe | MeldRecipe | UpdateRecipe) -> dict[str, Any]:
    """The recipe as plain containers, for a checkpoint that loads with `weights_only=True`."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
