"""A budget in bytes becomes tokens, by measuring what a cell's longest sample really holds.

How many bytes a token takes depends on the codec, the data and on what the policy leaves of each
block, so it is measured on the model, not estimated. A policy that evicts gets the most tokens that
fit. One that keeps everything cannot hold fewer tokens; its codec takes the first of its coarser
settings that fits.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.harness.cell import Cell
from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.kv_bytes import bytes_per_token
from kvarena.tasks.base import Sample

_MOST_TRIES = 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a budget in bytes came to.

    budget_tokens: None for a policy that keeps everything; codec: options that differ from those
    asked for; kv_bytes_kept: of the sample it was measured on.
    """

    budget_tokens: int | None
    codec: dict[str, Any]
    kv_bytes_kept: int


def fit_cell(cell: Cell, model: PreTrainedModel, samples: Sequence[Sample], folder: Path) -> None:
    """Settle the cell's tokens and codec for its budget in bytes; nothing to do for other budgets.

    The result is kept in the cell's folder, so that a later command with more samples goes on with
    the same. Raises UsageError if nothing fits.
    """
    if cell.bound.bytes is None:
        return
    path = folder / "fit.json"
    if path.exists():
        cell.adopt(Fit(**json.loads(path.read_text())))
        return
    longest = max(samples, key=lambda s: len(s.prompt_token_ids) + s.max_new_tokens)
    # Read as if the answer were there already, so that it is counted; its text does not matter.
    prompt = [*longest.prompt_token_ids, *longest.prompt_token_ids[: longest.max_new_tokens]]
    fit = (
        _fit_tokens(cell, model, prompt) if cell.policy.evicts else _fit_codec(cell, model, prompt)
    )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(fit)) + "\n")
    cell.adopt(fit)
    settled = f"{fit.budget_tokens} tokens" if cell.policy.evicts else cell.codec_used
    print(f"{cell.label}: {settled}, {fit.kv_bytes_kept / 1e6:.2f} MB", file=sys.stderr)


def _fit_tokens(cell: Cell, model: PreTrainedModel, prompt: list[int]) -> Fit:
    """The most tokens that fit, by a line through the measurements so far."""
    limit = cell.bound.bytes
    assert limit is not None
    tokens = limit // bytes_per_token(model.config, 2)
    best: Fit | None = None
    measured: list[tuple[int, int]] = []  # bytes and tokens
    for _ in range(_MOST_TRIES):
        tokens = min(max(tokens, 1), len(prompt))
        held = _held_bytes(cell, model, prompt, cell.codec, tokens)
        if held <= limit and (best is None or best.kv_bytes_kept < held):
            best = Fit(budget_tokens=tokens, codec={}, kv_bytes_kept=held)
        # Exact tokens fit to the last one, coded ones to the last block.
        step = held / tokens * (cell.codec.block if cell.codec.codes else 1)
        if limit - step < held <= limit or (held <= limit and tokens == len(prompt)):
            break
        measured.append((held, tokens))
        tokens = _next_tokens(limit, measured)
    if best is None:
        raise UsageError(
            f"budget={cell.bound.label}: no number of tokens fits with this policy and codec; "
            "raise the budget or make the codec's window smaller"
        )
    return best


def _next_tokens(limit: int, measured: list[tuple[int, int]]) -> int:
    """Where a line through the two measurements nearest to the limit, or one and 0, meets it."""
    nearest = sorted(measured, key=lambda one: abs(one[0] - limit))[:2]
    (held, tokens), (other_held, other_tokens) = [*nearest, (0, 0)][:2]
    if held == other_held:
        return tokens - 1
    slope = (tokens - other_tokens) / (held - other_held)
    guess = int(tokens + slope * (limit - held))
    return guess if guess not in {tokens for _, tokens in measured} else guess - 1


def _fit_codec(cell: Cell, model: PreTrainedModel, prompt: list[int]) -> Fit:
    """The first of the codec's settings, from the one asked for to coarser ones, that fits."""
    limit = cell.bound.bytes
    assert limit is not None
    codec: Codec | None = cell.codec
    held = 0
    while codec is not None:
        held = _held_bytes(cell, model, prompt, codec, None)
        if held <= limit:
            return Fit(
                budget_tokens=None, codec=_differences(cell.codec, codec), kv_bytes_kept=held
            )
        codec = codec.coarser()
    raise UsageError(
        f"budget={cell.bound.label}: policy {cell.policy_label} keeps everything, which takes "
        f"{held / 1e6:.2f} MB for the longest sample under the coarsest setting of codec "
        f"{cell.codec_label}; raise the budget or choose a policy that evicts"
    )


def _held_bytes(
    cell: Cell, model: PreTrainedModel, prompt: list[int], codec: Codec, tokens: int | None
) -> int:
    """Most bytes held between passes while the prompt is read and a block's worth is written."""
    engine = Engine(
        model,
        cell.policy,
        codec=codec,
        kv_dtype=cell.torch_kv_dtype,
        chunk_tokens=cell.chunk_tokens,
        slots=1,
        attention=cell.attention,
    )
    num_new = codec.block if codec.codes else 1  # the exact window grows until a block is full
    (generation,) = engine.generate(
        [prompt], forced=[prompt[:num_new]], budgets=[tokens], stop_token_ids=[]
    )
    return generation.kv_bytes_kept


def _differences(asked: Codec, settled: Codec) -> dict[str, Any]:
    names = [option.name for option in fields(settled)]
    return {
        name: getattr(settled, name)
        for name in names
        if getattr(settled, name) != getattr(asked, name)
    }
