"""Deltas: written, applied to the bytes of the direct export, loaded in turn, refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import Case
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from falqon import InputError, load_delta, melded_layers, unload_delta
from falqon.checkpoint.base import hash_base
from falqon.cli import main
from falqon.delta.codec import apply, encode
from falqon.export import export_model
from falqon.manifest import write_manifest
from falqon.premeld.run import premeld

# -- codec --------------------------------------------------------------------------------------


def flip(codes: Tensor, share: float, seed: int = 0) -> Tensor:
    """Codes of which a share is one up or down."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(codes.shape, generator=generator) < share
    up = torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8) * 2 - 1
    return torch.where(where, codes + up, codes)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.03, 0.17, 0.9, 1.0])
def test_a_change_comes_back_and_goes_away(share: float) -> None:
    before = torch.randint(0, 256, (96, 700), dtype=torch.uint8)
    after = flip(before, share)
    change = encode(before, after)
    differs = before != after
    assert (change.codes, change.rows) == (int(differs.sum()), int(differs.any(dim=1).sum()))
    codes = before.clone()
    apply(codes, change)
    assert torch.equal(codes, after)
    apply(codes, change, undo=True)
    assert torch.equal(codes, before)
    # Close to the entropy of whether and which way a code changes, up to what byte codes cost.
    p = min(max(share, 1e-9), 1 - 1e-9)
    bits = (-p * math.log2(p) - (1 - p) * math.log2(1 - p) + p) * before.numel()
    assert change.nbytes <= (1.3 if share < 0.2 else 1.6) * bits / 8 + 200


def test_whole_rows_are_stored_as_rows() -> None:
    before = torch.randint(0, 256, (400, 300), dtype=torch.uint8)
    after = before.clone()
    after[[0, 7, 399]] = torch.randint(0, 256, (3, 300), dtype=torch.uint8)
    change = encode(before, after)
    assert change.by == "rows" and change.nbytes < 1100
    codes = before.clone()
    apply(codes, change)
    assert torch.equal(codes, after)
    assert encode(before, flip(before, 0.02)).by == "codes"
    with pytest.raises(ValueError, match="does not fit"):
        apply(before[:300], change)


# -- export and apply ---------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def meld_command(case: Case, out: Path) -> str:
    premeld(case.base, out, case.precision.fp8, case.precision.melding)
    return str(out)


@pytest.mark.parametrize(
    ("family", "recipe", "kind", "format", "base"),
    [
        ("tied", "default", "all weights", "compressed-tensors", "named in the delta"),
        ("bias", "paper", "changes", "bf16", "melded"),
        ("qwen3", "default", "changes", "compressed-tensors", "model"),
    ],
)
def test_applied_it_is_the_direct_export(
    train: Callable[..., Case],
    tmp_path: Path,
    family: str,
    recipe: str,
    kind: str,
    format: Any,
    base: str,
) -> None:
    case = train(family, recipe=recipe)
    whole = export_model(case.file, tmp_path / "direct", format)
    if kind == "changes":
        case.save_small()
        changes = export_model(case.file, tmp_path / "of changes", format)
        assert changes["files"] == whole["files"]
        (tmp_path / "of changes").rename(tmp_path / "direct of changes")
    report = export_model(case.file, tmp_path / "delta", "delta")
    assert 0 < report["codes_changed"] < report["codes"]
    melded = meld_command(case, tmp_path / "melded")
    given = {"named in the delta": [], "melded": ["--base", melded], "model": ["--base", case.base]}
    arguments = ["apply", str(tmp_path / "delta"), "--output", str(tmp_path / "out")]
    assert main([*arguments, *given[base], "--format", format]) == 0
    direct = tmp_path / ("direct" if kind == "all weights" else "direct of changes")
    assert content(tmp_path / "out") == content(direct)  # card and manifest, too
    if base == "melded":
        again = export_model(case.file, tmp_path / "of melded", "delta", model=melded)
        assert again["layers"] == report["layers"] and again["base"] == report["base"]


def test_the_manifest(train: Callable[..., Case], tmp_path: Path) -> None:
    case = train("llama")
    report = export_model(case.file, tmp_path / "delta", "delta", shard_size="1KB")
    manifest = json.loads((tmp_path / "delta" / "falqon-delta.json").read_text())
    assert manifest["settings"] == case.precision.settings()
    named = {"name": case.base, "revision": None, "hub": False, "prompt": "alpaca"}
    assert manifest["model"] == named
    assert manifest["base"] == case.precision.base.plain()  # type: ignore[union-attr]
    assert manifest["global_step"] == 7 and manifest["losses"].startswith("Not recorded")
    names = {path.name for path in (tmp_path / "delta").iterdir()}
    assert names == {"falqon-delta.json", *manifest["files"]} and len(names) > 3
    start = melded_layers(case.melded())
    changed = sum(
        int((layer.codes != start[name].codes).sum())
        for name, layer in melded_layers(case.model).items()
    )
    assert report["codes_changed"] == changed
    size = sum(path.stat().st_size for path in (tmp_path / "delta").iterdir())
    assert report["bytes"] == size < report["codes"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_refusals(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    delta, out = tmp_path / "delta", tmp_path / "out"
    export_model(case.file, delta, "delta")
    base = case.precision.base
    assert base is not None
    # Another base: one weight of it is another.
    other = tmp_path / "other"
    shutil.copytree(case.base, other)
    plain = AutoModelForCausalLM.from_pretrained(case.base)
    with torch.no_grad():
        plain.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] += 1
    plain.save_pretrained(other)
    said = refused(capsys, "apply", delta, "--output", out, "--base", other)
    assert "model.layers.1.mlp.up_proj" in said and base.sha256[:16] in said
    assert base.layers["model.layers.1.mlp.up_proj"][:16] in said
    said = refused(capsys, "export", case.file, "--format=delta", "--output", out, "--model", other)
    assert "not the base" in said
    # Something frozen was changed.
    case.content["state_dict"]["model.model.norm.weight"] = (
        case.content["state_dict"]["model.model.norm.weight"] + 1
    )
    case.save()
    said = refused(capsys, "export", case.file, "--format=delta", "--output", out)
    assert "model.norm.weight" in said and "export the whole model" in said
    assert "no delta" in refused(capsys, "apply", tmp_path, "--output", out)
    case = train("llama", recipe="none")
    said = refused(capsys, "export", case.file, "--format=delta", "--output", out)
    assert "recipe 'none'" in said
    assert not out.exists() and not list(tmp_path.glob(".*"))


# -- in memory ----------------------------------------------------------------------------------


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.codes.detach()[: layer.out_features].clone()
        for name, layer in melded_layers(model).items()
    }


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    found = codes(model)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_deltas_in_turn(train: Callable[..., Case], tmp_path: Path, tokens: Tensor) -> None:
    cases = [train("llama"), train("llama", seed=1, size=0.2)]
    trained = [codes(case.model) for case in cases]
    for number, case in enumerate(cases):
        export_model(case.file, tmp_path / f"delta{number}", "delta")
    model = cases[0].melded()
    start = codes(model)
    layers = melded_layers(model)
    for number in (0, 1, 1, 0):
        manifest = load_delta(model, tmp_path / f"delta{number}")
        assert manifest is not None and manifest["global_step"] == 7
        assert same(model, trained[number]) and not same(model, start)
        expected = cases[number].model.eval()(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, expected)
    # Within another module, as Lightning has it.
    module = nn.ModuleDict({"model": model})
    load_delta(module, tmp_path / "delta1")
    assert same(model, trained[1])
    unload_delta(module)
    unload_delta(model)
    assert same(model, start) and melded_layers(model) == layers
    load_delta(model, tmp_path / "delta1")
    assert load_delta(module, None) is None
    assert same(model, start)


def test_what_is_refused_leaves_the_model_as_it_was(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case = train("llama")
    export_model(case.file, tmp_path / "delta", "delta")
    other = train("llama", recipe="paper")
    export_model(other.file, tmp_path / "paper", "delta")
    model = case.melded()
    start = codes(model)

    def error(path: Path | str, match: str) -> None:
        before = codes(model)
        with pytest.raises(InputError, match=match):
            load_delta(model, path)
        assert same(model, before)

    error(tmp_path / "paper", "belongs to another base .* has the hash [0-9a-f]{16} in this model")
    error(tmp_path, "is no delta")
    load_delta(model, tmp_path / "delta")
    error(tmp_path / "paper", "belongs to a base with the hash .*; the model holds a delta of one")
    unload_delta(model)
    with torch.no_grad():
        layer = next(iter(melded_layers(model).values()))
        layer.B[0, 0] = 1.0
        error(tmp_path / "delta", "B is not zero")
        layer.B.zero_()
        layer.codes[0, 0] ^= 1
        error(tmp_path / "delta", "belongs to another base")
        layer.codes[0, 0] ^= 1
    load_delta(model, tmp_path / "delta")
    assert not same(model, start)
    small = nn.Sequential(*list(melded_layers(case.melded()).values())[:3])
    with pytest.raises(InputError, match="this model has 3"):
        load_delta(small, tmp_path / "delta")


def fails_at(call: int, raised: Exception) -> Callable[..., None]:
    """`apply` that raises once, in the middle of putting a delta in."""
    calls = iter(range(1, 1000))

    def failing(codes: Tensor, change: Any, undo: bool = False) -> None:
        if not undo and next(calls) == call:
            raise raised
        apply(codes, change, undo)

    return failing


def test_a_delta_that_fails_leaves_the_first_one(
    train: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [train("llama"), train("llama", seed=1, size=0.2)]
    for number, case in enumerate(cases):
        export_model(case.file, tmp_path / f"delta{number}", "delta")
    file = tmp_path / "delta1" / "falqon-delta.json"
    good = json.loads(file.read_text())
    last = list(good["layers"])[-1]
    model = cases[0].melded()
    start = codes(model)
    for first in (None, tmp_path / "delta0"):
        load_delta(model, first)
        before = codes(model)
        bad = json.loads(json.dumps(good))
        bad["layers"][last]["sha256"] = "0" * 64
        write_manifest(file, bad)
        with pytest.raises(InputError, match=f"delta1: layer {last}: .* what was trained"):
            load_delta(model, tmp_path / "delta1")
        assert same(model, before)
        write_manifest(file, good)

        for raised, seen in ((MemoryError(), MemoryError), (ValueError("no fit"), InputError)):
            with monkeypatch.context() as patch:
                patch.setattr("falqon.delta.load.apply", fails_at(5, raised))
                with pytest.raises(seen):
                    load_delta(model, tmp_path / "delta1")
            assert same(model, before)
    load_delta(model, tmp_path / "delta1")
    assert same(model, codes(cases[1].model))
    unload_delta(model)
    assert same(model, start)


def test_codes_that_were_changed_are_not_taken_for_the_base(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case = train("llama")
    export_model(case.file, tmp_path / "delta", "delta")
    model = case.melded()
    start = codes(model)
    load_delta(model, tmp_path / "delta")
    name, layer = list(melded_layers(model).items())[-1]
    with torch.no_grad():
        layer.codes[0, 0] += 1  # as training does
        changed = codes(model)
        for path in (None, tmp_path / "delta"):
            with pytest.raises(
                InputError, match=f"{name} was changed, .* since .*delta was loaded"
            ):
                load_delta(model, path)
            assert same(model, changed)
        with pytest.raises(InputError, match="meld the base again"):
            unload_delta(model)
        assert same(model, changed)
        layer.codes[0, 0] -= 1
    unload_delta(model)
    assert same(model, start)


def test_a_loaded_delta_reaches_kept_transposes(train: Callable[..., Case], tmp_path: Path) -> None:
    # Copies of codes count as long as autograd's version of the codes is theirs.
    case = train("llama")
    export_model(case.file, tmp_path / "delta", "delta")
    model = case.melded()
    layer = melded_layers(model)["model.layers.0.self_attn.o_proj"]
    version = layer.codes._version
    load_delta(model, tmp_path / "delta")
    assert layer.codes._version > version


# -- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_directories(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    export_model(case.file, tmp_path / "delta", "delta")
    export_model(case.file, tmp_path / "export", "bf16")
    meld_command(case, tmp_path / "melded")
    assert case.precision.base is not None
    says: dict[str, list[Any]] = {
        "delta": ["delta", case.precision.base.sha256, "codes changed", case.base],
        "export": ["export (bf16)", "lm_head", "model.safetensors"],
        "melded": ["melded", "not kept", case.base],
    }
    for kind, parts in says.items():
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / kind)]) == 0
        printed = capsys.readouterr().out
        for part in parts:
            assert part in printed
        assert main(["inspect", str(tmp_path / kind), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["kind"] == kind and report["files"]
    again = case.melded()
    assert hash_base(again, melded_layers(again)) == case.precision.base
