"""The methods that a causal LM can be trained with, one a file."""

from lit_modules.methods.base import Method
from lit_modules.methods.falqon import Falqon
from lit_modules.methods.full import FullFinetune
from lit_modules.methods.lora import LoRA

__all__ = ["Falqon", "FullFinetune", "LoRA", "Method"]
