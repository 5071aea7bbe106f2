"""Scores of a model: tasks of lm-eval on the model in memory, and perplexity on a file."""
