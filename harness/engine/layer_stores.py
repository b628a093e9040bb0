"""The KV stores of all layers of one job: which kind, how wide, and what a slot holds in them."""

from collections.abc import Sequence as Seq

import torch
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.harness.engine.coded_cache import CodedCache, Workspace
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.sequence import Sequence
from kvarena.harness.errors import UsageError
from kvarena.policies.base import Policy


def new_layers(
    model: PreTrainedModel,
    policy: Policy,
    codec: Codec,
    sequences: Seq[Sequence],
    *,
    kv_dtype: torch.dtype | None = None,
    num_slots: int,
    chunk_tokens: int,
) -> list[LayerCache]:
    """Stores wide enough for the longest sequence, for the whole job: memory is constant."""
    capacity = max((s.places(chunk_tokens) for s in sequences), default=0)
    num_saved_sinks = policy.sinks if policy.needs.rank_positions else 0
    side_state = (policy.columns, num_saved_sinks)
    num_layers = model.config.get_text_config().num_hidden_layers
    if not codec.codes and kv_dtype in (None, model.dtype):
        return [LayerCache(num_slots, capacity, *side_state) for _ in range(num_layers)]
    workspace = Workspace()
    return [
        CodedCache(num_slots, capacity, codec, chunk_tokens, kv_dtype, workspace, *side_state)
        for _ in range(num_layers)
    ]


def check_layers(model: PreTrainedModel, layers: Seq[LayerCache]) -> None:
    """Raise UsageError for a model with layers that keep their past somewhere else.

    A Mamba or linear-attention layer would carry state from one sequence of a packed row into the
    next, and no budget would bound it.
    """
    untouched = [index for index, layer in enumerate(layers) if not layer.is_allocated]
    if untouched:
        raise UsageError(
            f"model type {model.config.model_type} is not supported: its layers "
            f"{untouched} do not attend through transformers' attention interface"
        )


def count_bytes(layers: Seq[LayerCache], slot: int, sequence: Sequence, num_touched: int) -> None:
    """Note what the slot holds after a pass, and what it held in it with ``num_touched`` tokens."""
    kept = sum(layer.held_bytes(slot, sequence.num_live) for layer in layers)
    in_pass = sum(layer.bytes_in_pass(slot, num_touched) for layer in layers)
    workspace = max(layer.workspace_bytes(num_touched) for layer in layers)
    sequence.kv_bytes_kept = max(sequence.kv_bytes_kept, kept)
    sequence.kv_bytes_peak = max(sequence.kv_bytes_peak, in_pass + workspace)
