"""One method's training in a process of its own, watched: what `benchmarks.compare` starts.

    python -m benchmarks.compare_worker JOB.json

The job names configurations and flags for `train.py fit`; the run is exactly that, with one more
callback. Times are of the steps alone (forward, backward, clipping, optimizer, update), without the
loader, logging, checkpoints and validation. The result is written beside the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_probe import Probe
from falqon.callbacks.report import peak_memory


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says and gather what was seen, in plain containers."""
    import datamodules  # noqa: F401  (its classes are named in the configuration)
    from falqon.training import FalqonCLI, run

    if not job["closing"]:  # a round for times alone: what is pending need not be written
        FalqonCLI.after_fit = lambda self: None  # type: ignore[method-assign]
    torch.set_num_threads(job["threads"])
    cli = run(["fit", *job["arguments"]])
    trainer, module = cli.trainer, cli.model
    probe = next(c for c in trainer.callbacks if isinstance(c, Probe))  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    checkpoint = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    result = {
        "describe": module.method.describe(),
        "optimizer": type(trainer.optimizers[0]).__name__,
        "lr": job["lr"],
        "steps": probe.steps,
        "validations": probe.validations,
        "breakdown": probe.parts,
        "no_gradient": sorted(probe.unseen),
        "unchanged": probe.unchanged(module),
        "trainable": probe.trainable,
        "peak_rss_bytes": probe.peak_rss,
        "peak_rss_with_loading_bytes": peak_memory(torch.device("cpu")),
        "device_bytes": peak_memory(device) if device.type == "cuda" else None,
        "checkpoint_bytes": checkpoint.stat().st_size,
    }
    for path in Path(trainer.default_root_dir).rglob("*.ckpt"):
        path.unlink()
    return result


def main(argv: list[str] | None = None) -> int:
    (path,) = sys.argv[1:] if argv is None else argv
    result = work(json.loads(Path(path).read_text()))
    target = Path(path).with_suffix(".result.json")
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
