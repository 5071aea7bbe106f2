"""Two ranks, started once for all runs of the cases beside this file: a start takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cases_checkpoints
import cases_ddp
import cases_fsdp
import cases_tensor


def test_two_ranks(jobs: Callable, tiny_run: Callable, cli: Callable, tmp_path: Path) -> None:
    two = jobs(2)
    ddp = cases_ddp.add(two, tiny_run)
    fsdp = cases_fsdp.add(two, tiny_run)
    checkpoints = cases_checkpoints.add(two, tiny_run)
    tensor = cases_tensor.add(two, tiny_run)
    two.run()
    cases_ddp.check(two, ddp, cli, tmp_path / "ddp")
    cases_fsdp.check(two, fsdp)
    cases_checkpoints.check(two, checkpoints, cli, tmp_path / "checkpoints")
    cases_tensor.check(two, tensor, cli, tmp_path / "tensor")
