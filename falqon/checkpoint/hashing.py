"""Fingerprints of tensors and of a training state, stable between runs and machines.

Format, version 1, all integers little-endian: SHA-256 over the text "falqon-hash-1" and then one
token after the other. A token is a one-letter tag, the length of its payload as 8 bytes, and the
payload. Lengths make the encoding free of ambiguity: no two different inputs give the same bytes.
Tensor data are the raw bytes in memory order of the contiguous tensor, as little-endian machines
(all that torch supports) hold them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from falqon.errors import InputError

# What FALQON training changes in a state dict. Everything else there is frozen.
TRAINED_SUFFIXES = (".codes", ".scale", ".B")
_VERSION = b"falqon-hash-1"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and raw bytes.

    The order of the mapping, the device and the strides make no difference. Signed zeros and NaN
    payloads do, since bytes are compared and not values.

    Args:
        tensors: Any dtype and shape, FP8 and 0-d included.

    Returns:
        64 hexadecimal digits.
    """
    digest = _Digest()
    digest.add(tensors)
    return digest.hexdigest()


def training_hash(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 of all that training changes in a Lightning checkpoint.

    Covers the FP8 codes, their scales and the proxies B, what the update policy keeps beside them,
    and the whole optimizer state with its parameter groups. Two runs with equal hashes are in the
    same state of training. A small checkpoint is covered with the changes it holds, so it has
    another hash than the same state with all weights. A checkpoint without melded layers
    (another method's) is covered with its whole state dict.

    Args:
        checkpoint: A loaded checkpoint with `state_dict` and, unless it was saved weights-only,
            `optimizer_states`.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: It is not a checkpoint, or holds a value that has no stable encoding.
    """
    try:
        state = checkpoint["state_dict"]
    except (KeyError, TypeError) as error:
        raise InputError("no 'state_dict': this is not a Lightning checkpoint.") from error
    trained = {name: value for name, value in state.items() if name.endswith(TRAINED_SUFFIXES)}
    digest = _Digest()
    digest.add(trained or dict(state))
    if "FalqonChanges" in checkpoint:
        digest.add(checkpoint["FalqonChanges"])
    digest.add(checkpoint.get("optimizer_states") or [])
    policy = (checkpoint.get("FalqonPrecision") or {}).get("proxy") or {}
    if policy:
        digest.add({name: policy.get(name) for name in ("applied", "last_written", "steps")})
    return digest.hexdigest()


class _Digest:
    """SHA-256 over a tree of mappings, sequences, tensors and plain values."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256(_VERSION)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()

    def add(self, value: Any, where: str = "") -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, Mapping):
            self._token(b"D", struct.pack("<q", len(value)))
            # Keys of one mapping may be of several types; by type, then value, is a total order.
            for key in sorted(value, key=lambda key: (type(key).__name__, key)):
                self.add(key, where)
                self.add(value[key], f"{where}[{key!r}]")
        elif isinstance(value, list | tuple):
            self._token(b"L", struct.pack("<q", len(value)))
            for index, item in enumerate(value):
                self.add(item, f"{where}[{index}]")
        else:
            self._add_plain(value, where)

    def _add_plain(self, value: Any, where: str) -> None:
        if value is None:
            self._token(b"N", b"")
        elif isinstance(value, bool):  # before int: True is an int
            self._token(b"O", b"\x01" if value else b"\x00")
        elif isinstance(value, int):
            self._token(b"I", str(value).encode())
        elif isinstance(value, float):
            self._token(b"F", struct.pack("<d", value))
        elif isinstance(value, str):
            self._token(b"S", value.encode())
        elif isinstance(value, torch.dtype | torch.device):
            self._token(b"Y", str(value).encode())
        else:
            raise InputError(
                f"cannot hash the {type(value).__name__} at {where or 'the top'}: only tensors, "
                "mappings, lists, numbers, text, booleans and None have a stable encoding."
            )

    def _add_tensor(self, tensor: Tensor) -> None:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        self._token(b"T", str(plain.dtype).encode())
        self._token(b"P", struct.pack(f"<{plain.dim()}q", *plain.shape))
        # Bytes by reinterpretation: numpy knows neither bfloat16 nor float8.
        raw = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
        self._token(b"B", memoryview(raw))  # type: ignore[arg-type]  # an array is a buffer

    def _token(self, tag: bytes, payload: bytes | memoryview) -> None:
        self._sha.update(tag + struct.pack("<Q", len(payload)))
        self._sha.update(payload)
