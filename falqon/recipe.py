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
        emulate: `fp8`, or `none` to compute without any FP8 rounding (weights are then kept in
            float32): the same adapters in high precision, to compare with.

    Raises:
        InputError: for a value that is not one of those above.
    """

    activations: Granularity = "per_token"
    gradients: Granularity = "per_token"
    scaling: Literal["dynamic", "delayed"] = "dynamic"
    amax_history: int = 16
    weight_scale_rounding: ScaleRounding = "power_of_two"
    scale_rounding: ScaleRounding = "power_of_two"
    emulate: Literal["fp8", "none"] = "fp8"

    def __post_init__(self) -> None:
        name = type(self).__name__
        _one_of(name, "activations", self.activations, get_args(Granularity))
        _one_of(name, "gradients", self.gradients, get_args(Granularity))
        _one_of(name, "scaling", self.scaling, ("dynamic", "delayed"))
        _one_of(name, "weight_scale_rounding", self.weight_scale_rounding, get_args(ScaleRounding))
        _one_of(name, "scale_rounding", self.scale_rounding, get_args(ScaleRounding))
        _one_of(name, "emulate", self.emulate, ("fp8", "none"))
        steps = self.amax_history
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(
                f"{name}.amax_history is {steps!r}; it must be a whole number of at least 1."
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
    "none": Fp8Recipe(emulate="none"),
}
"""Named FP8 recipes: `default`, `paper` (arXiv:2510.24061), and `none` (no FP8 rounding)."""


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
        svd: `randomized` (Halko et al., arXiv:0909.4061) or `full`.
        oversampling: extra sketch columns of the randomised SVD.
        power_iterations: power iterations of the randomised SVD.
        seed: seed of its sketch.

    Raises:
        InputError: for a value out of range.
    """

    rank: int = 64
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    output_embedding: bool = False
    svd: Literal["randomized", "full"] = "randomized"
    oversampling: int = 32
    power_iterations: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank is {self.rank!r}; it must be a whole number of at least 1.")
        _one_of(name, "svd", self.svd, ("randomized", "full"))
        for key in ("oversampling", "power_iterations"):
            if getattr(self, key) < 0:
                raise InputError(f"{name}.{key} is {getattr(self, key)}; it must not be negative.")
        for key in ("include", "exclude"):
            if isinstance(getattr(self, key), str):  # it would be read letter by letter
                raise InputError(f"{name}.{key} is one string; give a list of patterns.")
        if not self.include:
            raise InputError(f"{name}.include is empty, so nothing would be melded; use ['*'].")


@dataclass(frozen=True)
class UpdateRecipe:
    """How the proxy buffer B enters the FP8 codes after an optimizer step (paper sec. 4.3, eq. 15).

    Attributes:
        preset: the name it was made from, for logs and checkpoints.
        rows: rows written in each layer and step: a number, `rank` (as many as the rank), `all`,
            or a fraction of the layer's rows in (0, 1), rounded up. Layers with fewer rows write
            all of them.
        unselected: rows that were not selected `keep` accumulating, or are cleared (`clear`).
        rounding: of the written codes.
        seed: seed of stochastic rounding.

    Raises:
        InputError: for a value out of range.
    """

    preset: str
    rows: int | float | str
    unselected: Literal["keep", "clear"] = "keep"
    rounding: Rounding = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        _one_of(name, "unselected", self.unselected, ("keep", "clear"))
        _one_of(name, "rounding", self.rounding, get_args(Rounding))
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
}
"""Named update policies. `paper`: k rows are written, the others keep accumulating. `released`:
what the paper's published code does, r rows are written and all of B is cleared."""


def update_recipe(
    preset: str, rows: int | float | str | None = None, **changes: Any
) -> UpdateRecipe:
    """A named update policy, with its number of rows and other fields changed where given.

    Raises:
        InputError: for an unknown preset or a value out of range.
    """
    if preset not in PRESETS:
        raise InputError(
            f"unknown update preset {preset!r}; choose one of {', '.join(sorted(PRESETS))}."
        )
    if rows is not None:
        changes["rows"] = rows
    return replace(PRESETS[preset], **changes)


def as_plain(recipe: Fp8Recipe | MeldRecipe | UpdateRecipe) -> dict[str, Any]:
    """The recipe as plain containers, for a checkpoint that loads with `weights_only=True`."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
