"""When another rank is gone: one message, an end for all, and a way to go on."""

from __future__ import annotations

import os

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
        f"rank {rank} cannot reach another rank any more: its process was killed, or its machine "
        f"or network failed ({str(error).strip().splitlines()[-1][:120]}). All ranks stop. Resume "
        f"from {saved} with --ckpt_path last; torchrun --max-restarts does so on its own.",
        _is_first(rank),
    )


def _is_first(rank: int) -> bool:
    """Whether this is the one rank to report it."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("falqon/lost", 1)) == 1
    except (RuntimeError, ValueError):
        return rank == 1  # the store was rank zero's: that is the one which is gone


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
