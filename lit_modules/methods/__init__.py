"""The methods that a causal LM can be trained with, one a file."""

from lit_modules.methods.base import Method
from lit_modules.methods.falqon import Falqon
from lit_modules.methods.fishman import Fishman
from lit_modules.methods.fp6 import FP6
from lit_modules.methods.full import FullFinetune
from lit_modules.methods.ir_qlora import IRQLoRA
from lit_modules.methods.lora import LoRA
from lit_modules.methods.mezo import MeZO
from lit_modules.methods.mx import MX
from lit_modules.methods.peqa import PEQA
from lit_modules.methods.qa_lora import QALoRA
from lit_modules.methods.torchao_fp8 import TorchaoFP8

__all__ = [
    "FP6",
    "MX",
    "PEQA",
    "Falqon",
    "Fishman",
    "FullFinetune",
    "IRQLoRA",
    "LoRA",
    "MeZO",
    "Method",
    "QALoRA",
    "TorchaoFP8",
]
