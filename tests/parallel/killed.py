"""`train.py` of which rank 1 is killed in the middle of a step, in the first attempt only."""

from __future__ import annotations

import os
import signal
from typing import Any

from falqon.training import run
from lit_modules import LitCausalLM

step = LitCausalLM.training_step


def training_step(self: LitCausalLM, batch: Any, batch_idx: int) -> Any:
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if is_first and self.global_rank == 1 and self.trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)


LitCausalLM.training_step = training_step  # type: ignore[method-assign]
if __name__ == "__main__":
    run()
