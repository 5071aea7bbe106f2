"""MeZO: its estimate is the derivative along a direction, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import LlamaForCausalLM

from falqon.errors import InputError
from lit_modules.loss import supervised_loss
from lit_modules.methods import MeZO
from tests.method_checks import LAYERS, check_merge, check_training, configure, losses, prepared
from tests.method_checks import some_batch as batch_of


def estimate(
    method: MeZO, model: Any, step: int = 0, number: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients that the method gives for one batch, and its loss."""
    parameters = method.trainable(model)
    for parameter in parameters.values():
        parameter.grad = None
    for _ in range(number + 1):
        method.before_step(model, step)
    loss, _ = method.loss(model, batch_of(model.config.vocab_size))
    assert loss.grad_fn is None
    assert method.backward(model, loss)
    return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}, loss


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_estimate_is_the_derivative_along_z(trains: Any, tiny_llama: LlamaForCausalLM) -> None:
    method = MeZO(trains, rank=4, epsilon=1e-2 if trains == "lora" else 1e-3)
    method.autocast = False
    model = prepared(method, tiny_llama, torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found, loss = estimate(method, model)
    trainable = method.trainable(model)
    assert set(found) == set(trainable)
    for name, parameter in model.named_parameters():
        if name in trainable:  # there and back: only rounding is left
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)
            parameter.data.copy_(before[name])
            parameter.grad = None
        else:
            assert torch.equal(parameter, before[name])
    exact, _ = supervised_loss(model, batch_of(model.config.vocab_size))
    exact.backward()
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-3, atol=0)
    # All estimates are one number g times z, and g is the derivative along z.
    generator = torch.Generator().manual_seed(0)
    z = {n: torch.randn(p.shape, generator=generator) for n, p in trainable.items()}
    along = sum(float((z[n] * p.grad).sum()) for n, p in trainable.items())
    scale = sum(float(p.grad.square().sum()) for p in trainable.values()) ** 0.5
    factors = torch.cat([(found[n] / z[n]).flatten() for n in z])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=1e-4)
    assert abs(float(factors[0]) - along) < 0.05 * scale


def test_directions_depend_on_seed_step_and_batch(tiny_llama: LlamaForCausalLM) -> None:
    def first(seed: int, step: int, number: int) -> torch.Tensor:
        method = MeZO(rank=4, seed=seed)
        found, _ = estimate(method, prepared(method, tiny_llama), step, number)
        return next(iter(found.values())).sign()

    same = first(0, 3, 0)
    assert torch.equal(same, first(0, 3, 0))
    for other in (first(1, 3, 0), first(0, 4, 0), first(0, 3, 1)):
        assert 0.2 < float((other == same).float().mean()) < 0.8


def test_full_model_trains(tiny_llama: LlamaForCausalLM) -> None:
    names = [n for n, _ in tiny_llama.named_parameters()]
    model = check_training(MeZO("full"), tiny_llama, names, 1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_merge(MeZO("full"), tiny_llama, 1e-3)
    assert LAYERS[0] + ".weight" in names


def test_accumulated_batches_add_up(cli: Callable, tiny_run: Callable) -> None:
    config = configure(tiny_run(), "MeZO", 0.02, rank=4)
    config["trainer"] |= {"gradient_clip_val": None, "accumulate_grad_batches": 2, "max_steps": 2}
    module = cli("fit", config).model
    root = config["trainer"]["default_root_dir"]
    assert len(losses(root)) == 2
    assert (module.method._step, module.method._micro) == (1, 1)
    assert all(value > 0 for value in losses(root, "grad_norm"))


def test_several_devices_are_refused() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(InputError, match=r"set trainer\.devices to 1"):
        MeZO().check(trainer)
