"""What decides which tokens stay: a score, a protection, the budget's shape, and how often.

The four are set one by one, so that a study can vary one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvarena.harness.errors import UsageError
from kvarena.harness.protection import Protection
from kvarena.policies.base import Policy
from kvarena.shapes.base import Shape
from kvarena.shapes.uniform import Uniform


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a head may hold once a pass has evicted, on average over all heads of all layers.

    shared_tokens: what the shape shares out; extra_tokens: in every head alike, on top of it (a
    question, which the context was compressed to leave room for); spare_tokens: so many more may
    wait for an eviction that takes all of them at once.
    """

    shared_tokens: int
    extra_tokens: int = 0
    spare_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.shared_tokens + self.extra_tokens


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """The rule of a whole run.

    every: answer tokens between two evictions of a request, k; a head then holds up to k more.
    num_layers: of the model.
    """

    policy: Policy
    num_layers: int
    shape: Shape = field(default_factory=Uniform)
    protection: Protection = field(default_factory=Protection)
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"evict_every must be >= 1 token, got {self.every}")
        if not self.policy.evicts and not isinstance(self.shape, Uniform):
            raise UsageError(
                f"policy {type(self.policy).__name__} keeps everything, so its budget has no "
                "shape; leave shape=uniform"
            )
        if self.shape.scope != "head" and self.policy.needs.rank_positions:
            raise UsageError(
                f"shape {type(self.shape).__name__} lets heads hold different numbers of tokens, "
                "and ranks as positions need the same one; set policy.reindex=false"
            )

    @property
    def sinks(self) -> int:
        """First tokens of the text that are never evicted."""
        return self.protection.of(self.policy, 0)[0]

    def num_recent(self, budget_tokens: int) -> int:
        """Newest tokens that are never evicted under this budget."""
        return self.protection.of(self.policy, budget_tokens)[1]

    def protected_tokens(self, budget_tokens: int) -> int:
        return self.sinks + self.num_recent(budget_tokens)

    def layer_tokens(self, limit: Limit, layer: int) -> int:
        """Tokens per head that a layer holds after an eviction, on average over its heads."""
        shared = limit.shared_tokens
        protected = self.protected_tokens(shared)
        return limit.extra_tokens + self.shape.layer_tokens(
            shared, protected, layer, self.num_layers
        )

    def least_tokens(self, budget_tokens: int) -> int:
        """Tokens per head of the layer that gets least of a budget: it is the first to evict."""
        limit = Limit(shared_tokens=budget_tokens)
        return min(self.layer_tokens(limit, layer) for layer in range(self.num_layers))

    def head_tokens(self, scores: Sequence[Tensor], mean_tokens: int) -> list[int]:
        """What each head in scope keeps; scores: of each, [T]."""
        shares = self.shape.head_tokens(scores, mean_tokens)
        assert sum(shares) == len(scores) * mean_tokens, f"{sum(shares)} tokens shared out"
        return shares

    def check(self, budget_tokens: int | None, question_tokens: int = 0) -> None:
        """Raise UsageError if the budget leaves nothing to choose in some layer."""
        if budget_tokens is None or not self.policy.evicts:
            return
        limit = Limit(shared_tokens=budget_tokens - question_tokens)
        held_back = f" beside a question of {question_tokens}" if question_tokens else ""
        for layer in range(self.num_layers):
            tokens = self.layer_tokens(limit, layer) if limit.shared_tokens > 0 else 0
            protected = self.protected_tokens(max(tokens, 0))
            if tokens <= protected:
                where = "" if tokens == limit.shared_tokens else f" in layer {layer}"
                share = f", of which this shape gives {tokens}{where}," if where else ""
                raise UsageError(
                    f"a budget of {budget_tokens} tokens{held_back}{share} leaves nothing to "
                    f"choose: {protected} tokens are protected (sinks and recent); raise the "
                    "budget or protect fewer"
                )
