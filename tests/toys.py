"""The toy models of kvarena.harness.testing, and files for the policies that read one."""

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
    "save_policy_files",
    "save_random_heads",
    "save_random_statistics",
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


def save_random_statistics(
    path: Path,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 6,
) -> Path:
    """Statistics of no model's queries in the format of measured ones; as save_random_heads."""
    generator = torch.Generator().manual_seed(0)
    shape, num_frequencies = (num_kv_heads, num_heads // num_kv_heads, head_dim), head_dim // 2
    frequencies = 1e4 ** (-torch.arange(num_frequencies) / num_frequencies)
    found = {}
    for layer in range(num_layers):
        mean = torch.randn(shape, generator=generator)
        rest = torch.rand(*shape[:2], num_frequencies, generator=generator)
        found[f"layers.{layer}.mean_queries"] = mean
        found[f"layers.{layer}.mean_norms"] = mean.unflatten(-1, (2, -1)).norm(dim=-2) + rest
        found[f"layers.{layer}.frequencies"] = frequencies.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path)
    return path


def save_policy_files(folder: Path, **shape: int) -> None:
    """What policies read by default, in a folder that commands then run in: random, not made."""
    save_random_heads(folder / "results" / "locret" / "smollm2-135m.safetensors", **shape)
    save_random_statistics(
        folder / "results" / "triattention" / "smollm2-135m.safetensors", **shape
    )


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
