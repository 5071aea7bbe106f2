"""When another rank is gone: one message, an end for all, and a way to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import distributed as dist

from falqon.errors import InputError

_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "timed out waiting",
    "nccl watchdog",
    "remote process exited",
)


class RankLost(InputError):
    """Another rank does not answer any more.

    Attributes:
        is_first: no other rank has said so yet.
    """

    def __init__(self, message: str, is_first: bool) -> None:
        super().__init__(message)
        self.is_first = is_first


def explain(error: BaseException, saved: str) -> RankLost | None:
    """What an error in talking to other ranks means; None for any other error.

    Args:
        error: that ended the training here.
        saved: the checkpoint to go on from.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    text = str(error).lower()
    is_sign = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    if not is_sign and not isinstance(error, dist.DistError):
        return None
    rank = dist.get_rank()
    return RankLost(
        _message(rank, str(error).strip().splitlines()[-1][:120], saved), _is_first(rank)
    )


def _message(rank: int, why: str, saved: str) -> str:
    return (
        f"rank {rank} cannot reach another rank any more: its process was killed, or its machine "
        f"or network failed ({why}). All ranks stop. Resume from {saved} with --ckpt_path last; "
        "torchrun --max-restarts does so on its own."
    )


def _is_first(rank: int) -> bool:
    """Whether this is the one rank to report it."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("falqon/lost", 1)) == 1
    except (RuntimeError, ValueError):
        return rank == 1  # the store was rank zero's: that is the one which is gone


class RankWatch(Callback):
    """Gives a rank that has started others time to end by itself when one of them is gone.

    Where train.py starts a node's ranks itself, Lightning kills the first of them within five
    seconds of another one's death, without a word on what to do, be it in the middle of a step or
    of a checkpoint. It notices by itself when it next talks to the others; only if it does not
    within `patience` seconds, it is ended here.

    Args:
        saved: the checkpoint to go on from, in the run's directory.
        patience: seconds.
    """

    def __init__(self, saved: Path, patience: float = 120.0) -> None:
        self.saved, self.patience = saved, patience

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place of Lightning's observer."""
        started: list[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
        if not started:
            return
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread._sleep_period = 10**8  # type: ignore[attr-defined]
                thread.name = "child-process-observer, relieved"
                arguments = (started, trainer.global_rank, Path(trainer.default_root_dir))
                watch = threading.Thread(target=self._watch, args=arguments, daemon=True)
                watch.start()

    def _watch(self, started: list[subprocess.Popen[Any]], rank: int, root: Path) -> None:
        while not any(process.poll() for process in started):
            if all(process.returncode == 0 for process in started):
                return
            time.sleep(0.5)
        time.sleep(self.patience)  # this thread ends with the process
        gone = next(process for process in started if process.returncode)
        why = f"process {gone.pid} ended with status {gone.returncode}"
        message = _message(rank, why, str(root / self.saved))
        try:
            print(f"train.py: error: {message}", file=sys.stderr, flush=True)
        finally:  # also if nobody listens any more
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
            os._exit(1)


def is_restarted() -> bool:
    """Whether a launcher started this run again after it had failed."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in counts)


def separate_attempts() -> None:
    """Keep a restarted run from the addresses that its previous attempt left behind.

    torchrun lends all attempts one store, in which ranks find each other: one that is early would
    find where rank zero was before, and fail. With a port of its own rank zero starts a new store.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)
    if attempt and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        port = int(os.environ["MASTER_PORT"]) + attempt
        os.environ["MASTER_PORT"] = str(port if port < 2**16 else port - 2**15)
