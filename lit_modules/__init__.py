"""LightningModules: what is trained, validated and generates."""

from lit_modules.causal_lm import LitCausalLM
from lit_modules.schedules import WarmupConstant, WarmupCosine

__all__ = ["LitCausalLM", "WarmupConstant", "WarmupCosine"]
