"""The toy models of kvarena.harness.testing, and heads for the policy that reads trained ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvarena.harness.engine import Batch, Generation, Request
from kvarena.harness.testing.toy_models import (
    ARCHITECTURES,
    VOCAB,
    kernel_for,
    toy_model,
    toy_prompt,
)

__all__ = [
    "ARCHITECTURES",
    "VOCAB",
    "finished",
    "kernel_for",
    "requests",
    "save_random_heads",
    "toy_model",
    "toy_prompt",
]


def save_random_heads(
    path: Path,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 6,
) -> Path:
    """Untrained retaining heads in the format of trained ones; the defaults fit every toy model."""
    generator = torch.Generator().manual_seed(0)
    heads = {}
    for layer in range(num_layers):
        num_features, num_hidden = (num_heads + 2 * num_kv_heads) * head_dim, 8
        heads[f"layers.{layer}.w1"] = torch.randn(num_features, num_hidden, generator=generator)
        heads[f"layers.{layer}.w2"] = torch.randn(num_hidden, num_kv_heads, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(heads, path)
    return path


def requests(prompts: Sequence[Sequence[int]], **lists: Sequence[Any]) -> list[Request]:
    """One request per prompt; every option is a list with an entry for each."""
    return [
        Request(prompt=prompt, **{name: values[i] for name, values in lists.items()})
        for i, prompt in enumerate(prompts)
    ]


def finished(batch: Batch) -> list[Generation]:
    """All generations of a batch, by index; what it held last is still in its layers."""
    found: list[Generation] = []
    while batch.has_work:
        found += batch.step()
    return sorted(found, key=lambda generation: generation.index)
