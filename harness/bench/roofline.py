"""What the machine can do at most, measured, and how much of it each kind of pass reaches.

Matrix products: all linear layers of the model, one after the other, on many rows. Bandwidth: the
better of reading one large array and the triad a = b + s c of STREAM (J. McCalpin, "Memory
Bandwidth and Machine Balance in Current High Performance Computers", 1995).
"""

from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from kvarena.harness.bench.measure import Case, TimedCase, now_sec
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.bench.timed_passes import warm_pass_sec
from kvarena.harness.models.packed_linear import PackedLinear

POLICY = "keydiff"
_REPEATS = 3  # of a machine's rate at each visit; the fastest counts


def roofline(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """The machine's rates, and passes at steady state with the work they do."""
    chunks = {(1, sizes.chunk_tokens), (1, sizes.wide_chunk_tokens)}
    chunks.add((sizes.job_slots, sizes.chunk_tokens))
    tokens = {(slots, sizes.budget_tokens) for slots in sizes.slots}
    tokens |= {(sizes.job_slots, cache_tokens) for cache_tokens in sizes.caches}
    return [
        *machine(subject, sizes.matmul_rows, sizes.stream_floats),
        *(
            rated_pass(
                subject,
                slots=slots,
                cache_tokens=sizes.budget_tokens,
                passes=sizes.passes,
                chunk_tokens=chunk_tokens,
            )
            for slots, chunk_tokens in sorted(chunks)
        ),
        *(
            rated_pass(subject, slots=slots, cache_tokens=cache_tokens, passes=sizes.passes)
            for slots, cache_tokens in sorted(tokens)
        ),
    ]


def machine(subject: Subject, matmul_rows: int, stream_floats: int) -> list[TimedCase]:
    """``matmul_flops_per_sec`` in the model's data type and ``memory_bytes_per_sec``."""
    model = subject.model
    layers = _linear_layers(model)
    inputs = {
        width: torch.randn(matmul_rows, width, device=model.device, dtype=model.dtype)
        for width in {layer.in_features for layer in layers}
    }
    flops = 2 * matmul_rows * sum(map(_weights, layers))

    @torch.inference_mode()
    def multiply() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    def matmul() -> dict[str, float]:
        return {"matmul_flops_per_sec": flops / _fastest_sec(multiply, model.device)}

    def bandwidth() -> dict[str, float]:
        a, b, c = (torch.ones(stream_floats, device=model.device) for _ in range(3))
        triad_sec = _fastest_sec(lambda: torch.add(b, c, alpha=3.0, out=a), model.device)
        read_sec = _fastest_sec(lambda: b.sum(), model.device)
        return {"memory_bytes_per_sec": b.nbytes * max(3 / triad_sec, 1 / read_sec)}

    return [
        TimedCase(case=Case(section="roofline", what="matmul", system="machine"), run=matmul),
        TimedCase(case=Case(section="roofline", what="memory", system="machine"), run=bandwidth),
    ]


def rated_pass(
    subject: Subject,
    *,
    slots: int,
    cache_tokens: int,
    passes: int,
    chunk_tokens: int | None = None,
    policy: str = POLICY,
) -> TimedCase:
    """A pass that reads a chunk, or writes a token, in every slot: its operations and bytes."""
    reads = chunk_tokens is not None
    flops = pass_flops(subject.model, slots, cache_tokens, chunk_tokens or 1, not reads)
    moved_bytes = pass_bytes(subject.model, slots, cache_tokens)

    def run() -> dict[str, float]:
        pass_sec = warm_pass_sec(
            subject,
            policy,
            slots=slots,
            cache_tokens=cache_tokens,
            passes=passes,
            chunk_tokens=chunk_tokens,
        )
        return {
            "pass_sec": pass_sec,
            "flops_per_sec": flops / pass_sec,
            "bytes_per_sec": moved_bytes / pass_sec,
        }

    return TimedCase(
        case=Case(
            section="roofline",
            what="prefill" if reads else "decode",
            policy=policy,
            attention="sdpa",
            chunk_tokens=chunk_tokens,
            slots=slots,
            cache_tokens=cache_tokens,
        ),
        run=run,
    )


def pass_flops(
    model: PreTrainedModel, slots: int, cache_tokens: int, new_tokens: int, writes: bool
) -> float:
    """Operations of linear layers and attention, a multiply-add as two; only pairs a query sees."""
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    linear = sum(map(_weights, _linear_layers(model))) * slots * new_tokens
    chosen = _weights(output) * slots if writes else 0
    pairs = slots * (new_tokens * cache_tokens + new_tokens * (new_tokens + 1) // 2)
    # Queries with keys, then weights with values: a product of length D each, in every query head.
    attention = 2 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * (linear + chosen + attention)


def pass_bytes(model: PreTrainedModel, slots: int, cache_tokens: int) -> float:
    """Bytes that a pass has to read: every weight once, and the keys and values of all slots."""
    config = model.config.get_text_config()
    weights = sum(map(_weights, _linear_layers(model)))
    weights += _weights(model.get_output_embeddings())
    per_token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return float((weights + slots * cache_tokens * per_token) * model.dtype.itemsize)


def with_fractions(measured: pd.DataFrame) -> pd.DataFrame:
    """Measurements plus, for each pass, its shares of the machine's rates in the same round."""
    rates = measured[measured["system"] == "machine"].set_index(["metric", "round"])["value"]
    if rates.empty:
        return measured
    pieces = [measured]
    for metric, limit, share in (
        ("flops_per_sec", "matmul_flops_per_sec", "of_matmul_rate_ratio"),
        ("bytes_per_sec", "memory_bytes_per_sec", "of_bandwidth_ratio"),
    ):
        reached = measured[measured["metric"] == metric]
        limits = reached["round"].map(rates[limit])
        pieces.append(reached.assign(metric=share, value=reached["value"] / limits))
    return pd.concat(pieces, ignore_index=True)


def _linear_layers(model: PreTrainedModel) -> list[nn.Linear | PackedLinear]:
    """All of them but the output layer, which a pass that reads does not use."""
    output = model.get_output_embeddings()
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear | PackedLinear) and layer is not output
    ]


def _weights(layer: nn.Linear | PackedLinear) -> int:
    return layer.in_features * layer.out_features


def _fastest_sec(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        started = now_sec(device)
        work()
        times.append(now_sec(device) - started)
    return min(times)
