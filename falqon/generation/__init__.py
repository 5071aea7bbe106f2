"""Answers of a model to prompts."""

from falqon.generation.answers import Sampling, answer, end_tokens

__all__ = ["Sampling", "answer", "end_tokens"]
