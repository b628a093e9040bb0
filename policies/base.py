"""What a policy is: a rule that says which cached tokens matter.

A policy only scores. The engine protects, ranks, evicts, moves and counts, the same way for all.
To add one: a file here with a ``Policy`` subclass, and ``conf/policy/<file name>.yaml``.

Shape letters: S sequences side by side, H query heads, K KV heads, T cached tokens, D head dim,
W query tokens whose attention was asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

# The column that the engine fills for a policy with ``needs.token_scores``.
TOKEN_SCORE = "token_score"

# Ranks are counted while the text is at most so many times the cached tokens: the workspace is then
# 5 * 16 bytes per cached token of one layer, where its keys and values take some 512.
_COUNT_UP_TO = 16


def at_least_float32(tensor: Tensor) -> Tensor:
    """Scores of half-precision keys are computed in float32; float64 stays float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class OptionError(ValueError):
    """An option does not suit the model, which ``score`` is the first to see: bad input, no bug."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the engine must hand over; what is not asked for is not computed.

    attention_rows: attention of the last so many queries of this pass (fewer in a short pass).
    attention_mass: per key, the attention it received from all queries of this pass.
    new_tokens: queries, keys and values of this pass's tokens before rotary positions.
    rows_over_steps: those are the last so many of the text, also of passes before this one, with
        their attention over what is held now; a query sees nothing younger than itself. A row is 0
        where there is no such query yet, or nothing held that it sees. Not with rank_positions.
    output_norms: of each token how much its value can add to the layer's output.
    future_queries: the mean query that each head is to expect at the next so many positions, by
        all its queries so far. Not with rank_positions.
    future_covariance: and their covariance, D x D numbers for each query head.
    skipped_queries: the first so many tokens of the text do not count for these two.
    rank_positions: attend with ranks inside the cache as positions instead of original positions.
        Only for rules that keep ``sinks`` first tokens and an unbroken run of newest ones.
    token_scores: what a full cache's look ahead says of each token, in the column TOKEN_SCORE:
        "answer": the attention that its own answer (or the forced one) gives it, all queries and
        the group added up; "repeat": the most that any query of the prompt read again gives it.
        For references, which say ``bounded = False``.
    """

    attention_rows: int = 0
    rows_over_steps: bool = False
    attention_mass: bool = False
    new_tokens: bool = False
    output_norms: bool = False
    future_queries: int = 0
    future_covariance: bool = False
    skipped_queries: int = 0
    rank_positions: bool = False
    token_scores: Literal["", "answer", "repeat"] = ""

    def __post_init__(self) -> None:
        if self.rows_over_steps and (self.attention_rows < 1 or self.rank_positions):
            raise ValueError("rows_over_steps needs attention_rows >= 1, and original positions")
        if self.future_queries and self.rank_positions:
            raise ValueError("future_queries needs original positions")
        if not self.future_queries and (self.future_covariance or self.skipped_queries):
            raise ValueError("future_covariance and skipped_queries need future_queries >= 1")


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The Q tokens of this pass in all heads of the layer, as projected, before rotary positions.

    queries: [S, H, Q, D]; keys, values: [S, K, Q, D]; all in the model's dtype.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class FutureQueries:
    """The queries that a head is to expect, as a Gaussian; float32 or wider.

    They are turned by the mean rotation of the next positions and scaled as the layer scales its
    logits, so that ``mean . key`` is an expected logit (before soft-capping). covariance: biased,
    None if not asked for. Both are 0 while no query counts yet.
    """

    mean: Tensor  # [S, H, D]
    covariance: Tensor | None  # [S, H, D, D]


def in_text_order(numbers: Tensor, ranks: Tensor) -> Tensor:
    """[..., T] numbers of tokens in storage order, put in the order of the text.

    ranks: as in ``LayerView.text_ranks``, in a shape that expands to that of ``numbers``;
    ``gather(-1, ranks)`` is the way back.
    """
    return torch.empty_like(numbers).scatter_(-1, ranks.expand_as(numbers), numbers)


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer of S sequences after a pass, kept tokens and new ones together.

    Tokens are in storage order, which is NOT the order of the text: a rule that needs neighbours
    sorts by ``positions``. The tokens of this pass are the last of the T, in the order of the text.
    Every sequence must be scored as if it were alone.
    """

    layer: int
    stored_keys: Tensor  # [S, K, T, D] post-RoPE, in the model's dtype
    stored_values: Tensor  # [S, K, T, D]
    positions: Tensor  # [S, K, T] int64, place in the original text
    attention: Tensor | None = None  # [S, H, W, T] softmax rows of the last W queries, oldest first
    attention_mass: Tensor | None = None  # [S, K, T] summed over this pass's queries and the group
    new: NewTokens | None = None
    # norm1(W_O v), mean over the group's query heads, [S, K, T] float32; of tokens that came with
    # a pass, others have 0.
    output_norms: Tensor | None = None
    future_queries: FutureQueries | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # [S, K, T] float32, writable
    text_tokens: int | None = None  # of the longest text so far; above all positions
    num_recent: int = 0  # newest tokens that are protected in this eviction
    # What a head keeps in this eviction, on average where heads share a budget; 0: nothing goes.
    num_kept: int = 0
    # Which KV heads of the layer the K are: all, or one where heads hold different numbers.
    kv_heads: slice = field(default_factory=lambda: slice(None))
    # H and K of the layer, whatever the view has of it.
    layer_heads: tuple[int, int] | None = None

    @property
    def keys(self) -> Tensor:
        """Post-RoPE keys [S, K, T, D] in float32 (float64 for a float64 model)."""
        return at_least_float32(self.stored_keys)

    @property
    def values(self) -> Tensor:
        """Values [S, K, T, D] in float32 (float64 for a float64 model)."""
        return at_least_float32(self.stored_values)

    @property
    def text_ranks(self) -> Tensor:
        """Rank of each token among the cached ones of its head by position, [S, K, T] int64."""
        S, K, T = self.positions.shape
        # On CUDA sorting is fast, and its work does not change from step to step (cuda_graphs.py).
        on_cuda = self.positions.is_cuda
        if on_cuda or self.text_tokens is None or self.text_tokens > _COUNT_UP_TO * T:
            order = self.positions.argsort(dim=-1)
            return order.argsort(dim=-1)
        # Counting takes a tenth of the time of sorting on a CPU, and memory by the text's length.
        is_cached = torch.zeros(
            (S, K, self.text_tokens), dtype=torch.uint8, device=self.positions.device
        ).scatter_(-1, self.positions, 1)
        num_up_to = is_cached.cumsum(-1, dtype=torch.int32)
        return num_up_to.gather(-1, self.positions).long() - 1


@dataclass(kw_only=True)
class Policy(ABC):
    """Base of all policies; options are dataclass fields and are checked for type and range.

    sinks: the first so many tokens of the text are never evicted.
    recent: the newest so many tokens are never evicted.
    In a layer with a sliding window, what the window hides for good goes first even so.
    """

    # Per-token float32 columns that travel with the tokens; they start at 0 for a new token.
    columns: ClassVar[tuple[str, ...]] = ()
    # False only for a policy that keeps everything, whatever the budget says.
    evicts: ClassVar[bool] = True
    # False for a reference that looks at the whole text first, in memory that nothing bounds.
    bounded: ClassVar[bool] = True
    # Options that name a file whose content decides the scores: it is part of a cell's identity.
    file_options: ClassVar[tuple[str, ...]] = ()

    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        check_option_types(self)
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0 tokens, got {getattr(self, name)}")

    @property
    def needs(self) -> Needs:
        """What ``score`` wants to see besides keys, values and positions."""
        return Needs()

    def num_recent(self, budget_tokens: int) -> int:
        """How many of the newest tokens the engine protects under this budget."""
        return self.recent

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Importance of each token, [S, K, T] float; the lowest go, ties go to the newer token.

        Called once per layer after each chunk or decoded token, when there is something to evict or
        the policy has ``columns`` (then it may update ``view.columns`` in place).
        """


def check_option_types(options: Any) -> None:  # Any: a dataclass instance
    """Compare option values with their annotations, since yaml values arrive unchecked."""
    hints = get_type_hints(type(options))
    for option in fields(options):
        value, hint = getattr(options, option.name), hints[option.name]
        if not _matches(value, hint):
            expected = getattr(hint, "__name__", str(hint))
            raise ValueError(f"{option.name} must be {expected}, got {value!r}")


def _matches(value: Any, hint: Any) -> bool:  # Any: annotations are arbitrary objects
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
