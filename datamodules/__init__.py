"""Instruction data for fine-tuning: from a file or a hub dataset to masked batches.

`sources` reads rows, `threads` and the data modules make conversations of them, `prompts` makes
text with marked responses, `encoding` tokens with a mask, `packing` rows, `sampling` and `loader`
batches that can be resumed, `collate` tensors.
"""

from datamodules.alpaca import AlpacaDataModule
from datamodules.oasst1 import OASST1DataModule

__all__ = ["AlpacaDataModule", "OASST1DataModule"]
