"""The methods that a causal LM can be trained with, one a file."""

from lit_modules.methods.base import Method
from lit_modules.methods.dora import DoRA
from lit_modules.methods.falqon import Falqon
from lit_modules.methods.fishman import Fishman
from lit_modules.methods.fp6 import FP6
from lit_modules.methods.full import FullFinetune
from lit_modules.methods.ir_qlora import IRQLoRA
from lit_modules.methods.llm_int8 import LLMInt8LoRA
from lit_modules.methods.loftq import LoftQ
from lit_modules.methods.lora import LoRA
from lit_modules.methods.lora_fa import LoRAFA
from lit_modules.methods.lora_xs import LoRAXS
from lit_modules.methods.mezo import MeZO
from lit_modules.methods.mx import MX
from lit_modules.methods.peqa import PEQA
from lit_modules.methods.qa_lora import QALoRA
from lit_modules.methods.qdylora import QDyLoRA
from lit_modules.methods.qlora import QLoRA
from lit_modules.methods.torchao_fp8 import TorchaoFP8
from lit_modules.methods.vera import VeRA

__all__ = [
    "FP6",
    "MX",
    "PEQA",
    "DoRA",
    "Falqon",
    "Fishman",
    "FullFinetune",
    "IRQLoRA",
    "LLMInt8LoRA",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "LoftQ",
    "MeZO",
    "Method",
    "QALoRA",
    "QDyLoRA",
    "QLoRA",
    "TorchaoFP8",
    "VeRA",
]
