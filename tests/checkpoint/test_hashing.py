"""The hash of tensors and of a training state: what it sees, and what it does not."""

from __future__ import annotations

import copy
import hashlib
import struct
from typing import Any

import pytest
import torch
from torch import nn

from falqon.checkpoint import hash_tensors, training_hash
from falqon.errors import InputError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def test_golden_value() -> None:
    """The format is stable: a change of this value needs a new version in the module's text."""
    tensors = {
        "b": torch.tensor([1.0, -0.0, float("nan")]),
        "a": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
    }
    expected = "86a75ec1c4212581cf4e505bb06adbd228fbf662b4dfd27e4c76103edbc28b94"
    assert hash_tensors(tensors) == expected


def test_documented_format() -> None:
    def token(tag: bytes, payload: bytes) -> bytes:
        return tag + struct.pack("<Q", len(payload)) + payload

    tensor = torch.tensor([[1, 2, 3]], dtype=torch.int16)
    message = b"falqon-hash-1" + b"".join(
        (
            token(b"D", struct.pack("<q", 1)),
            token(b"S", b"w"),
            token(b"T", b"torch.int16"),
            token(b"P", struct.pack("<2q", 1, 3)),
            token(b"B", struct.pack("<3h", 1, 2, 3)),
        )
    )
    assert hash_tensors({"w": tensor}) == hashlib.sha256(message).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_layout(dtype: torch.dtype) -> None:
    matrix = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    same = hash_tensors({"w": matrix})
    assert hash_tensors({"w": matrix.t().contiguous().t()}) == same  # strides
    assert hash_tensors({"w": nn.Parameter(matrix.clone(), requires_grad=False)}) == same
    assert hash_tensors({"w": matrix.t()}) != same
    assert hash_tensors({"w": matrix.reshape(4, 3)}) != same
    scalar = hash_tensors({"w": matrix[0, 1]})
    assert scalar != hash_tensors({"w": matrix[0, 1:2]})  # shape [] and [1]
    assert scalar != hash_tensors({"w": matrix[0, 0]})
    assert hash_tensors({"w": matrix[:0]}) != hash_tensors({"w": matrix[:, :0]})


def test_dtype_counts_where_bytes_agree() -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert hash_tensors({"w": codes}) != hash_tensors({"w": codes.view(torch.float8_e4m3fn)})
    assert hash_tensors({"w": torch.zeros(2)}) != hash_tensors({"w": -torch.zeros(2)})


def test_names_count_and_order_does_not() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert hash_tensors({"a": one, "b": two}) == hash_tensors({"b": two, "a": one})
    assert hash_tensors({"a": one, "b": two}) != hash_tensors({"a": two, "b": one})
    assert hash_tensors({"a": one}) != hash_tensors({"a": one, "b": torch.empty(0)})
    assert hash_tensors({}) != hash_tensors({"": torch.empty(0)})


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    proxy = nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.AdamW([proxy], lr=1e-3)
    proxy.grad = torch.randn(4, 2)
    optimizer.step()
    return {
        "global_step": 1,
        "state_dict": {
            "model.q.codes": torch.arange(18, dtype=torch.uint8).reshape(6, 3),
            "model.q.scale": torch.tensor([0.5]),
            "model.q.B": proxy.detach(),
            "model.norm.weight": torch.ones(3),
        },
        "optimizer_states": [optimizer.state_dict()],
        "FalqonPrecision": {"version": 1},
    }


def test_training_hash_golden_value() -> None:
    fixed = {
        "state_dict": {"a.codes": torch.zeros(2, dtype=torch.uint8), "a.B": torch.ones(1)},
        "optimizer_states": [{"state": {0: {"step": 1.0}}, "param_groups": [{"betas": (0.9, 1)}]}],
    }
    assert (
        training_hash(fixed) == "5fb4725f35ca8bab753dd0db96c116d4d1e576c05cef82d6619abd2817c9b1fa"
    )


def change(path: str) -> dict[str, Any]:
    checkpoint = copy.deepcopy(trained())
    state, optimizer = checkpoint["state_dict"], checkpoint["optimizer_states"][0]
    match path:
        case "codes":
            state["model.q.codes"][5, 2] ^= 1
        case "scale":
            state["model.q.scale"][0] = 0.25
        case "B":
            state["model.q.B"][3, 1] = torch.nextafter(state["model.q.B"][3, 1], torch.tensor(9.0))
        case "moment":
            optimizer["state"][0]["exp_avg_sq"][0, 0] += 1
        case "step":
            optimizer["state"][0]["step"] += 1
        case "lr":
            optimizer["param_groups"][0]["lr"] = 2e-3
        case "flag":
            optimizer["param_groups"][0]["maximize"] = True
        case "no optimizer":
            del checkpoint["optimizer_states"]
        case "frozen":
            state["model.norm.weight"][0] = 2
        case "bookkeeping":
            checkpoint["global_step"] = 2
        case "order":
            checkpoint["state_dict"] = dict(reversed(state.items()))
            checkpoint["optimizer_states"] = [dict(reversed(optimizer.items()))]
        case "loaded":
            pass
    return checkpoint


@pytest.mark.parametrize(
    "path", ["codes", "scale", "B", "moment", "step", "lr", "flag", "no optimizer"]
)
def test_all_that_training_changes_counts(path: str) -> None:
    assert training_hash(change(path)) != training_hash(trained())


@pytest.mark.parametrize("path", ["frozen", "bookkeeping", "order", "loaded"])
def test_nothing_else_counts(path: str) -> None:
    assert training_hash(change(path)) == training_hash(trained())


def test_other_methods_are_covered_whole() -> None:
    lora = {"state_dict": {"lora_A": torch.ones(2)}}
    assert training_hash(lora) != training_hash({"state_dict": {"lora_A": torch.zeros(2)}})


def test_types_of_plain_values_are_kept_apart() -> None:
    values: list[Any] = [1, 1.0, True, "1", None, [1], {"1": 1}, {1: 1}, torch.tensor(1)]
    hashes = {training_hash({"state_dict": {}, "optimizer_states": [v]}) for v in values}
    assert len(hashes) == len(values)


def test_what_has_no_stable_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot hash the object at \[0\]\['state'\]\['x'\]"):
        training_hash({"state_dict": {}, "optimizer_states": [{"state": {"x": object()}}]})
    with pytest.raises(InputError, match="not a Lightning checkpoint"):
        training_hash({"weights": {}})
