"""A budget in bytes becomes tokens, by measuring what the longest sample of a task really holds.

How many bytes a token takes depends on the codec, the data and on what the policy leaves of each
block, so it is measured on the model, not estimated. A policy that evicts gets the most tokens that
fit. One that keeps everything cannot hold fewer tokens; its codec takes the first of its coarser
settings that fits. The longest sample of the whole task is measured, whatever part of it a command
runs; a sample that comes out over the bytes all the same runs again with less (``tighter``).
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.harness.cells.cell import Allowance, Cell, total_tokens
from kvarena.harness.engine import Request
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.models.kv_size import bytes_per_token
from kvarena.tasks.base import Tokenizer

_MOST_TRIES = 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a budget in bytes came to.

    budget_tokens: None for a policy that keeps everything; times_coarser: how often its codec was
    made coarser; text_tokens, kv_bytes_kept: of the text it was measured on, prompt and answer.
    """

    budget_tokens: int | None
    times_coarser: int
    text_tokens: int
    kv_bytes_kept: int

    def allowance(self, codec: Codec) -> Allowance:
        """The same for every sample; codec: the one that was asked for."""
        for _ in range(self.times_coarser):
            codec = _coarser(codec)
        return Allowance(budget_tokens=self.budget_tokens, codec=codec)


def fit_cell(cell: Cell, model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Fit:
    """Settle the tokens or the codec of a cell with a budget in bytes.

    The result is kept in the cell's folder. It depends on the cell alone, not on ``limit`` or
    ``shard``: rows of one command are those of any other. Raises UsageError if nothing fits.
    """
    path = folder / "fit.json"
    text = _longest_text(cell, tokenizer)
    kept = _read(path)
    if kept is not None and kept.text_tokens == len(text):
        return kept
    way = "how many tokens fit" if cell.policy.evicts else "the finest setting that fits"
    _tell(cell, f"finding {way} on the longest sample, {len(text)} tokens with its answer")
    fit = _fit_tokens(cell, model, text) if cell.policy.evicts else _fit_codec(cell, model, text)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(fit)) + "\n")
    return fit


def tighter(cell: Cell, allowance: Allowance, kv_bytes_kept: int) -> Allowance:
    """What a sample that held too many bytes may hold when it runs again.

    Raises UsageError when there is nothing less.
    """
    limit, tokens = cell.bound.bytes, allowance.budget_tokens
    assert limit is not None, "only a budget in bytes can be exceeded"
    if tokens is None:
        return replace(allowance, codec=_coarser(allowance.codec))
    fewer = min(tokens - 1, tokens * limit // kv_bytes_kept)
    if fewer < 1:
        raise UsageError(f"budget={cell.bound.label}: not one token of this sample fits")
    return replace(allowance, budget_tokens=fewer)


def _coarser(codec: Codec) -> Codec:
    coarser = codec.coarser()
    if coarser is None:
        raise UsageError(f"{type(codec).__name__} has no coarser setting; raise the budget")
    return coarser


def _read(path: Path) -> Fit | None:
    """What an earlier command found; None if there is nothing, or nothing whole."""
    try:
        return Fit(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _longest_text(cell: Cell, tokenizer: Tokenizer) -> list[int]:
    """The longest prompt of the whole task, followed by as many tokens as its answer may have.

    What they say does not matter, they count as if the answer were there: the prompt again.
    """
    samples = cell.all_samples(tokenizer)
    longest = max(samples, key=total_tokens)
    num_tokens = total_tokens(longest) - 1
    if cell.context_tokens is not None:  # whatever is longer than that cannot run
        num_tokens = min(num_tokens, cell.context_tokens - _num_forced(cell.codec))
    return list(islice(cycle(longest.prompt_token_ids), num_tokens))


def _fit_tokens(cell: Cell, model: PreTrainedModel, text: list[int]) -> Fit:
    """The most tokens that fit, by a line through the measurements so far."""
    limit = cell.bound.bytes
    assert limit is not None
    tokens = limit // bytes_per_token(model.config, 2)
    best: Fit | None = None
    measured: list[tuple[int, int]] = []  # bytes and tokens
    for _ in range(_MOST_TRIES):
        tokens = min(max(tokens, 1), len(text))
        held = _held_bytes(cell, model, text, cell.codec, tokens)
        _tell(cell, f"{tokens} tokens take {held / 1e6:.2f} MB")
        if held <= limit and (best is None or best.kv_bytes_kept < held):
            best = Fit(
                budget_tokens=tokens,
                times_coarser=0,
                text_tokens=len(text),
                kv_bytes_kept=held,
            )
        # Exact tokens fit to the last one, coded ones to the last block.
        step = held / tokens * (cell.codec.block if cell.codec.codes else 1)
        if limit - step < held <= limit or (held <= limit and tokens == len(text)):
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


def _fit_codec(cell: Cell, model: PreTrainedModel, text: list[int]) -> Fit:
    """The first of the codec's settings, from the one asked for to coarser ones, that fits."""
    limit = cell.bound.bytes
    assert limit is not None
    codec: Codec | None = cell.codec
    held = times = 0
    while codec is not None:
        held = _held_bytes(cell, model, text, codec, None)
        _tell(cell, f"{cell.codec_label(codec)} takes {held / 1e6:.2f} MB")
        if held <= limit:
            return Fit(
                budget_tokens=None,
                times_coarser=times,
                text_tokens=len(text),
                kv_bytes_kept=held,
            )
        codec, times = codec.coarser(), times + 1
    raise UsageError(
        f"budget={cell.bound.label}: policy {cell.policy_label} keeps everything, which takes "
        f"{held / 1e6:.2f} MB for the longest sample under the coarsest setting of codec "
        f"{cell.codec_label()}; raise the budget or choose a policy that evicts"
    )


def _held_bytes(
    cell: Cell, model: PreTrainedModel, text: list[int], codec: Codec, tokens: int | None
) -> int:
    """Most bytes held between passes while the text is read and a block's worth is written."""
    request = Request(prompt=text, forced=text[: _num_forced(codec)], budget_tokens=tokens)
    (generation,) = cell.engine(model, codec, slots=1).generate([request])
    return generation.kv_bytes_kept


def _num_forced(codec: Codec) -> int:
    """Tokens to write: the exact window grows until a block is full."""
    return codec.block if codec.codes else 1


def _tell(cell: Cell, text: str) -> None:
    print(f"{cell.label}: {text}", file=sys.stderr, flush=True)
