"""One forward pass over a text, in which something stands where the engine's ForwardPass does.

So what is recorded there is what the engine hands to policies, on every model that it runs.

Shape letters: H query heads, K KV heads, Q tokens of the text, D head dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvarena.harness.engine.attention import AttentionSpec, Kernel, visible_tokens
from kvarena.harness.engine.forward_pass import ATTENTION_NAME


class Watcher(Protocol):
    """Attends in every layer, and keeps of it what it wants."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Output [1, Q, H, D]; query [1, H, Q, D], key and value [1, K, Q, D], post-RoPE."""


@torch.no_grad()
def watch_pass(model: PreTrainedModel, token_ids: Sequence[int], watcher: Watcher) -> None:
    """Run the text's tokens, at positions 0, 1, ..., through all layers."""
    with _attention_of_the_engine(model):
        # The base model has no head over the vocabulary, a fifth of a small model's work.
        model.base_model(
            input_ids=torch.tensor([list(token_ids)], device=model.device),
            position_ids=positions_of(len(token_ids), model.device),
            use_cache=False,
            forward_pass=watcher,
        )


def positions_of(num_tokens: int, device: torch.device) -> Tensor:
    """[1, Q], of a text from its first token on."""
    return torch.arange(num_tokens, device=device)[None]


def attend_whole(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
) -> Tensor:
    """What ``Watcher.attend`` returns, if nothing was evicted."""
    positions = positions_of(query.shape[2], query.device)
    mask = visible_tokens(positions, positions[:, None], query.shape[2], spec.sliding_window)
    return kernel(query, key, value, mask, spec).transpose(1, 2)


@contextmanager
def _attention_of_the_engine(model: PreTrainedModel) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before  # the model stays as the caller knows it
