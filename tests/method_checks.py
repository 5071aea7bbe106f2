"""What every training method has to keep: it trains, resumes, and merges to what it computes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.checkpoint import read_checkpoint, training_hash
from lit_modules.methods import Method
from lit_modules.methods.state import check, check_frozen, frozen_hash, shrink

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
"""Full names of the tiny Llama's linear layers, without its output embedding."""


def configure(config: dict[str, Any], method: str, rate: float, **settings: Any) -> dict[str, Any]:
    """A `tiny_run` configuration with a method of `lit_modules.methods` instead of FALQON."""
    config["trainer"]["plugins"] = []
    options = config["model"]["init_args"]
    options["method"] = {"class_path": f"lit_modules.methods.{method}", "init_args": settings}
    options["optimizer"]["init_args"]["lr"] = rate
    return config


def losses(root: str | Path, column: str = "train/loss") -> list[float]:
    with (Path(root) / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def digest(root: str | Path) -> str:
    return training_hash(read_checkpoint(Path(root) / "checkpoints" / "last.ckpt"))


def check_run(cli: Callable[..., Any], config: dict[str, Any], root: Path) -> dict[str, Tensor]:
    """Train six steps at once and as 3 + 3: the loss falls, and both give the same bits.

    Validates and predicts from the checkpoint as well.

    Returns:
        The state dict of the checkpoint, which holds what was trained and nothing else.
    """
    config["trainer"]["default_root_dir"] = str(root / "straight")
    module = cli("fit", config).model
    summary = json.loads((root / "straight" / "summary.json").read_text())
    assert summary["method"]["name"] == module.method.name
    validated = losses(root / "straight", "val/loss")
    assert validated[-1] < validated[0]
    config["trainer"]["default_root_dir"] = str(root / "resumed")
    cli("fit", config, "--trainer.max_steps=3")
    middle = digest(root / "resumed")
    cli("fit", config, "--ckpt_path=last")
    assert digest(root / "resumed") == digest(root / "straight") != middle
    assert losses(root / "resumed") == losses(root / "straight")
    state: dict[str, Tensor] = read_checkpoint(root / "straight/checkpoints/last.ckpt")[
        "state_dict"
    ]
    assert {n.removeprefix("model.") for n in state} == set(module.method.state(module.model))
    again = cli("validate", config, "--ckpt_path=last")
    assert float(again.trainer.callback_metrics["val/loss"]) == validated[-1]
    cli("predict", config, "--ckpt_path=last", "--data.init_args.limit_val_rows=2")
    shutil.rmtree(root / "resumed")
    return state


def prepared(method: Method, base: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model, prepared; in the method's own dtype unless another is given."""
    torch.manual_seed(0)
    return method.prepare(deepcopy(base).to(dtype or method.dtype))  # type: ignore[arg-type]


def some_batch(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of tokens, all supervised."""
    tokens = torch.randint(5, vocabulary, (2, 24), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train_steps(
    method: Method,
    model: nn.Module,
    rate: float,
    steps: range = range(5),
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[list[float], set[str]]:
    """Train on one batch; losses, and names of parameters whose gradient was ever not zero."""
    batch = some_batch(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    trainable = method.trainable(model)
    optimizer = optimizer or adam(method, model, rate)
    seen, values = set(), []
    model.train()
    for step in steps:
        method.before_step(model, step)
        loss, tokens = method.loss(model, batch)
        if not method.backward(model, loss):
            loss.backward()
        method.scale_gradients(list(trainable.values()), 1.0 / tokens.float())
        seen |= {n for n, p in trainable.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
        values.append(float(loss.detach() / tokens))
    return values, seen


def adam(method: Method, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(method.trainable(model).values()), lr=rate, weight_decay=0.0)


def check_resume(
    make: Callable[[], Method], base: PreTrainedModel, rate: float
) -> dict[str, Tensor]:
    """Four steps equal two, a checkpoint loaded into a newly prepared model, and two more.

    The same with less work than `check_run`, which goes through train.py.

    Returns:
        What the checkpoint held.
    """
    method = make()
    model = prepared(method, base)
    train_steps(method, model, rate, range(4))
    straight = {n: t.clone() for n, t in method.state(model).items()}
    method = make()
    model = prepared(method, base)
    frozen = frozen_hash(method, model)
    optimizer = adam(method, model, rate)
    train_steps(method, model, rate, range(2), optimizer)
    assert frozen_hash(method, model) == frozen
    checkpoint: dict[str, Any] = {}
    shrink(method, model, checkpoint, frozen)
    checkpoint = deepcopy(checkpoint | {"optimizer": optimizer.state_dict()})
    method = make()
    torch.manual_seed(7)  # preparing again must not depend on where the generator stands
    model = method.prepare(deepcopy(base).to(method.dtype))  # type: ignore[arg-type]
    check(method, model, checkpoint, "the checkpoint")
    check_frozen(frozen_hash(method, model), checkpoint, "the checkpoint")
    state = {n.removeprefix("model."): t for n, t in checkpoint["state_dict"].items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    optimizer = adam(method, model, rate)
    optimizer.load_state_dict(checkpoint["optimizer"])
    train_steps(method, model, rate, range(2, 4), optimizer)
    resumed = method.state(model)
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), f"{name} resumes to other bits"
    return state


def check_training(
    method: Method, base: PreTrainedModel, names: Iterable[str], rate: float
) -> nn.Module:
    """Exactly the named parameters train, all get gradients, only they change, the loss falls.

    Returns:
        The trained model.
    """
    model = prepared(method, base)
    assert set(method.trainable(model)) == set(names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    before = {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    values, seen = train_steps(method, model, rate)
    assert values[-1] < values[0]
    assert seen == set(names)
    held = {t.data_ptr() for t in method.state(model).values()}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.data_ptr() not in held:
            assert torch.equal(value, before[name]), f"{name} is frozen and has changed"
    changed = model.state_dict()
    for name in names:
        assert not torch.equal(changed[name], before[name]), f"{name} has not changed"
    return model


@torch.no_grad()
def logits(method: Method | None, model: nn.Module) -> Tensor:
    """Logits on the batch that `train_steps` trains on, of a model in evaluation mode."""
    model.eval()
    tokens = some_batch(model.config.vocab_size)["input_ids"]  # type: ignore[union-attr, arg-type]
    if method is None:
        return model(input_ids=tokens).logits.float()
    with method.compute():
        return model(input_ids=tokens).logits.float()


def check_merge(
    method: Method, base: PreTrainedModel, rate: float, share: float | None = None
) -> nn.Module:
    """In float32 the merged model computes what the trained one does, and not what the base does.

    Args:
        share: How far the logits may be apart, as a share of their norm, for a method that rounds
            its inputs; others are compared value by value.

    Returns:
        The merged model.
    """
    method.autocast = False
    model = prepared(method, base, torch.float32)
    untrained = logits(method, model)
    train_steps(method, model, rate)
    trained = logits(method, model)
    merged = method.merge(model)
    kinds = {type(m) for n, m in merged.named_modules() if n in LAYERS}
    assert kinds == {nn.Linear}
    found = logits(None, merged)
    if share is not None:
        assert (trained - untrained).norm() > 10 * share * trained.norm()
        assert (found - trained).norm() < share * trained.norm()
        return merged
    assert (trained - untrained).abs().max() > 5e-4  # else the comparison says nothing
    torch.testing.assert_close(found, trained, rtol=0, atol=5e-5)
    return merged
