"""The engine's promises: bounded memory, independence of neighbours, odd prompts, stopping."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from kvarena.harness.engine import Batch, Engine, Request
from kvarena.harness.engine.attention import KERNELS, attend_sdpa
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.sampling import choose
from kvarena.harness.errors import PolicyError, UsageError
from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.sampling import Sampling
from kvarena.policies.base import LayerView
from kvarena.policies.full import Full
from kvarena.policies.keydiff import KeyDiff
from kvarena.policies.streaming_llm import StreamingLLM
from toys import VOCAB, finished, requests, toy_model, toy_prompt

POLICIES = choices("policy")
EVICTING = [name for name in POLICIES if name != "full"]
# References look ahead to the whole text, in memory that nothing bounds.
LOOK_AHEAD = {"kvzip", "oracle"}

# Every policy is built here, and some of them read a file.
pytestmark = pytest.mark.usefixtures("toy_heads")


def policy_named(name: str) -> object:
    return build(load_choice("policy", name))


@pytest.mark.parametrize("name", sorted(set(EVICTING) - LOOK_AHEAD))
def test_no_layer_ever_holds_more_than_budget_and_chunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, chunk, most_held = 48, 16, []
    append = LayerCache.append

    def spy(cache: LayerCache, slots: slice, *rest: object) -> None:
        append(cache, slots, *rest)
        most_held.append(cache.num_tokens(slots))
        assert cache.keys.shape[2] == cache.values.shape[2] == budget + chunk

    monkeypatch.setattr(LayerCache, "append", spy)
    engine = Engine(
        toy_model(), policy_named(name), budget_tokens=budget, chunk_tokens=chunk, slots=2
    )
    prompts = [toy_prompt(300), toy_prompt(10, seed=1), toy_prompt(77, seed=2)]
    batch = engine.batch(prompts, max_new_tokens=60, record_history=True)
    generations = finished(batch)
    assert max(most_held) == budget + chunk
    for generation in generations:
        for step in generation.kept_history:
            assert all(positions.shape[1] <= budget for positions in step.positions)
    layer_bytes = [layer.allocated_bytes for layer in batch.layers]
    assert batch.kv_bytes_allocated == sum(layer_bytes)
    assert generations[0].kv_bytes_peak <= batch.kv_bytes_allocated // 2
    assert generations[0].kv_bytes_kept < generations[0].kv_bytes_peak


@pytest.mark.parametrize("name", POLICIES)
def test_a_sample_is_the_same_alone_and_among_others_in_any_order(name: str) -> None:
    model = toy_model("llama", dtype=torch.float64)
    prompts = [toy_prompt(length, seed=length) for length in (150, 9, 64, 210, 33, 1, 120, 90, 75)]

    def run(order: list[int], slots: int) -> dict[int, tuple]:
        engine = Engine(model, policy_named(name), budget_tokens=48, chunk_tokens=16, slots=slots)
        generations = engine.generate(
            [prompts[i] for i in order], max_new_tokens=40, record_kept=True
        )
        return dict(zip(order, generations, strict=True))

    indices = list(range(len(prompts)))
    # An engine of its own for each: one whose slots remembered anything would be no yardstick.
    alone = {index: run([index], slots=1)[index] for index in indices}
    for order in (indices, indices[::-1], [4, 2, 8, 0, 6, 1, 3, 7, 5]):
        among_others = run(order, slots=8)
        for index in indices:
            assert among_others[index].token_ids == alone[index].token_ids
            for here, there in zip(
                among_others[index].kept_positions, alone[index].kept_positions, strict=True
            ):
                assert torch.equal(here, there)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 20, 31, 32, 33])
def test_short_prompts_work(name: str, num_tokens: int) -> None:
    """Empty, one token, and shorter than the budget, the chunk and SnapKV's window."""
    engine = Engine(toy_model(), policy_named(name), budget_tokens=40, chunk_tokens=64, slots=2)
    (generation,) = engine.generate([toy_prompt(num_tokens)], max_new_tokens=30)
    assert len(generation.token_ids) == 30
    assert generation.prompt_tokens == max(1, num_tokens)


def test_budget_over_the_prompt_equals_the_full_cache() -> None:
    model, prompt = toy_model(), toy_prompt(50)
    expected = next(Engine(model, Full()).generate([prompt], max_new_tokens=20))
    for name in EVICTING:
        engine = Engine(model, policy_named(name), budget_tokens=70)
        assert next(engine.generate([prompt], max_new_tokens=20)).token_ids == expected.token_ids


def test_slots_refill_and_results_come_in_prompt_order() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16, slots=2)
    prompts = [toy_prompt(length, seed=length) for length in (80, 5, 40, 20, 60)]
    lengths = [30, 2, 9, 1, 17]
    passes: list[int] = []
    asked = requests(prompts, max_new_tokens=lengths)
    generations = list(engine.generate(asked, on_pass=passes.append))
    assert [g.index for g in generations] == [0, 1, 2, 3, 4]
    assert [len(g.token_ids) for g in generations] == lengths
    assert sum(passes) == sum(map(len, prompts)) + sum(lengths) - len(lengths)
    as_completed = engine.generate(asked, as_completed=True)
    assert next(as_completed).index == 1


def test_no_slot_idles_while_prompts_wait_and_memory_stays_as_it_is() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16, slots=3)
    prompts = [toy_prompt(length, seed=length) for length in (80, 5, 40, 20, 60, 7, 33, 90)]
    lengths = [30, 2, 9, 1, 17, 5, 1, 3]
    batch = engine.batch(requests(prompts, max_new_tokens=lengths))
    num_finished, allocated = 0, set()
    while batch.has_work:
        num_left = len(prompts) - num_finished
        ended = batch.step()
        assert batch.num_busy + len(ended) == min(3, num_left)
        num_finished += len(ended)
        allocated.add(batch.kv_bytes_allocated)
    assert num_finished == len(prompts)
    assert len(allocated) == 1


@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_a_decoded_token_is_attended_once_by_a_policy_that_asks_for_the_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_queries: list[int] = []

    def kernel(query: torch.Tensor, *rest: object) -> torch.Tensor:
        num_queries.append(query.shape[2])
        return attend_sdpa(query, *rest)

    engine = Engine(toy_model(), policy_named(name), budget_tokens=64, chunk_tokens=48)
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    list(engine.generate([toy_prompt(144)], max_new_tokens=10))
    assert set(num_queries) == {48}


def test_stop_tokens_end_a_sequence_and_are_kept() -> None:
    model, prompts = toy_model(), [toy_prompt(30), toy_prompt(30, seed=5)]
    free = list(Engine(model, Full()).generate(prompts, max_new_tokens=12))
    stop = free[0].token_ids[4]
    first = free[0].token_ids.index(stop)
    asked = requests(prompts, max_new_tokens=[12, 12], stop_token_ids=[[stop], []])
    stopped = list(Engine(model, Full()).generate(asked))
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish_reason == "stop"
    assert stopped[1].token_ids == free[1].token_ids
    assert stopped[1].finish_reason == "length"


def test_sampling_depends_on_the_seed_and_on_nothing_else() -> None:
    model, prompts = toy_model(dtype=torch.float64), [toy_prompt(30), toy_prompt(44, seed=5)]
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50)

    def run(order: list[int], seeds: list[int], slots: int) -> list[list[int]]:
        engine = Engine(model, KeyDiff(), budget_tokens=24, chunk_tokens=16, slots=slots)
        asked = [Request(prompt=prompts[i], max_new_tokens=20, seed=seeds[i]) for i in order]
        generations = engine.generate(asked, sampling=sampling)
        return [g.token_ids for g in generations]

    first, second = run([0, 1], [7, 8], slots=2)
    assert run([1, 0], [7, 8], slots=1) == [second, first]
    assert run([0, 1], [7, 9], slots=2)[0] == first
    assert run([0, 1], [6, 8], slots=2)[0] != first


def test_top_k_of_one_is_greedy() -> None:
    model, prompt = toy_model(), toy_prompt(30)
    greedy = next(Engine(model, Full()).generate([prompt], max_new_tokens=10))
    engine = Engine(model, Full())
    asked = Request(prompt=prompt, max_new_tokens=10, seed=3)
    sampled = next(engine.generate([asked], sampling=Sampling(temperature=2.0, top_k=1)))
    assert sampled.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.7246, 0.1812, 0.0652, 0.0290]),
        (Sampling(temperature=1, top_k=2), [0.6667, 0.3333, 0, 0]),
        (Sampling(temperature=1, top_p=0.8), [0.5556, 0.2778, 0.1667, 0]),
        (Sampling(temperature=1, min_p=0.4), [0.6667, 0.3333, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_asked_for(
    sampling: Sampling, expected: list[float]
) -> None:
    num_draws = 20_000
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(num_draws, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(choose(sampling, logits, [generator] * num_draws))
    shares = torch.bincount(drawn, minlength=4) / num_draws
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.012, rtol=0)
    assert (shares > 0).tolist() == [share > 0 for share in expected]


def test_times_run_from_the_slot_to_the_first_token_and_over_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a clock that ticks once per reading: at admission, and after every deciding pass."""
    ticks = iter(range(1000))
    monkeypatch.setattr("kvarena.harness.engine.batch.perf_counter", lambda: float(next(ticks)))
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16, slots=1)
    prompts = [toy_prompt(40), toy_prompt(30)]
    first, second = engine.generate(requests(prompts, max_new_tokens=[5, 1]))
    assert (first.ttft_sec, first.decode_tokens_per_sec) == (1, 1)
    assert (second.ttft_sec, second.decode_tokens_per_sec) == (1, None)


def test_bytes_are_those_of_what_is_held() -> None:
    """Toy Llama: 3 layers of 2 KV heads, 16 channels in float32 and a position of 4 bytes."""
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16, slots=1)
    per_token = 3 * 2 * (2 * 16 * 4 + 4)
    long, short = engine.generate([toy_prompt(100), toy_prompt(20)], max_new_tokens=3)
    assert (long.kv_bytes_kept, long.kv_bytes_peak) == (32 * per_token, 48 * per_token)
    assert (short.kv_bytes_kept, short.kv_bytes_peak) == (22 * per_token, 22 * per_token)


@pytest.mark.parametrize(
    ("bad", "where"),
    [(math.nan, 7), (math.inf, 7), (-math.inf, slice(None))],
    ids=["nan", "inf", "every token ruled out"],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1)])
def test_logits_that_are_no_numbers_end_the_answer_as_invalid(
    sampling: Sampling, bad: float, where: int | slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poisoned sequence alone: its neighbour answers as if nothing had happened."""
    model, prompts = toy_model(), [toy_prompt(40), toy_prompt(30, seed=1)]
    options = {"budget_tokens": 32, "chunk_tokens": 16, "slots": 2}

    def answers() -> list:
        engine = Engine(model, KeyDiff(), **options)
        return list(engine.generate(prompts, max_new_tokens=4, sampling=sampling))

    untouched = answers()
    forward = Batch._logits

    def poisoned(batch: Batch, row: list, portions: list, rows_wanted: list) -> tuple:
        logits, runs = forward(batch, row, portions, rows_wanted)
        logits = logits.clone()
        deciding = [active for _, active, tokens in portions if active.chooses_after(len(tokens))]
        for i, sequence in enumerate(deciding):
            if sequence.index == 0 and len(sequence.token_ids) == 2:
                logits[i, where] = bad
        return logits, runs

    monkeypatch.setattr(Batch, "_logits", poisoned)
    broken, neighbour = answers()
    assert broken.finish_reason == "invalid"
    assert broken.token_ids == untouched[0].token_ids[:2]
    assert neighbour.token_ids == untouched[1].token_ids


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_end_the_answer_and_name_policy_layer_and_pass(
    bad: float,
) -> None:
    class Broken(KeyDiff):
        def score(self, view: LayerView) -> torch.Tensor:
            scores = super().score(view)
            longest = view.positions.amax(dim=(1, 2)) >= 64  # of the longer prompt only
            if view.layer == 1:
                scores[longest, :, 3] = bad
            return scores

    model, prompts = toy_model(), [toy_prompt(100), toy_prompt(40, seed=1)]
    options = {"budget_tokens": 32, "chunk_tokens": 16, "slots": 2}
    _, alone = Engine(model, KeyDiff(), **options).generate(prompts, max_new_tokens=4)
    broken, neighbour = Engine(model, Broken(), **options).generate(prompts, max_new_tokens=4)
    assert broken.finish_reason == "invalid"
    assert broken.token_ids == []
    assert broken.error == (
        "policy Broken gave scores that are not finite in layer 1, in the pass of tokens 52 to 67"
    )
    assert neighbour.error is None
    assert neighbour.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (lambda policy, view: None, "score returned NoneType in layer 0, not a tensor [S, K, T]"),
        (lambda policy, view: view.positions[0].float(), "score returned (2, 48) in layer 0"),
        (lambda policy, view: view.nothing, "AttributeError: 'LayerView' object has no attribute"),
    ],
    ids=["None", "shape", "exception"],
)
def test_a_policy_that_gives_no_scores_is_told_with_its_file_and_line(
    score: Callable, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyDiff, "score", score)
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16)
    with pytest.raises(PolicyError) as told:
        list(engine.generate([toy_prompt(64)], max_new_tokens=2))
    assert re.match(r"policy KeyDiff \(policies/keydiff.py line \d+\): ", str(told.value))
    assert what in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "attention", "ran"),
    [
        ("keydiff", "sdpa", ("sdpa",)),
        ("keydiff", "reference", ("reference",)),
        ("h2o", "sdpa", ("reference",)),
        ("tova", "sdpa", ("reference", "sdpa")),
        ("snapkv", "sdpa", ("reference", "sdpa")),
    ],
)
def test_the_kernels_that_attended_are_observed(name: str, attention: str, ran: tuple) -> None:
    """TOVA and SnapKV take their decode steps' output from the weights they ask for."""
    options = {"budget_tokens": 40, "chunk_tokens": 48, "attention": attention}
    engine = Engine(toy_model(), policy_named(name), **options)
    short, long = engine.generate([toy_prompt(20), toy_prompt(96)], max_new_tokens=4)
    assert long.kernels == ran
    # Nothing of the short one is ever evicted, so its weights are asked for by H2O alone.
    assert short.kernels == (("reference",) if "h2o" in name else (attention,))


def test_the_model_is_left_as_it_was() -> None:
    model = toy_model()
    before = model.config._attn_implementation
    list(Engine(model, KeyDiff(), budget_tokens=32).generate([toy_prompt(50)], max_new_tokens=3))
    assert model.config._attn_implementation == before


def test_attention_reference_and_sdpa_agree() -> None:
    model, prompt = toy_model(dtype=torch.float64), toy_prompt(120)
    outputs = []
    for attention in ("sdpa", "reference"):
        engine = Engine(model, KeyDiff(), budget_tokens=40, chunk_tokens=16, attention=attention)
        outputs.append(
            next(engine.generate([prompt], max_new_tokens=30, record_logits="all")).logits
        )
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("name", EVICTING)
def test_sinks_and_recent_are_never_evicted(name: str) -> None:
    policy = build({**load_choice("policy", name), "sinks": 3, "recent": 5})
    engine = Engine(toy_model(), policy, budget_tokens=48, chunk_tokens=16)
    generation = next(engine.generate([toy_prompt(120)], max_new_tokens=9, record_history=True))
    for step in generation.kept_history:
        newest = range(max(0, step.seen_tokens - 5), step.seen_tokens)
        for positions in step.positions:
            for head in positions.tolist():
                assert {0, 1, 2, *newest} <= set(head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_tokens": 32}, "budget of 32 tokens leaves nothing to choose"),
        ({"budget_tokens": 64, "chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ({"budget_tokens": 64, "slots": 0}, "slots must be >= 1, got 0"),
        ({"budget_tokens": 64, "attention": "falsh"}, "Did you mean flash"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(toy_model(), policy_named("snapkv"), **options)


def test_sdpa_refuses_what_it_cannot_express() -> None:
    engine = Engine(toy_model("gpt_oss"), KeyDiff(), budget_tokens=32)
    with pytest.raises(UsageError, match="use attention=reference"):
        list(engine.generate([toy_prompt(10)], max_new_tokens=2))


def test_a_prompt_beyond_the_context_is_refused() -> None:
    engine = Engine(toy_model(max_position_embeddings=64), KeyDiff(), budget_tokens=32)
    with pytest.raises(UsageError, match="prompt 1 has 60 tokens, with 5 new ones 65"):
        engine.generate([toy_prompt(59), toy_prompt(60)], max_new_tokens=5)


def test_no_bos_and_an_empty_prompt_is_refused() -> None:
    model = toy_model(bos_token_id=None)
    model.generation_config.bos_token_id = None
    with pytest.raises(UsageError, match="no BOS token"):
        Engine(model, KeyDiff(), budget_tokens=32).generate([[]], max_new_tokens=5)


def test_an_unknown_attention_argument_is_not_ignored() -> None:
    from kvarena.harness.engine.forward_pass import packed_attention

    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="position_bias"):
        packed_attention(torch.nn.Identity(), tensor, tensor, tensor, None, position_bias=tensor)


def test_no_prompts_give_no_generations() -> None:
    assert (
        list(Engine(toy_model(), KeyDiff(), budget_tokens=32).generate([], max_new_tokens=5)) == []
    )


def test_vocabulary_is_respected() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32)
    generation = next(engine.generate([toy_prompt(40)], max_new_tokens=20))
    assert all(0 <= token < VOCAB for token in generation.token_ids)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - LOOK_AHEAD))
def test_a_question_held_back_does_not_change_what_the_context_keeps(name: str) -> None:
    """Same context, other questions of the same length: the same context tokens survive."""
    model = toy_model(dtype=torch.float64)
    context, kept = toy_prompt(150), []
    for seed in (1, 2):
        engine = Engine(model, policy_named(name), budget_tokens=64, chunk_tokens=16)
        prompt = context + toy_prompt(20, seed=seed)
        asked = Request(prompt=prompt, max_new_tokens=4, question_tokens=20)
        generation = next(engine.generate([asked], record_history=True))
        after_context = [s for s in generation.kept_history if s.seen_tokens == 150]
        assert len(after_context) == 1
        after_question = [s for s in generation.kept_history if s.seen_tokens == 170]
        for before, after in zip(
            after_context[0].positions, after_question[0].positions, strict=True
        ):
            if name != "full":
                assert before.shape[1] == 64 - 20
            question = torch.arange(150, 170).expand(before.shape[0], -1)
            assert torch.equal(after, torch.cat([before, question], dim=1))
        kept.append(after_context[0].positions)
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)


def test_a_question_that_fills_the_budget_is_refused() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32)
    with pytest.raises(UsageError, match="32 tokens beside a question of 32 leaves nothing"):
        engine.generate([Request(prompt=toy_prompt(80), max_new_tokens=4, question_tokens=32)])


def test_no_stop_token_before_the_minimum() -> None:
    model, prompt = toy_model(), toy_prompt(30)
    first = next(Engine(model, Full()).generate([prompt], max_new_tokens=1)).token_ids[0]
    asked = Request(prompt=prompt, max_new_tokens=9, stop_token_ids=[first], min_new_tokens=1)
    generation = next(Engine(model, Full()).generate([asked]))
    assert generation.token_ids[0] != first


@pytest.mark.parametrize("name", ["full", "keydiff"])
def test_forcing_the_own_answer_repeats_its_logits(name: str) -> None:
    model, prompts = toy_model(dtype=torch.float64), [toy_prompt(90), toy_prompt(40, seed=2)]
    engine = Engine(model, policy_named(name), budget_tokens=32, chunk_tokens=16)
    free = list(engine.generate(prompts, max_new_tokens=12, record_logits="answer"))
    asked = requests(prompts, forced=[g.token_ids for g in free])
    again = list(engine.generate(asked, record_logits="answer"))
    for one, other in zip(free, again, strict=True):
        assert one.logits.shape == (12, VOCAB)
        assert one.logits.argmax(dim=-1).tolist() == one.token_ids == other.token_ids
        torch.testing.assert_close(one.logits, other.logits)


def test_a_forced_answer_is_fed_whatever_the_model_thinks() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32)
    answer = [5, 6, 7]
    asked = Request(prompt=toy_prompt(50), forced=answer, stop_token_ids=[6])
    (generation,) = engine.generate([asked])
    assert generation.token_ids == answer
    with pytest.raises(UsageError, match="either max_new_tokens or forced"):
        engine.generate([toy_prompt(5)])


def test_a_model_with_layers_that_are_not_attention_is_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.max_position_embeddings = 2048
    with pytest.raises(UsageError, match="mamba is not supported: no token budget bounds its"):
        list(
            Engine(model, KeyDiff(), budget_tokens=32).generate([toy_prompt(50)], max_new_tokens=4)
        )


@pytest.mark.parametrize("model_type", ["stablelm", "nemotron"])
def test_a_model_that_swallows_keyword_arguments_is_refused(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match="does not hand its keyword arguments on"):
        next(Engine(model, KeyDiff(), budget_tokens=32).generate([[5, 6]], max_new_tokens=2))


@pytest.mark.parametrize("model_type", ["cohere2", "exaone4"])
def test_ranks_are_refused_where_layers_without_positions_cannot_be_told(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[model_type](**small, **heads, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match="reindex=false"):
        Engine(model, StreamingLLM(), budget_tokens=32)
    Engine(model, StreamingLLM(reindex=False), budget_tokens=32)


def test_an_empty_forced_answer_is_named() -> None:
    with pytest.raises(UsageError, match="forced answer 1 is empty"):
        Engine(toy_model(), Full()).generate(requests([[5], [6]], forced=[[7], []]))


def test_two_iterators_of_one_engine_do_not_share_a_cache() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16, slots=2)
    jobs = [[toy_prompt(80 + 9 * i, seed=10 * j + i) for i in range(4)] for j in range(2)]
    apart = [[g.token_ids for g in engine.generate(job, max_new_tokens=9)] for job in jobs]
    together = zip(*(engine.generate(job, max_new_tokens=9) for job in jobs), strict=True)
    for index, pair in enumerate(together):
        assert [g.token_ids for g in pair] == [apart[0][index], apart[1][index]]


def test_a_layer_kind_that_no_budget_bounds_is_refused() -> None:
    model = toy_model()
    model.config.layer_types = ["full_attention", "chunked_attention", "linear_attention"]
    with pytest.raises(UsageError, match="its chunked_attention, linear_attention layers"):
        Engine(model, KeyDiff(), budget_tokens=32)


def test_a_policy_s_own_infinity_does_not_outrank_protection() -> None:
    class Infinite(KeyDiff):
        def score(self, view: object) -> torch.Tensor:
            return torch.full_like(view.positions, 1, dtype=torch.float32) / 0

    engine = Engine(toy_model(), Infinite(sinks=4), budget_tokens=32, chunk_tokens=16)
    (generation,) = engine.generate([toy_prompt(90)], max_new_tokens=3, record_kept=True)
    for positions in generation.kept_positions:
        assert all(head[:4] == [0, 1, 2, 3] for head in positions.tolist())


def test_the_short_chunk_of_a_prompt_and_of_a_question_comes_first() -> None:
    engine = Engine(toy_model(), KeyDiff(), budget_tokens=32, chunk_tokens=16)
    asked = Request(prompt=toy_prompt(60), max_new_tokens=1, question_tokens=20)
    (generation,) = engine.generate([asked], record_history=True)
    assert generation.kept_history is not None
    assert [kept.seen_tokens for kept in generation.kept_history] == [8, 24, 40, 44, 60]
