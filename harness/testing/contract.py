"""What the engine relies on in every policy, checked on a toy model within seconds.

Each check runs the engine, or the policy's own ``score`` on what the engine handed it before, and
says in one line what was seen, what is wanted, and where to look. Shape letters as in
``policies/base.py``; H query heads, Q tokens of a pass.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.harness.engine import Generation
from kvarena.harness.errors import UsageError
from kvarena.harness.testing.faults import ContractError, told
from kvarena.harness.testing.oracle import replay_difference
from kvarena.harness.testing.score_calls import Watch, copied, other_order, reordered
from kvarena.harness.testing.trial import (
    CHUNK_TOKENS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NEW_TOKENS,
    Make,
    Trial,
    history,
    unlike,
    unlike_steps,
)
from kvarena.policies.base import LayerView, Policy

_LARGEST_DIFFERENCE = 2e-4  # of logits, as in the tests of the engine
_EVERY = 5  # so manieth calls are repeated in another order: of all layers, whose number is 3
_GROWTH_BYTES = 1024  # of tensors alive, while an answer is written
_COST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one check. verdict: ok | FAILED | not run."""

    check: str
    verdict: str
    text: str


def check_policy(make: Make) -> Iterator[Finding]:
    """Every check in turn, each as soon as it is done; a check that needs a failed one is not run.

    Raises whatever ``make`` raises, and UsageError for an option that does not suit the toy model,
    such as weights of a model with other heads.
    """
    trial, failed = Trial(make), set()
    kind = type(make())
    for name, (check, needs) in CHECKS.items():
        unmet = [need for need in needs if need in failed]
        if unmet:
            yield Finding(check=name, verdict="not run", text=f"mend {unmet[0]} first")
            continue
        try:
            yield Finding(check=name, verdict="ok", text=check(trial))
        except UsageError:
            raise
        except Exception as error:  # whatever a policy's code may raise
            failed.add(name)
            yield Finding(check=name, verdict="FAILED", text=told(error, kind))


# ---- the checks: each returns what to say if all is well, and raises if not ----


def _scores(trial: Trial) -> str:
    calls = trial.calls
    if not calls:
        return "never asked for: the policy keeps everything (evicts = False)"
    return f"{len(calls)} calls gave a number for each sequence, KV head and token"


def _finite(trial: Trial) -> str:
    for call in trial.calls:
        broken = ~call.scores.isfinite()
        if broken.any():
            name = "NaN" if call.scores.isnan().any() else "infinity"
            raise ContractError(
                f"score gave {name} for {int(broken.sum())} of {broken.numel()} tokens "
                f"{call.where}",
                "finite numbers (what is never to go is protected by sinks and recent)",
            )
    return "no NaN and no infinity"


def _storage_order(trial: Trial) -> str:
    """Kept tokens change places, new ones stay the last, as the engine promises."""
    calls = [call for call in trial.calls if call.view.positions.shape[-1] > CHUNK_TOKENS]
    generator = torch.Generator().manual_seed(0)
    prompt_tokens = len(trial.prompts[0])
    for call in calls[::_EVERY]:
        positions = call.view.positions
        num_new = 1 if int(positions.max()) >= prompt_tokens else CHUNK_TOKENS
        order = other_order(positions, num_new, generator)
        with torch.inference_mode():
            plain = trial.make().score(copied(call.view)).double()
            moved = trial.make().score(reordered(call.view, order)).double()
        expected = plain.gather(-1, order)
        spread = plain.amax(dim=-1, keepdim=True) - plain.amin(dim=-1, keepdim=True)
        # Sums in another order differ by rounding, in float32 at most.
        off = (moved - expected).abs() - 1e-4 * spread - 1e-6 * plain.abs().amax()
        if off.max() > 0:
            s, head, place = (int(i) for i in torch.unravel_index(off.argmax(), off.shape))
            position = int(positions.gather(-1, order)[s, head, place])
            raise ContractError(
                f"the token at position {position} scored {float(expected[s, head, place]):.4g}, "
                f"and {float(moved[s, head, place]):.4g} when the same tokens stood in another "
                f"order {call.where}",
                "the same score; for age or neighbours use view.positions or view.text_ranks",
            )
    return "kept tokens may stand in any order" if calls else "nothing was scored"


def _protection(trial: Trial) -> str:
    try:
        policy = trial.make(sinks=3, recent=5)
    except ValueError as error:
        seen = f"with sinks=3 and recent=5: {error}"
        raise ContractError(seen, "both can be set for any policy", "__post_init__") from error
    for generation in trial.run(policy, trial.prompts[:2], slots=2):
        for step in history(generation):
            end = step.seen_tokens
            wanted = {*range(min(3, end)), *range(max(0, end - 5), end)}
            for layer, heads in enumerate(step.positions):
                for head, kept in enumerate(heads):
                    gone = wanted - set(kept.tolist())
                    if gone:
                        raise ContractError(
                            f"with sinks=3 and recent=5, position {min(gone)} was gone from head "
                            f"{head} of layer {layer} after {end} tokens",
                            "that sinks and recent stay; num_recent must be at least recent",
                            "num_recent",
                        )
    return "the first and newest tokens stay with sinks=3 and recent=5"


def _oracle(trial: Trial) -> str:
    watch = Watch(trial.make())
    policy, prompts = watch.policy, trial.prompts[:2]
    generations = trial.engine(policy, slots=2).generate(
        prompts,
        max_new_tokens=NEW_TOKENS,
        on_pass=watch.count_pass,
        record_history=True,
        record_logits="all",
    )
    largest = 0.0
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.logits is not None
        try:
            difference = replay_difference(
                trial.model,
                prompt + generation.token_ids[:-1],
                history(generation),
                generation.logits,
                num_rank_sinks=policy.sinks if policy.needs.rank_positions else None,
            )
        except ValueError as error:
            raise ContractError(
                f"rank_positions=True, but {error}",
                "rank_positions only for a rule that keeps these",
                "needs",
            ) from error
        largest = max(largest, difference)
    if not largest < _LARGEST_DIFFERENCE:
        written = next((call for call in watch.calls if call.written), None)
        cause = f"; score wrote into view.{written.written[0]} {written.where}" if written else ""
        raise ContractError(
            f"logits are {largest:.2g} off those of the full cache with the evicted tokens hidden"
            f"{cause}",
            f"at most {_LARGEST_DIFFERENCE}; score may write into view.columns alone",
        )
    return f"logits are those of a full cache that hides what was evicted, within {largest:.0e}"


def _samples(trial: Trial) -> str:
    wanted = "the same; state of a token belongs into columns, and none is kept between samples"
    again = trial.run(trial.make(), trial.prompts)
    for number, (one, other) in enumerate(zip(trial.alone, again, strict=True)):
        seen = unlike(one, other)
        if seen:
            raise ContractError(f"after other samples, prompt {number} {seen} than alone", wanted)
    if not trial.make().bounded:
        return "a prompt keeps the same tokens after any others; it may look ahead"
    first, longer = history(trial.alone[0]), history(trial.alone[-1])
    num_shared = len(trial.prompts[0]) // CHUNK_TOKENS
    for before, after in zip(first[:num_shared], longer[:num_shared], strict=True):
        seen = unlike_steps(before, after)
        if seen:
            raise ContractError(f"a prompt that goes on longer {seen} at its beginning", wanted)
    return "a prompt keeps the same tokens after any others, whatever follows"


def _neighbours(trial: Trial) -> str:
    indices = list(range(len(trial.prompts)))
    for order in (indices, indices[::-1]):
        prompts = [trial.prompts[index] for index in order]
        among = trial.run(trial.make(), prompts, slots=len(prompts))
        for index, generation in zip(order, among, strict=True):
            seen = unlike(trial.alone[index], generation)
            if seen:
                raise ContractError(
                    f"among {len(prompts)} prompts, prompt {index} {seen} than alone",
                    "the same; never mix the sequences of a view (its first dimension, S)",
                )
    return f"a prompt keeps the same tokens alone and among {len(indices)}, in any order"


def _memory(trial: Trial) -> str:
    policy = trial.make()
    prompt = trial.prompts[-1]
    batch = trial.engine(policy).batch([prompt], max_new_tokens=NEW_TOKENS)
    alive: list[int] = []  # after each pass
    ended: list[Generation] = []
    while not ended:
        ended = batch.step()
        alive.append(_tensor_bytes())
    (generation,) = ended
    num_read = len(prompt) // CHUNK_TOKENS
    growth = alive[num_read + NEW_TOKENS - 2] - alive[num_read - 1]
    if growth > _GROWTH_BYTES:
        raise ContractError(
            f"tensors that stay took {growth} bytes more after {NEW_TOKENS - 1} decoded tokens, "
            "under a cache that was full all the time",
            "a constant size; what a token needs later belongs into columns",
        )
    if not policy.evicts:
        return "not bounded: the policy keeps everything (evicts = False)"
    columns = len(policy.columns) + policy.needs.output_norms
    per_token = 2 * HEAD_DIM * 8 + 4 + 4 * columns  # key, value, position, columns
    sinks = policy.sinks * HEAD_DIM * 8 if policy.needs.rank_positions else 0
    rows = policy.needs.attention_rows if policy.needs.rows_over_steps else 0
    queries = rows * (HEADS * HEAD_DIM * 8 + 4)  # and their positions
    if policy.needs.future_queries:  # mean and covariance, and of how many
        queries += HEADS * HEAD_DIM * 8 * (1 + policy.needs.future_covariance * HEAD_DIM) + 8
    places = trial.budget_tokens + CHUNK_TOKENS
    limit = len(batch.layers) * (KV_HEADS * (places * per_token + sinks) + queries)
    if batch.kv_bytes_allocated > limit or generation.kept_tokens > trial.budget_tokens:
        raise ContractError(
            f"{batch.kv_bytes_allocated} bytes of buffers, {generation.kept_tokens} tokens kept",
            f"at most {limit} bytes and {trial.budget_tokens} tokens",
        )
    return f"{batch.kv_bytes_allocated} bytes of buffers for budget and chunk, and no more"


class _Newest(Policy):
    """The cheapest rule there is: keep the newest tokens."""

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


def _cost(trial: Trial) -> str:
    """CPU time of this process, which no other one disturbs; the smallest of a few rounds."""

    def sec(policy: Policy) -> float:
        engine, start = trial.engine(policy, slots=3), time.process_time()
        list(engine.generate(trial.prompts[:3], max_new_tokens=NEW_TOKENS))
        return time.process_time() - start

    rounds = [(sec(trial.make()), sec(_Newest())) for _ in range(_COST_ROUNDS)]
    own, newest = (min(column) for column in zip(*rounds, strict=True))
    return f"{own / newest:.2f} x the time of keeping the newest tokens, on this toy (never fails)"


# check -> what does it, and the checks that must have passed before it says anything
CHECKS: dict[str, tuple[Callable[[Trial], str], tuple[str, ...]]] = {
    "scores": (_scores, ()),
    "finite": (_finite, ("scores",)),
    "storage order": (_storage_order, ("scores", "finite")),
    "protection": (_protection, ("scores", "finite")),
    "replay oracle": (_oracle, ("scores", "finite")),
    "samples": (_samples, ("scores", "finite")),
    "neighbours": (_neighbours, ("scores", "finite", "samples")),
    "memory": (_memory, ("scores", "finite")),
    "cost": (_cost, ("scores", "finite")),
}


def _tensor_bytes() -> int:
    """Of all tensors that this process can still reach, each storage counted once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for found in gc.get_objects()
        if issubclass(type(found), Tensor)
        for storage in [found.untyped_storage()]
    }
    return sum(storages.values())
