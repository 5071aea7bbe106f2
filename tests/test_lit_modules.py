"""The loss over supervised tokens, and the learning-rate schedules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional
from transformers import LlamaForCausalLM

from falqon import FalqonPrecision, InputError
from lit_modules import LitCausalLM, WarmupConstant, WarmupCosine
from lit_modules.loss import supervised_loss


def some_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (3, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    labels[2] = -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("chunk", [512, 4])
def test_loss_and_gradient_are_those_of_all_logits(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("lit_modules.loss._CHUNK", chunk)
    model, plain = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    batch = some_batch(model.config.vocab_size)
    loss, count = supervised_loss(model, batch)
    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].flatten()
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )
    assert int(count) == int((targets != -100).sum()) == 6 + 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    # Nothing is left behind on the model: the next forward gives all logits again.
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == (3, 10)


def test_a_batch_without_supervised_tokens_has_loss_zero_and_a_graph(
    tiny_llama: LlamaForCausalLM,
) -> None:
    model = copy.deepcopy(tiny_llama)
    batch = some_batch(model.config.vocab_size)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, count = supervised_loss(model, batch)
    assert (loss.item(), int(count)) == (0.0, 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def rates(scheduler: WarmupConstant, steps: int) -> list[float]:
    values = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        values.append(scheduler.get_last_lr()[0])
    return values


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_warmup_is_a_share_of_the_steps_or_a_number() -> None:
    share = WarmupConstant(sgd(), warmup=0.04)
    share.set_total_steps(75)
    number = WarmupConstant(sgd(), warmup=3)
    number.set_total_steps(1000)
    assert rates(share, 4) == rates(number, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    none = WarmupConstant(sgd(), warmup=0)
    none.set_total_steps(10)
    assert rates(none, 2) == [1.0, 1.0, 1.0]


def test_cosine_ends_at_its_final_factor() -> None:
    scheduler = WarmupCosine(sgd(), warmup=2, final=0.1)
    scheduler.set_total_steps(12)
    values = rates(scheduler, 12)
    assert values[2] == pytest.approx(1.0)
    assert values[7] == pytest.approx(0.55)
    assert values[12] == pytest.approx(0.1)


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    straight = WarmupConstant(sgd(), warmup=0.5)
    straight.set_total_steps(8)
    expected = rates(straight, 6)
    first = WarmupConstant(sgd(), warmup=0.5)
    first.set_total_steps(8)
    rates(first, 2)
    second = WarmupConstant(sgd(), warmup=0.5)
    second.set_total_steps(100)  # a longer training keeps the warm-up that it began with
    second.load_state_dict(first.state_dict())
    assert rates(second, 4)[1:] == expected[3:]


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(InputError, match="warmup is -1"):
        WarmupConstant(sgd(), warmup=-1)


def test_norms_and_loss_compute_in_float32(tiny_llama: LlamaForCausalLM) -> None:
    model = copy.deepcopy(tiny_llama).train()
    FalqonPrecision(rank=4).convert(model)
    norm = model.model.norm
    assert norm.weight.dtype == torch.bfloat16
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    batch = some_batch(model.config.vocab_size)
    loss, tokens = supervised_loss(model, batch)
    x, y = seen[0]
    assert x.dtype == y.dtype == torch.bfloat16
    exact = (
        x.double() * (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    )
    # One rounding to bf16 before the weight and one after it: mean square and root are finer.
    torch.testing.assert_close(y.double(), exact * norm.weight.double(), rtol=2**-7, atol=0)
    assert torch.equal(y, norm.weight * exact.float().to(torch.bfloat16))
    # The loss is that of the 16-bit logits, summed in float32.
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    assert logits.dtype == torch.bfloat16
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = functional.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert tokens == (targets != -100).sum()


def test_a_compensated_flush_without_a_data_module_is_refused_at_once(
    tokenizer_dir: str, tmp_path: Path
) -> None:
    trainer = Trainer(
        plugins=[FalqonPrecision(rank=4, update="compensated")],
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(InputError, match="flush_rounding to 'same'"):
        trainer.fit(LitCausalLM(tokenizer_dir), train_dataloaders=[{}])
