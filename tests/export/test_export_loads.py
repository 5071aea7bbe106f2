"""Exports as transformers, vLLM and SGLang load them: the model is the one that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import FAMILIES, Case
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from falqon import melded_layers
from falqon.export import export_model
from falqon.export.tensors import Format

every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens, use_cache=False).logits


def load(directory: Path, **kwargs: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def stored(directory: Path) -> dict[str, Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@every_family
def test_bf16_is_the_trained_model(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path, family: str
) -> None:
    case = train(family)
    report = export_model(case.file, tmp_path / "out", "bf16")
    assert report["rounded"] == []
    expected = logits(case.plain(), tokens)
    assert torch.equal(logits(load(tmp_path / "out"), tokens), expected)
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    assert not torch.allclose(logits(base, tokens), expected, atol=1e-3)
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.bfloat16}


@every_family
def test_the_codes_are_the_checkpoints(
    train: Callable[..., Case], tmp_path: Path, family: str
) -> None:
    case = train(family)
    report = export_model(case.file, tmp_path / "out")
    found, layers = stored(tmp_path / "out"), melded_layers(case.model)
    assert report["melded_layers"] == len(layers) == 14
    for name, layer in layers.items():
        weight, scale = found.pop(f"{name}.weight"), found.pop(f"{name}.weight_scale")
        assert weight.dtype == torch.float8_e4m3fn
        assert torch.equal(weight.view(torch.uint8), layer.codes[: layer.out_features])
        assert scale.dtype == torch.float32 and scale.shape == (layer.out_features, 1)
        assert torch.equal(weight.float() * scale, layer.dequantized_weight())
    tied = AutoModelForCausalLM.from_pretrained(case.base).config.tie_word_embeddings
    assert ("lm_head.weight" in found) != tied
    for name, tensor in found.items():
        assert torch.equal(tensor, case.model.state_dict()[name]), name
        assert tensor.dtype == torch.bfloat16
    rest = {n for n in case.values() if n.removesuffix(".weight") not in layers}
    assert set(found) == rest - ({"lm_head.weight"} if tied else set())


@every_family
def test_transformers_dequantizes_to_the_trained_model(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path, family: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    case = train(family)
    export_model(case.file, tmp_path / "out")
    loaded = load(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(loaded, tokens), logits(case.plain(), tokens))


def fake_quantize(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Per-token E4M3: what a server makes of a layer's input."""
    scale = args[0].abs().amax(dim=-1, keepdim=True) / 448
    codes = (args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * scale,)


@every_family
def test_transformers_serves_the_codes(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path, family: str
) -> None:
    pytest.importorskip("compressed_tensors")
    case = train(family)
    export_model(case.file, tmp_path / "out")
    plain = case.plain()
    weights_only = logits(plain, tokens)
    for name in melded_layers(case.model):
        plain.get_submodule(name).register_forward_pre_hook(fake_quantize)
    expected = logits(plain, tokens)
    assert not torch.equal(expected, weights_only)
    assert torch.equal(logits(load(tmp_path / "out"), tokens), expected)


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("fused", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
def test_servers_fuse_layers_without_changing_a_value(
    train: Callable[..., Case], tmp_path: Path, fused: tuple[str, ...], recipe: str
) -> None:
    # What vLLM and SGLang do to load: stack the weights and the channel scales of fused layers.
    case = train("one key", recipe=recipe)
    export_model(case.file, tmp_path / "out")
    found, layers = stored(tmp_path / "out"), melded_layers(case.model)
    block = "self_attn" if "q_proj" in fused else "mlp"
    for index in range(2):
        names = [f"model.layers.{index}.{block}.{part}" for part in fused]
        scales = torch.cat([found[f"{name}.weight_scale"] for name in names])
        weight = torch.cat([found[f"{name}.weight"].view(torch.uint8) for name in names])
        values = weight.view(torch.float8_e4m3fn).float() * scales
        expected = torch.cat([layers[name].dequantized_weight() for name in names])
        if recipe == "default":  # scales are powers of two, in bf16 as well
            assert torch.equal(values, expected)
            assert torch.equal(scales.bfloat16().float(), scales)
        else:  # code * (1 / scale) for code / scale: two roundings for one
            assert torch.allclose(values, expected, rtol=2**-23, atol=0)


def test_ignore_names_every_linear_layer_that_is_not_fp8(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case = train("llama", exclude=["*.1.mlp.*"])
    report = export_model(case.file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "float-quantized"
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "channel" and not group["weights"]["dynamic"]
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"]
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    found = stored(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(case.base)
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    scaled = {n.removesuffix(".weight_scale") for n in found if n.endswith("_scale")}
    assert set(quantization["ignore"]) == linear - scaled == set(report["ignore"])
    mlp = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert set(quantization["ignore"]) == mlp | {"lm_head"}


@pytest.mark.parametrize("format", ["compressed-tensors", "bf16"])
def test_a_melded_output_embedding_is_exported_as_values(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path, format: Format
) -> None:
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    case = train("llama", output_embedding=True)
    report = export_model(case.file, tmp_path / "out", format)
    assert report["melded_layers"] == 15
    assert report["ignore"] == (["lm_head"] if format == "compressed-tensors" else [])
    head = stored(tmp_path / "out")["lm_head.weight"]
    assert head.dtype == torch.bfloat16
    assert torch.equal(head.float(), case.values()["lm_head.weight"])
    plain = case.plain()
    if format == "compressed-tensors":
        for name in melded_layers(case.model).keys() - {"lm_head"}:
            plain.get_submodule(name).register_forward_pre_hook(fake_quantize)
    assert torch.equal(logits(load(tmp_path / "out"), tokens), logits(plain, tokens))


def test_weights_alone_are_exported_without_rounded_inputs(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    case = train("llama", recipe="weights")
    export_model(case.file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"] is None and group["weights"]["num_bits"] == 8
    assert torch.equal(logits(load(tmp_path / "out"), tokens), logits(case.plain(), tokens))


def test_without_fp8_only_values_can_be_exported(
    train: Callable[..., Case], tokens: Tensor, tmp_path: Path
) -> None:
    case = train("llama", recipe="none", dtype="fp32")
    report = export_model(case.file, tmp_path / "out", "bf16")
    assert set(report["rounded"]) == {f"{n}.weight" for n in melded_layers(case.model)}
    assert "were rounded" in (tmp_path / "out" / "README.md").read_text()
    rounded = {name: value.bfloat16() for name, value in case.values().items()}
    plain = case.plain()
    plain.load_state_dict(rounded)
    assert torch.equal(logits(load(tmp_path / "out"), tokens), logits(plain, tokens))


def test_tokenizer_template_and_generation_settings_come_along(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case = train("llama")
    settings = GenerationConfig(eos_token_id=[2, 4], temperature=0.6)  # of a chat model
    settings.to_json_file(Path(case.base) / "generation_config.json")
    export_model(case.file, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(d) for d in (case.base, tmp_path / "out"))
    turns = [{"role": "user", "content": "Why is the sky blue? 123"}]
    assert after.apply_chat_template(turns) == before.apply_chat_template(turns)
    assert len(after) == len(before) and after.pad_token == before.pad_token
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    assert loaded.eos_token_id == [2, 4] and loaded.temperature == 0.6


def test_a_gguf_tokenizer_stays_the_models_own(smollm2: Any, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "In 1969, item\n\n12 and 3.\n\n4 more"
    assert after(text)["input_ids"] == smollm2(text)["input_ids"]
    assert after.chat_template == smollm2.chat_template
