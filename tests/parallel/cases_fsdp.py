"""FSDP2: the codes of DDP to the last bit, with a share of its memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from falqon.checkpoint import read_checkpoint

STEPS = "--trainer.max_steps=3"
CHECKED = "--rank_checksum.every_n_steps=1"  # shards are no reason to stop


def add(two: Any, tiny_run: Callable) -> list[str]:
    """Add the runs; returns the names of policies."""
    policies = {
        "live": tiny_run(
            update={"preset": "compensated", "every": 2, "max_age": 12, "calibration_rows": 6},
            rounding="stochastic",
        ),
        "flips": tiny_run(update={"preset": "anchored", "select": "flips", "max_age": 12}),
    }
    policies["flips"]["model"]["init_args"]["optimizer"]["init_args"]["fused"] = True
    policies["live"]["trainer"] |= {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "limit_val_batches": 0,
    }
    for name, config in policies.items():
        config["data"]["init_args"]["batch_size"] = 2
        for strategy in ("ddp", "fsdp2"):
            config["trainer"]["strategy"] = strategy
            more = {"watch": 3, "answers": False} if name == "live" else {"answers": True}
            two.add(f"{name}-{strategy}", config, STEPS, CHECKED, **more)
    return list(policies)


def check(two: Any, policies: list[str]) -> None:
    """Look at what they noted."""
    assert "answer after" in two.output  # ranks that end early do not leave the others waiting
    for name in policies:
        ddp, fsdp = two.notes(f"{name}-ddp"), two.notes(f"{name}-fsdp2")
        assert len(set(ddp[0]["hashes"])) >= 3
        for one, other in zip(ddp, fsdp, strict=True):
            assert one["hashes"] == other["hashes"], name
            assert one["hash"] == other["hash"], name  # after everything pending was written
            assert other["bytes_held"] < 0.52 * other["bytes_whole"]
    # The second optimizer step writes rows: norms of all rows, and the rows, in an exchange each.
    state = read_checkpoint(two.directory("live-ddp") / "checkpoints" / "last.ckpt")["state_dict"]
    shapes = [tensor.shape for name, tensor in state.items() if name.endswith(".B")]
    for note in two.notes("live-fsdp2"):
        gathers = [place for place, (kind, _) in enumerate(note["sent"]) if kind == "all_gather"]
        behind = [size for kind, size in note["sent"][gathers[-1] + 1 :] if kind != "barrier"]
        # Weights, forward and backward: embedding, three units of two layers; the head once.
        assert len(gathers) == 2 * (1 + 2 * 3) + 1
        norms = sum(out for out, _ in shapes)
        rows = sum(min(out, 4 + -(-out // 6)) * rank for out, rank in shapes)
        assert (norms, rows) in pairwise(behind), behind
