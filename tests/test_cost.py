"""What scoring and eviction write, counted in elements and not in seconds.

Everything an operation writes counts, whether into new memory or in place; views are free.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvarena.harness.engine import attention
from kvarena.harness.engine.attention import AttentionSpec
from kvarena.harness.engine.eviction import Eviction, Limit
from kvarena.harness.engine.forward_pass import ForwardPass
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.packing import Cohort
from kvarena.harness.registry import build, load_choice, ready_policies
from kvarena.policies.base import FutureQueries, LayerView, NewTokens, Policy

S, K, G, D, KEPT, CHUNK = 3, 2, 2, 64, 96, 32
H, T = K * G, KEPT + CHUNK
SPEC = AttentionSpec(scaling=D**-0.5)
POLICIES = ready_policies()

# Most numbers per cached token that a policy may write to score it, beyond the attention it asks
# for. Writing the keys out once takes D = 64 of them, reading them takes none.
MOST_PER_TOKEN = {
    "full": 1,
    "streaming_llm": 1,
    "l2norm": 2,
    "h2o": 1,
    "tova": 1,
    "keydiff": 6,
    "snapkv": 18,  # counting ranks takes 9 of them, pooling 4 for each of the two query heads
    "caote": 28,  # 12 for each of the two query heads
    "lagkv": 4.5 * D,  # keys and values in the order of the text, and scaled
    "curdkv": 24,
    "corm": 138,  # two comparisons, a byte each, for each of the 64 attention weights it asks for
    "nacl": 54,  # two rankings, and 20 to draw a number
}
ANY_OTHER = D / 2
# What compares all pairs of keys is the exception, and meant to evict once in many steps.
MOST_PER_PAIR = {"r_kv": 4}
# A quadratic form of each key takes its product with a matrix, for each of the two query heads.
MOST_PER_CHANNEL = {"expected_attention": 4}


class Written(TorchDispatchMode):
    """Counts the elements that operations write, in all and by the storage they end in."""

    # In-place operations that write as much as this argument holds, not all of the first.
    _PARTIAL = {"index_copy_": 3, "scatter_": 2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.by_storage: Counter[int] = Counter()
        self.operations: set[str] = set()
        self.largest = 0  # elements of one result

    @property
    def total(self) -> int:
        return self.by_storage.total()

    def into(self, *buffers: Tensor) -> int:
        """Elements written into the storages of these tensors."""
        return sum(self.by_storage[storage_of(buffer)] for buffer in buffers)

    def __torch_dispatch__(  # Any: whatever an operation takes
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.operations.add(name)
        if func._schema.is_mutable:
            written = args[self._PARTIAL.get(name, 0)]
            self.by_storage[storage_of(args[0])] += written.numel()
        else:
            given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for output in tree_leaves(result):
                if isinstance(output, Tensor) and storage_of(output) not in given:
                    self.largest = max(self.largest, output.numel())
                    self.by_storage[storage_of(output)] += output.numel()
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def written_by(function: Callable[[], object]) -> Written:
    with torch.no_grad(), Written() as written:
        function()
    return written


def policy_named(name: str) -> Policy:
    # Ranks as positions would need a model, for its rotary embedding.
    changes = {"reindex": False} if name == "streaming_llm" else {}
    return build({**load_choice("policy", name), **changes})


def random_view(policy: Policy) -> LayerView:
    rows = min(policy.needs.attention_rows, CHUNK)
    return LayerView(
        layer=5,
        stored_keys=torch.randn(S, K, T, D),
        stored_values=torch.randn(S, K, T, D),
        positions=torch.rand(S, K, T).argsort(dim=-1),
        attention=torch.rand(S, H, rows, T) if rows else None,
        attention_mass=torch.rand(S, K, T),
        output_norms=torch.rand(S, K, T),
        num_kept=KEPT,
        new=NewTokens(
            queries=torch.randn(S, H, CHUNK, D),
            keys=torch.randn(S, K, CHUNK, D),
            values=torch.randn(S, K, CHUNK, D),
        ),
        future_queries=FutureQueries(mean=torch.randn(S, H, D), covariance=torch.randn(S, H, D, D)),
        columns={name: torch.zeros(S, K, T) for name in policy.columns},
        text_tokens=T,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_scoring_writes_a_few_numbers_per_token_and_never_the_keys(name: str) -> None:
    policy = policy_named(name)
    view = random_view(policy)
    policy.score(view)  # what is made once and kept is not part of the cost
    written = written_by(lambda: policy.score(view))
    most = MOST_PER_TOKEN.get(name, ANY_OTHER)
    most += T * MOST_PER_PAIR.get(name, 0) + D * MOST_PER_CHANNEL.get(name, 0)
    assert written.total <= 1.05 * most * S * K * T


@pytest.mark.parametrize("name", [*MOST_PER_PAIR, *MOST_PER_CHANNEL])
def test_what_costs_more_writes_in_blocks_that_are_no_larger_than_the_keys(name: str) -> None:
    policy, view = policy_named(name), random_view(policy_named(name))
    written = written_by(lambda: policy.score(view))
    assert written.largest < S * K * T * T
    assert written.largest <= view.keys.numel()


def test_counting_notices_keys_that_are_written_out() -> None:
    keys = torch.randn(S, K, T, D)
    anchor = keys.mean(dim=-2, keepdim=True)
    slow = written_by(lambda: F.cosine_similarity(keys, anchor, dim=-1))
    assert slow.total > 2 * keys.numel()
    assert written_by(lambda: keys[:, :, 1:].transpose(1, 2)).total == 0


def test_neighbours_are_found_by_counting_unless_the_text_is_far_longer_than_the_cache() -> None:
    """A sort takes ten times as long on a CPU; a count takes memory by the length of the text."""
    policy = policy_named("snapkv")
    view = random_view(policy)
    far = replace(view, positions=view.positions * 20, text_tokens=20 * T)
    counted, ordered = (written_by(lambda one=one: policy.score(one)) for one in (view, far))
    assert "sort" not in counted.operations
    assert "sort" in ordered.operations
    assert ordered.total < 20 * S * K * T
    assert torch.equal(policy.score(view), policy.score(far))
    assert torch.equal(view.text_ranks, replace(view, text_tokens=None).text_ranks)


def filled_cache(policy: Policy, num_tokens: int) -> LayerCache:
    cache = LayerCache(S, T, policy.columns)
    keys, values = torch.randn(S, K, num_tokens, D), torch.randn(S, K, num_tokens, D)
    cache.append(slice(0, S), keys, values, torch.arange(num_tokens).expand(S, -1))
    return cache


@pytest.mark.parametrize("num_evicted", [1, 7, CHUNK])
def test_eviction_writes_no_more_tokens_than_it_drops(num_evicted: int) -> None:
    cache, scores = filled_cache(policy_named("h2o"), T), torch.randn(S, K, T)
    written = written_by(lambda: cache.evict(slice(0, S), scores, T - num_evicted))
    moved = S * K * num_evicted
    assert written.into(cache.keys) <= moved * D
    assert written.into(cache.values) <= moved * D
    assert written.into(cache.positions, *cache.columns(slice(0, S), T).values()) <= 2 * moved
    # The moved keys and values once more on their way, and the ranking.
    elsewhere = written.total - written.into(*cache._token_buffers())
    assert elsewhere <= 2 * moved * D + 16 * S * K * T


def attend(policy: Policy, cache: LayerCache, num_new: int) -> Written:
    """One layer of a pass with ``num_new`` tokens per sequence that evicts as many."""
    cohort = Cohort(
        slots=slice(0, S),
        row=slice(0, S * num_new),
        num_new=num_new,
        limit=Limit(shared_tokens=KEPT),
        mean_tokens=KEPT + num_new,
        positions=torch.arange(KEPT, KEPT + num_new).expand(S, -1),
        text_tokens=KEPT + num_new,
    )
    forward = ForwardPass(
        cohorts=[cohort],
        layers=[cache],
        eviction=Eviction(policy=policy, num_layers=1),
        attention="sdpa",
    )
    total = S * num_new
    query, key = torch.randn(1, H, total, D), torch.randn(1, K, total, D)
    module: Any = SimpleNamespace(layer_idx=0)
    cohort.causal_mask(KEPT + num_new)  # once per pass, not per layer
    assert cohort.next_position is not None
    return written_by(lambda: forward.attend(module, query, key, key.clone(), SPEC))


@pytest.mark.parametrize("num_new", [1, CHUNK])
@pytest.mark.parametrize("name", [n for n in MOST_PER_TOKEN if n != "full"])
def test_a_layer_writes_into_its_cache_what_comes_and_what_moves(name: str, num_new: int) -> None:
    policy = policy_named(name)
    cache = filled_cache(policy, KEPT)
    written = attend(policy, cache, num_new)
    new = S * K * num_new
    for buffer in (cache.keys, cache.values):
        assert new * D <= written.into(buffer) <= 2 * new * D


@pytest.mark.parametrize("name", [n for n in MOST_PER_TOKEN if n != "full"])
def test_a_decoded_token_costs_a_policy_less_than_one_copy_of_the_keys(name: str) -> None:
    policy = policy_named(name)
    written = attend(policy, filled_cache(policy, KEPT), 1)
    assert written.total < S * K * KEPT * D


def test_weights_are_written_once_masked_in_place_and_normalised_once() -> None:
    query, keys = torch.randn(1, H, CHUNK, D), torch.randn(1, K, T, D)
    mask = attention.visible_tokens(torch.empty(1, CHUNK), torch.empty(1, K, T), CHUNK, None)
    written = written_by(
        lambda: attention.attend_with_mass(query, keys, keys, mask, SPEC, may_fuse=False)[:2]
    )
    weights, small = H * CHUNK * T, 4 * query.numel() + 3 * CHUNK * T + 2 * K * T
    assert written.total <= 3 * weights + small
