"""Model FLOPs and what share of a device's peak they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from falqon.callbacks.utilisation import (
    Flops,
    Peaks,
    count_flops,
    count_supervised,
    peaks,
    utilisation,
)
from falqon.kernels.native import products
from falqon.meld import melded_layers
from falqon.precision import FalqonPrecision
from lit_modules.loss import supervised_loss


def model(**plugin: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        attn_implementation="eager",
    )
    made = LlamaForCausalLM(config)
    FalqonPrecision(rank=8, **plugin).convert(made)
    return made.train()


@pytest.mark.parametrize("update", ["paper", "live"])
def test_flops_are_those_that_are_done(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "present", lambda: False)  # its products are none of torch's
    made = model(update=update)
    made.model.embed_tokens.weight.requires_grad_()  # or the first group's input has no gradient
    ids = torch.randint(0, 160, (2, 30))
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, :11] = -100
    counter = FlopCounterMode(display=False)
    with counter:
        loss, count = supervised_loss(made, batch)
        loss.backward()
    assert count_supervised(batch) == count
    flops = count_flops(made)
    by_name = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    done = by_name["aten.mm"]
    if update == "live":  # the counter does not know products that are added in place
        layers = melded_layers(made).values()
        done += sum(4 * x.in_features * x.out_features for x in layers) * ids.numel()
    assert flops.supervised == 4 * 160 * 64  # forward, and to its input
    assert (flops.fp8 + flops.other) * ids.numel() + flops.supervised * int(count) == done


def test_without_fp8_all_is_in_16_bits() -> None:
    flops = count_flops(model(recipe="none"))
    assert flops.fp8 == 0 < flops.other


def test_packed_weights_count_as_what_they_are_of() -> None:
    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    assert count_flops(nn.Sequential(layer)).other == 4 * 64 * 32


def test_each_kind_counts_against_its_own_peak() -> None:
    flops, peak = Flops(100, 50, 10), Peaks(1000.0, 500.0)
    assert utilisation(flops, peak, 10, 0, 2.0) == pytest.approx(1.0)
    assert utilisation(flops, peak, 10, 100, 4.0) == pytest.approx(1.0)


def test_peak_of_a_cpu_is_measured() -> None:
    found = peaks(torch.device("cpu"))
    assert found is not None
    assert found.fp8 == found.other > 1e8
    assert peaks(torch.device("meta")) is None


def test_batch_without_labels() -> None:
    assert count_supervised({"input_ids": torch.zeros(1, 2)}) == 0
