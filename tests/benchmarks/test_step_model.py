"""benchmarks.step_model: counts against the real modules, bytes against formulas by hand."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from benchmarks import step_fused, step_model, step_ops, step_record
from benchmarks.devices import DEVICES
from benchmarks.step_ops import Op, Settings
from benchmarks.step_record import Recorder, meld_on_meta, record, record_layers
from falqon.linear import MeldedLinear
from falqon.recipe import fp8_recipe

AttentionInterface.register("scores", eager_attention_forward)
ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_record.CONFIGS, "tiny", TINY)


def real_model(size: str, layers: int, device: str, method: str, rank: int) -> nn.Module:
    """The modules themselves, with eager attention (unmasked: a mask needs data)."""
    config = step_record.build(size, layers).config
    config._attn_implementation = "scores"
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    if method == "paper":
        meld_on_meta(model, rank, "paper")
    else:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=names))
    nn.Module.to(model, torch.bfloat16)
    return model if device == "meta" else model.to_empty(device=device)


def flops_of(step: step_record.Step, kind: str | None = None) -> int:
    return sum(
        times * op.flops
        for op, times in step.ops.items()
        if op.phase != "update" and kind in (None, op.kind)
    )


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("size", "layers", "device", "method"),
    [
        ("tiny", 5, "cpu", "paper"),
        ("tiny", 5, "cpu", "lora"),
        ("7B", 2, "meta", "lora"),  # a melded layer does not run on the meta device
    ],
)
def test_flops_are_those_of_the_real_modules(
    size: str, layers: int, device: str, method: str
) -> None:
    settings = Settings(batch=2, tokens=24, rank=16)
    model = real_model(size, layers, device, method, settings.rank)
    tokens = torch.zeros(2, 24, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    step = record_layers(size, method, settings, False, layers)
    # Attention: the real one makes all scores, twice as many matmuls backward as forward. Flash
    # attention leaves half of the scores out and makes the others twice (checked below).
    hidden = step_record.CONFIGS[size]["hidden_size"]
    eager = layers * 3 * (4 * 2 * 24 * 24 * hidden)
    assert flops_of(step) - flops_of(step, "attention") == counter.get_total_flops() - eager
    assert flops_of(step, "attention") > 0


def test_flash_attention_has_the_flops_that_torch_counts() -> None:
    shape = (2, 4, 24, 16)
    listing = step_fused.attention(2, 24, 4, 16, causal=False)
    assert listing.forward[0].flops == sdpa_flop_count(shape, shape, shape)
    assert listing.grad_input[0].flops == sdpa_backward_flop_count(shape, shape, shape, shape)
    causal = step_fused.attention(2, 24, 4, 16)
    assert causal.forward[0].flops * 24 * 2 == listing.forward[0].flops * 25
    # q, k, v in, o and a float32 logsumexp out
    size = 2 * 2 * 4 * 24 * 16
    assert (causal.forward[0].read, causal.forward[0].written) == (3 * size, size + 4 * 2 * 4 * 24)


@pytest.mark.usefixtures("_tiny")
def test_fused_layers_do_the_flops_of_single_ones() -> None:
    settings = Settings(batch=2, tokens=24, rank=16)
    single, fused = (record("tiny", m, settings, False) for m in ("paper", "falqon"))
    # The first layer's q, k and v need no dx; the fused layer does not know that it is the first.
    extra = 2 * settings.total * 64 * (3 * 64)
    assert flops_of(fused) == flops_of(single) + extra


@pytest.mark.usefixtures("_tiny")
def test_baselines_differ_by_what_is_said_of_them() -> None:
    settings = Settings(batch=2, tokens=24, rank=16)
    steps = {m: record("tiny", m, settings, False) for m in step_record.LINEARS}
    shapes = 4 * 64 * 64 + 3 * 64 * 160
    assert flops_of(steps["qlora"]) == flops_of(steps["torchao"]) == flops_of(steps["lora"])
    wasted = flops_of(steps["torchao_dw"]) - flops_of(steps["torchao"])
    assert wasted == TINY["num_hidden_layers"] * 2 * settings.total * shapes
    by_phase: Counter[str] = Counter()
    for op, times in steps["qlora"].ops.items():
        if op.kind == "dequantise":
            by_phase[op.phase] += times * op.written
    # Once a pass, 16 bits a weight; the first layer's q, k and v need no dx.
    assert by_phase["forward"] == 5 * 2 * shapes
    assert by_phase["backward"] == 5 * 2 * shapes - 2 * 3 * 64 * 64
    dropped = record("tiny", "lora", Settings(2, 24, 16, dropout=True), False)
    kept = dropped.memory["activations"] - steps["lora"].memory["activations"]
    assert kept == 5 * 3 * settings.total * (6 * 64 + 160)  # a bfloat16 copy and a mask of bytes


@pytest.mark.parametrize(("size", "count"), [("7B", 6_738_415_616), ("13B", 13_015_864_320)])
def test_parameters_are_those_of_llama(size: str, count: int) -> None:
    model = step_record.build(size)
    assert sum(p.numel() for p in model.parameters()) == count
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    layers = model.config.num_hidden_layers
    outs = 5 * hidden + 2 * width
    step = record(size, "paper", Settings(), True)
    assert step.trainable == layers * 64 * outs
    codes = layers * (4 * hidden**2 + 3 * hidden * width + 64 * (6 * hidden + width))
    scales = layers * 7 * 4
    rest = 2 * (2 * 32000 * hidden + (2 * layers + 1) * hidden)
    assert step.memory["weights"] == codes + scales + rest
    assert step.memory["adapters"] == 4 * step.trainable


def test_bytes_of_ops() -> None:
    product = step_ops.gemm("g", 3, 5, 7, "fp8")
    assert (product.read, product.written, product.flops) == (3 * 7 + 7 * 5, 2 * 15, 2 * 105)
    added = step_ops.gemm("g", 3, 5, 7, "bf16", accumulate=True)
    assert added.read == 2 * (21 + 35) + 2 * 15
    whole, rows = (step_ops.quantise("q", 3, 5, g) for g in ("per_tensor", "per_token"))  # type: ignore[arg-type]
    assert (whole.read, whole.written, whole.launches) == (2 * 2 * 15, 15 + 4, 3)
    assert (rows.read, rows.written, rows.launches) == (2 * 15, 15 + 4 * 3, 1)
    device = DEVICES["H100 SXM"]
    assert product.seconds(device) == (21 + 35 + 30) / 3350e9
    large = step_ops.gemm("g", 8192, 8192, 8192, "fp8")
    assert large.seconds(device) == 2 * 8192**3 / 1979e12


def test_bytes_of_a_melded_layer() -> None:
    settings = Settings(batch=2, tokens=8, rank=16)
    t, n_in, out, r = 16, 64, 96, 16
    layer = MeldedLinear(n_in, out, r, recipe=fp8_recipe("paper"), device="meta")
    listing = step_ops.melded(layer, settings)
    assert sum(op.read for op in listing.forward) == (
        2 * 2 * t * n_in + (t * n_in + (out + r) * n_in) + 2 * t * r
    )
    assert sum(op.written for op in listing.forward) == (
        t * n_in + 4 + 2 * t * (out + r) + 2 * t * r
    )
    copied = out * n_in
    assert sum(op.read for op in listing.grad_input) == copied + t * out + out * n_in
    cached = step_ops.melded(layer, Settings(2, 8, 16, cached_transpose=True))
    assert sum(op.read for op in cached.grad_input) == t * out + out * n_in
    token = MeldedLinear(n_in, out, r, device="meta")
    assert step_ops.melded(token, settings).forward[0].read == 2 * t * n_in


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_a_melded_layer_keeps_what_is_counted(recipe: str) -> None:
    settings = Settings(batch=2, tokens=8, rank=16)
    layer = MeldedLinear(64, 96, 16, recipe=fp8_recipe(recipe))
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    listing = step_ops.melded(layer, settings)
    assert not listing.keeps_input
    assert sum(kept.values()) == 2 * 16 * 16 == _bytes(listing.saved)


def _bytes(saved: tuple[step_ops.Saved, ...]) -> int:
    return sum(torch.empty(s, dtype=d, device="meta").nbytes for s, d in saved)


def test_living_bytes_are_those_that_autograd_keeps() -> None:
    with torch.device("meta"):
        norm = LlamaRMSNorm(64)
        x = torch.empty(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    norm.to(torch.bfloat16)
    outside = {t.untyped_storage()._cdata for t in (*norm.parameters(), x)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in outside:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        first = norm(x)
    with Recorder() as recorder:
        out = norm(x)
    assert recorder.live == sum(kept.values()) + first.nbytes
    assert recorder.peak >= recorder.live
    del out
    assert recorder.live == 0  # the graph went with it


def test_recorded_kernels_of_a_norm() -> None:
    with torch.device("meta"):
        norm = LlamaRMSNorm(64)
        x = torch.empty(15, 64, dtype=torch.bfloat16)
    norm.to(torch.bfloat16)
    with Recorder() as recorder, torch.no_grad():
        norm(x)
    n = 15 * 64
    by_name = {op.name.split(".")[0]: op for op in recorder.ops}
    assert (by_name["pow"].read, by_name["pow"].written) == (4 * n, 4 * n)
    assert recorder.ops.total() == 8  # to float32, square, mean, + eps, rsqrt, *, to bf16, *
    # The weight is read with the product; two casts; small ones of one number a row.
    moved = sum(times * (op.read + op.written) for op, times in recorder.ops.items())
    rows = 15 * 4
    assert moved == (6 + 8 + 4 + 8 + 6 + 4) * n + 2 * 64 + rows * (1 + 2 + 2 + 1)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("method", ["lora", "paper", "falqon"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_that_are_alike_are_counted_once(method: str, checkpointing: bool) -> None:
    settings = Settings(batch=2, tokens=24, rank=16)
    short = record("tiny", method, settings, checkpointing)
    full = record_layers("tiny", method, settings, checkpointing, None)
    assert short == full


@pytest.mark.usefixtures("_tiny")
def test_a_checkpoint_trades_bytes_for_launches() -> None:
    settings = Settings(batch=2, tokens=24, rank=16)
    kept, again = (record("tiny", "paper", settings, c) for c in (False, True))
    assert again.memory["activations"] < kept.memory["activations"]

    def gemms(step: step_record.Step) -> Counter[str]:
        return Counter(
            {
                phase: sum(
                    n for op, n in step.ops.items() if (op.name, op.phase) == ("melded GEMM", phase)
                )
                for phase in ("forward", "recompute")
            }
        )

    assert gemms(kept) == {"forward": 35, "recompute": 0}
    assert gemms(again) == {"forward": 35, "recompute": 35}


def test_memory_agrees_with_what_ran_and_what_did_not_in_the_paper() -> None:
    for (device, size), entries in step_model.PAPER.items():
        for method, seconds in entries.items():
            made = step_model.predict(DEVICES[device], size, method, Settings())
            assert made.fits == (seconds != step_model.OOM), (device, size, method)


def test_auto_recomputes_where_it_must() -> None:
    small, large = (
        step_model.predict(DEVICES[d], "7B", "paper", Settings(), "auto")
        for d in ("RTX 4090", "H100 SXM")
    )
    assert small.checkpointing and not large.checkpointing
    assert small.fits and large.fits


def test_the_page_is_what_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "step_model.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    table = tmp_path / "all.csv"
    assert step_model.main(["--markdown", str(copy), "--csv", str(table)]) == 0
    assert copy.read_text() == page.read_text(), (
        "docs/step_model.md: python -m benchmarks.step_model --markdown docs/step_model.md"
    )
    shown = capsys.readouterr().out
    assert shown.startswith("A model at published peaks, not a measurement")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(DEVICES) * 2 * len(step_model.METHODS) * 2
    for row in rows:
        kinds = sum(float(row[f"{kind.replace(' ', '_')}_s"]) for kind in step_model.KINDS)
        assert kinds == pytest.approx(float(row["model_s"]), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--rank", "5000"], "--rank is 5000, more than the 4096 features"),
        (["--devices", "A100"], "invalid choice: 'A100'"),
        (["--markdown", "nowhere.md"], "nowhere.md is not a file"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        step_model.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="there must be one line"):
        step_model.put_between_markers("nothing", "table")
    text = f"before\n{step_model.BEGIN}\nold\n{step_model.END}\nafter"
    assert step_model.put_between_markers(text, "new") == (
        f"before\n{step_model.BEGIN}\n\nnew\n{step_model.END}\nafter"
    )


def test_peaks_are_in_the_right_order() -> None:
    for device in DEVICES.values():
        assert device.fp8_flops == pytest.approx(2 * device.bf16_flops, rel=0.02)
        assert device.bf16_flops > device.fp32_flops
        assert Op("copy", "elementwise", 10, 10).seconds(device) == 20 / device.bandwidth
