"""A model's name becomes weights, tokenizer and context length. The door is ``load_model``."""

from kvarena.harness.models.loading import ModelSpec, find_model, load_model

__all__ = ["ModelSpec", "find_model", "load_model"]
