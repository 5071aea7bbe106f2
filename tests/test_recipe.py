"""Settings: what is refused and how, the named ones, rows a layer, plain form for checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from falqon.errors import InputError
from falqon.recipe import (
    PRESETS,
    RECIPES,
    Fp8Recipe,
    MeldRecipe,
    UpdateRecipe,
    as_plain,
    fp8_recipe,
    update_recipe,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activations": "per_row"}, ["activations", "per_row", "per_token", "per_tensor"]),
        ({"gradients": None}, ["gradients", "None", "per_token"]),
        ({"scaling": "static"}, ["scaling", "static", "dynamic", "delayed"]),
        ({"weight_scale_rounding": "up"}, ["weight_scale_rounding", "up", "power_of_two", "none"]),
        ({"scale_rounding": "up"}, ["scale_rounding", "up", "power_of_two"]),
        ({"emulate": "bf16"}, ["emulate", "bf16", "fp8", "weights", "none"]),
        (
            {"emulate": "weights", "scaling": "delayed", "activations": "per_tensor"},
            ["delayed", "emulate 'weights'", "leave scaling out"],
        ),
        ({"amax_history": 0}, ["amax_history", "0", "at least 1"]),
        ({"amax_history": 2.5}, ["amax_history", "2.5", "whole number"]),
        ({"amax_history": True}, ["amax_history", "True"]),
        ({"scaling": "delayed"}, ["delayed", "per_tensor"]),
        ({"scaling": "delayed", "activations": "per_tensor"}, ["delayed", "gradients"]),
        ({"scaling": "delayed", "gradients": "per_tensor"}, ["delayed", "activations"]),
    ],
)
def test_fp8_recipe_refuses(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        Fp8Recipe(**changes)
    assert all(word in str(error.value) for word in words)


def test_delayed_scaling_takes_per_tensor_scales() -> None:
    recipe = Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed")
    assert recipe.scaling == "delayed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, ["rank", "0", "at least 1"]),
        ({"rank": -3}, ["rank", "-3"]),
        ({"rank": 8.0}, ["rank", "8.0", "whole"]),
        ({"rank": True}, ["rank", "True"]),
        ({"svd": "fast"}, ["svd", "fast", "randomized", "full"]),
        ({"oversampling": -1}, ["oversampling", "-1"]),
        ({"power_iterations": -1}, ["power_iterations", "-1"]),
        ({"include": ()}, ["include", "empty"]),
        ({"include": "*.q_proj"}, ["include", "list"]),
        ({"exclude": "*lm_head"}, ["exclude", "list"]),
    ],
)
def test_meld_recipe_refuses(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        MeldRecipe(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, ["rows", "0"]),
        ({"rows": -1}, ["rows", "-1"]),
        ({"rows": 0.0}, ["rows", "0.0"]),
        ({"rows": -0.5}, ["rows", "-0.5"]),
        ({"rows": 1.0}, ["rows", "1.0", "'all'"]),
        ({"rows": 2.5}, ["rows", "2.5"]),
        ({"rows": float("nan")}, ["rows", "nan"]),
        ({"rows": float("inf")}, ["rows", "inf"]),
        ({"rows": True}, ["rows", "True"]),
        ({"rows": None}, ["rows", "None"]),
        ({"rows": "half"}, ["rows", "half", "rank", "all"]),
        ({"rounding": "up"}, ["rounding", "up", "nearest", "stochastic"]),
        ({"unselected": "drop"}, ["unselected", "drop", "keep", "clear"]),
    ],
)
def test_update_recipe_refuses(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        UpdateRecipe(**{"preset": "x", "rows": 1, **changes})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [  # of a layer of 10 rows and of one of 3, both of rank 4
        (1, (1, 1)),
        (10, (10, 3)),
        (7, (7, 3)),
        (5.0, (5, 3)),
        ("rank", (4, 3)),
        ("all", (10, 3)),
        (0.5, (5, 2)),
        (0.001, (1, 1)),
        (0.999, (10, 3)),
    ],
)
def test_rows_of(rows: int | float | str, expected: tuple[int, int]) -> None:
    recipe = UpdateRecipe(preset="x", rows=rows)
    assert (recipe.rows_of(10, 4), recipe.rows_of(3, 4)) == expected


def test_whole_float_of_rows_becomes_a_number() -> None:
    assert isinstance(UpdateRecipe(preset="x", rows=5.0).rows, int)


def test_named_fp8_recipes() -> None:
    assert set(RECIPES) == {"default", "paper", "weights", "none"}
    assert fp8_recipe("default") == Fp8Recipe()
    paper = fp8_recipe("paper")
    assert (paper.activations, paper.gradients, paper.scaling) == ("per_tensor",) * 2 + ("dynamic",)
    assert (paper.weight_scale_rounding, paper.scale_rounding) == ("none", "none")
    assert fp8_recipe("none").emulate == "none"
    own = Fp8Recipe(amax_history=3)
    assert fp8_recipe(own) is own
    with pytest.raises(InputError, match="unknown FP8 recipe 'fast'; choose one of default, paper"):
        fp8_recipe("fast")


def test_fp8_recipe_from_fields() -> None:
    assert fp8_recipe({}) == Fp8Recipe()
    assert fp8_recipe({"gradients": "per_tensor"}) == Fp8Recipe(gradients="per_tensor")
    fields = {"base": "paper", "scaling": "delayed"}
    assert fp8_recipe(fields) == replace(RECIPES["paper"], scaling="delayed")
    assert fields == {"base": "paper", "scaling": "delayed"}  # not used up
    with pytest.raises(InputError, match="unknown key 'scale' in the FP8 recipe; it has base, act"):
        fp8_recipe({"scale": 1})
    with pytest.raises(InputError, match="unknown FP8 recipe 'fast'"):
        fp8_recipe({"base": "fast"})
    with pytest.raises(InputError, match="amax_history is 0"):
        fp8_recipe({"amax_history": 0})


def test_update_presets() -> None:
    assert PRESETS["paper"] == UpdateRecipe("paper", rows=10, unselected="keep", rounding="nearest")
    assert PRESETS["released"] == UpdateRecipe("released", rows="rank", unselected="clear")
    assert update_recipe("paper") is not None
    assert update_recipe("paper").rows == 10
    changed = update_recipe("released", 3, rounding="stochastic", seed=7)
    assert changed == UpdateRecipe("released", 3, unselected="clear", rounding="stochastic", seed=7)
    with pytest.raises(InputError, match="unknown update preset 'best'; choose one of anchored"):
        update_recipe("best")
    with pytest.raises(InputError, match="rows is -2"):
        update_recipe("paper", -2)


def test_recipes_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Fp8Recipe().emulate = "none"  # type: ignore[misc]


@pytest.mark.parametrize(
    "recipe",
    [Fp8Recipe(amax_history=4), MeldRecipe(rank=3, exclude=()), update_recipe("paper", 0.25)],
    ids=lambda r: type(r).__name__,
)
def test_plain_form_survives_a_safe_checkpoint(
    recipe: Fp8Recipe | MeldRecipe | UpdateRecipe, tmp_path: Path
) -> None:
    torch.save(as_plain(recipe), tmp_path / "recipe.pt")
    loaded = torch.load(tmp_path / "recipe.pt", weights_only=True)
    assert loaded == as_plain(recipe)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.items()}
    assert type(recipe)(**fields) == recipe
