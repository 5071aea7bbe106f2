"""FalqonPrecision through a real Trainer: when it acts, what it converts, what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from falqon import FalqonPrecision, Fp8Recipe, InputError, MeldedLinear, melded_layers
from lit_modules.loss import supervised_loss

Events = list[str]


class Net(LightningModule):
    """Two linear layers; writes down when it is called."""

    def __init__(self, events: Events, manual: bool = False, accumulate: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))
        self.events = events
        self.automatic_optimization = not manual
        self.accumulate = accumulate
        self.rate = 5.0

    def configure_model(self) -> None:
        self.trainer.precision_plugin.convert_module(self)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _factor(self, step: int) -> float:
        if step:
            self.events.append("scheduler")
        return 1.0

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).float().square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.events.append("training_step")
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.events.append("validation")


class Recorder(FalqonPrecision):
    """Notes the proxy update in the same list of events."""

    def __init__(self, events: Events, **settings: Any) -> None:
        super().__init__(**settings)
        self.events = events

    def convert(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super().convert(*args, **kwargs)
        assert self.proxy_update is not None
        inner = self.proxy_update.step
        if inner.__name__ == "noted":  # converted before: once is enough
            return module

        def noted(*step_args: Any, **step_kwargs: Any) -> None:
            self.events.append("proxy_update")
            inner(*step_args, **step_kwargs)

        self.proxy_update.step = noted  # type: ignore[method-assign]
        return module

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("clip")
        super().clip_gradients(*args, **kwargs)


class Saver(Callback):
    """Notes the end of a batch, where checkpoints are written."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def on_train_batch_end(self, *args: Any) -> None:
        self.events.append("batch_end")


def batches(count: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randn(4 * count, 32, generator=generator).bfloat16(), batch_size=4)


def fit(module: Net, plugin: FalqonPrecision, **settings: Any) -> Trainer:
    settings = {"max_epochs": 1, "val_check_interval": 1.0, "num_sanity_val_steps": 0} | settings
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[plugin],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Saver(module.events)],
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(), batches(1))
    return trainer


STEP = ["proxy_update", "scheduler", "batch_end"]


def test_order_of_hooks_automatic() -> None:
    events: Events = []
    fit(Net(events), Recorder(events, rank=4, rows="all"), gradient_clip_val=1.0)
    assert events == ["training_step", "clip", *STEP] * 6 + ["validation"]


def test_order_of_hooks_with_accumulation() -> None:
    events: Events = []
    settings = {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}
    fit(Net(events), Recorder(events, rank=4, rows="all"), **settings)
    waiting = ["training_step", "batch_end"]
    assert events == [*waiting, *waiting, "training_step", "clip", *STEP] * 2 + ["validation"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_order_of_hooks_manual(accumulate: int) -> None:
    events: Events = []
    module = Net(events, manual=True, accumulate=accumulate)
    fit(module, Recorder(events, rank=4, rows="all"))
    waiting = ["training_step", "batch_end"] * (accumulate - 1)
    one = [*waiting, "training_step", "proxy_update", "batch_end"]
    assert events == one * (6 // accumulate) + ["validation"]


def test_accumulation_gives_the_update_of_a_loop_written_by_hand() -> None:
    module = Net([])
    plugin = FalqonPrecision(rank=4, update="paper", rows="all")
    reference = copy.deepcopy(module)
    fit(module, plugin, accumulate_grad_batches=3, gradient_clip_val=0.5)

    by_hand = FalqonPrecision(rank=4, update="paper", rows="all")
    by_hand.convert(reference)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=5.0)
    assert by_hand.proxy_update is not None
    for number, batch in enumerate(batches()):
        (reference.loss(batch) / 3).backward()
        if number % 3 == 2:
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            by_hand.proxy_update.step(number // 3)
            optimizer.zero_grad()
    changed = 0
    start = Net([])
    FalqonPrecision(rank=4, update="paper", rows="all").convert(start)
    for (name, ours), theirs, first in zip(
        melded_layers(module).items(),
        melded_layers(reference).values(),
        melded_layers(start).values(),
        strict=True,
    ):
        assert torch.equal(ours.codes, theirs.codes), name
        changed += int((ours.codes != first.codes).sum())
    assert changed > 0


def test_conversion_is_idempotent_and_keeps_the_parameter_map(tiny_llama: LlamaForCausalLM) -> None:
    model = copy.deepcopy(tiny_llama)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    plugin = FalqonPrecision(rank=4)
    plugin.convert(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    layers = dict(plugin.layers)
    plugin.convert(model)
    assert plugin.layers == layers
    assert plugin.report is not None
    assert len(plugin.report.converted) == 14
    bf16, fp32, uint8 = torch.bfloat16, torch.float32, torch.uint8
    golden = {"model.embed_tokens.weight": (bf16, False), "model.norm.weight": (bf16, False)}
    golden["lm_head.weight"] = (bf16, False)
    for block in range(2):
        prefix = f"model.layers.{block}."
        for linear in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ):
            golden[f"{prefix}{linear}.codes"] = (uint8, False)
            golden[f"{prefix}{linear}.scale"] = (fp32, False)
            golden[f"{prefix}{linear}.B"] = (fp32, True)
        golden[f"{prefix}input_layernorm.weight"] = (bf16, False)
        golden[f"{prefix}post_attention_layernorm.weight"] = (bf16, False)
    found = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    assert found == golden
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # Buffers keep their precision: rotary angles in bf16 would be wrong at long range.
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.inv_freq.dtype == fp32


def test_parameter_types_survive_training_and_the_trip_through_lightning() -> None:
    module = Net([])
    fit(module, FalqonPrecision(rank=4, update="paper", rows="all"))
    for layer in melded_layers(module).values():
        assert layer.codes.dtype == torch.uint8
        assert layer.scale.dtype == layer.B.dtype == torch.float32
        assert not layer.codes.requires_grad


def test_transposed_copies_of_sharded_codes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="keep_transposed is for FP8 matmuls"):
        FalqonPrecision(rank=4, keep_transposed=True, recipe="weights")
    plugin = FalqonPrecision(rank=4, keep_transposed=True)
    net = nn.Sequential(nn.Linear(16, 24))
    plugin.convert(net)
    layers = melded_layers(net).values()
    assert all(layer.backbone_matmul.keep_transposed for layer in layers)
    plugin.connect(net, [], [])
    monkeypatch.setattr("falqon.precision.DTensor", nn.Parameter)  # as FSDP2 leaves them
    with pytest.raises(InputError, match="keep_transposed keeps whole weights.*sharded"):
        plugin.connect(net, [], [])
    FalqonPrecision.connect(FalqonPrecision(rank=4), net, [], [])


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise InputError(f"{device} is too old")

    plugin = FalqonPrecision(rank=4)
    net = nn.Sequential(nn.Linear(16, 24))
    plugin.convert(net)
    monkeypatch.setattr("falqon.kernels.devices.check", refuse)
    with pytest.raises(InputError, match="cpu is too old"):
        plugin.connect(net, [], [])
    with pytest.raises(InputError, match="cpu is too old"):
        FalqonPrecision(rank=4).convert(nn.Sequential(nn.Linear(16, 24)), device="cpu")


def test_a_buffer_in_no_optimizer_is_refused() -> None:
    class Forgetful(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net[0].B], lr=0.1)

    with pytest.raises(InputError, match=r"net\.2.*no optimizer"):
        fit(Forgetful([]), FalqonPrecision(rank=4))


def test_forgetting_to_convert_is_refused() -> None:
    class Unconverted(Net):
        def configure_model(self) -> None:
            self.early = torch.optim.SGD(self.net.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.early

    with pytest.raises(InputError, match="no optimizer"):
        fit(Unconverted([]), FalqonPrecision(rank=4))


def test_state_of_other_settings_is_refused_by_name() -> None:
    state = FalqonPrecision(rank=4, recipe="paper").state_dict()
    with pytest.raises(InputError, match=r"recipe\.activations.*per_tensor.*per_token"):
        FalqonPrecision(rank=4).load_state_dict(state)
    with pytest.raises(InputError, match="not trained with FalqonPrecision"):
        FalqonPrecision(rank=4).check_settings(None)


def test_recipe_as_fields_of_a_named_one() -> None:
    plugin = FalqonPrecision(recipe={"base": "paper", "scaling": "delayed", "amax_history": 4})
    assert plugin.fp8 == Fp8Recipe("per_tensor", "per_tensor", "delayed", 4, "none", "none")
    with pytest.raises(InputError, match="unknown key 'activation'"):
        FalqonPrecision(recipe={"activation": "per_token"})


def test_metrics_name_what_happened() -> None:
    module = Net([])
    plugin = FalqonPrecision(rank=4, rows=3, update="live")
    assert plugin.metrics() == {}
    fit(module, plugin)
    metrics = plugin.metrics()
    assert metrics["falqon/rows_written"] == 6
    assert 0 < metrics["falqon/codes_flipped"] <= 3 * (32 + 48)
    assert metrics["falqon/saturated_share"] >= 0
    assert 0 < metrics["falqon/realised_ratio"] < 2
    assert metrics["falqon/weight_scale"] > 1


def test_emulate_none_trains_a_model_like_lora_fa(tiny_llama: LlamaForCausalLM) -> None:
    # Step by step through the plugin, against LoRA-FA (frozen A) written by hand on plain weights.
    melded = copy.deepcopy(tiny_llama)
    plugin = FalqonPrecision(rank=4, rows="all", recipe="none", dtype="fp32")
    plugin.convert(melded)
    plain = copy.deepcopy(tiny_llama).requires_grad_(False)
    names = list(plugin.layers)
    a = {n: plugin.layers[n].dequantized_adapter() for n in names}
    w = {n: plain.get_submodule(n).weight.detach().clone() for n in names}
    b = {n: torch.zeros_like(plugin.layers[n].B, requires_grad=True) for n in names}
    ours = torch.optim.AdamW([layer.B for layer in plugin.layers.values()], lr=0.05, weight_decay=0)
    theirs = torch.optim.AdamW(list(b.values()), lr=0.05, weight_decay=0)
    generator = torch.Generator().manual_seed(3)
    for step in range(8):
        ids = torch.randint(0, tiny_llama.config.vocab_size, (2, 12), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        loss, count = supervised_loss(melded, batch)
        (loss / count).backward()
        weights = {f"{n}.weight": w[n] + b[n] @ a[n] for n in names}
        logits = torch.func.functional_call(
            plain, weights, kwargs={"input_ids": ids, "use_cache": False}
        ).logits
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected.backward()
        assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5), step
        ours.step()
        theirs.step()
        assert plugin.proxy_update is not None
        plugin.proxy_update.step(step)
        ours.zero_grad()
        theirs.zero_grad()
    # Adam divides by the root of squared gradients, so differences of rounding show in full.
    for n in names:
        got = plugin.layers[n].dequantized_weight()
        assert (got - w[n]).norm() > 0.1 * w[n].norm()
        torch.testing.assert_close(got, w[n] + b[n] @ a[n], rtol=1e-3, atol=1e-4)


def test_melded_linear_is_what_the_plugin_makes() -> None:
    module = Net([])
    FalqonPrecision(rank=4).convert(module)
    assert all(isinstance(m, MeldedLinear) for m in (module.net[0], module.net[2]))
