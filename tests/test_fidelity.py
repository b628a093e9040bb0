"""Fidelity: hand-made divergences, references made once, recall against written-out attention."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvarena.codecs.none import NoCodec
from kvarena.harness.cells import run_cell as cell_runs
from kvarena.harness.cells.cell import Cell
from kvarena.harness.cells.fidelity_measures import RecallProbe, compare
from kvarena.harness.cells.forced_answers import forced_answers
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.engine import Engine, Request
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.sampling import Sampling
from kvarena.harness.settings import CellSettings
from kvarena.policies.base import Policy
from kvarena.policies.full import Full
from kvarena.policies.keydiff import KeyDiff
from kvarena.tasks.base import Sample, Task
from kvarena.tasks.fidelity import Fidelity
from toy_folder import save_haystack, save_model_folder
from toy_tokenizers import CharTokenizer
from toys import toy_model, toy_prompt

KL = "kl_per_token"


class ToyForced(Task):
    """Forces ``given`` (None: the full cache's own answer)."""

    name = "toy"
    version = "1"
    is_teacher_forced = True

    def __init__(self, given: list[int] | None = None, attention_recall: bool = False) -> None:
        self.given = given
        self.attention_recall = attention_recall

    def samples(self, tokenizer: object, seed: int, limit: int | None = None) -> list[Sample]:
        return toy_samples()

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        return {}

    def forced_token_ids(self, tokenizer: object, sample: Sample) -> list[int] | None:
        return self.given


def toy_samples(num: int = 4, num_tokens: int = 200, **changes: Any) -> list[Sample]:
    return [
        Sample(
            **{
                "id": f"sample{i}",
                "prompt_token_ids": tuple(toy_prompt(num_tokens + 7 * i, seed=i)),
                "references": (),
                "max_new_tokens": 8,
                **changes,
            }
        )
        for i in range(num)
    ]


def forced(
    folder: Path,
    policy: Policy,
    budget: int | None = None,
    *,
    samples: Sequence[Sample] | None = None,
    task: Task | None = None,
    stops: Sequence[int] = (),
    question_tokens: int = 0,
    chunk: int = 32,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[Any, dict]]:
    """Generations and measures in the order of the samples, on a toy model."""
    samples = toy_samples() if samples is None else samples

    def engine(model: Any, codec: Any, **changes: Any) -> Engine:
        options = {"policy": policy, "slots": 3, "chunk_tokens": chunk} | changes
        return Engine(model, codec=codec, **{k: v for k, v in options.items() if v is not None})

    cell = SimpleNamespace(
        task=task or ToyForced(),
        label="toy",
        engine=engine,
        identity=dict.fromkeys(["model", "dtype", "attention", "device"], "toy")
        | {"chunk": chunk, "content": {"model": "toy"}},
    )
    found = forced_answers(
        cell,
        toy_model(dtype=dtype),
        None,
        samples,
        [
            Request(
                prompt=sample.prompt_token_ids,
                max_new_tokens=sample.max_new_tokens,
                budget_tokens=budget,
                question_tokens=question_tokens,
                stop_token_ids=set(stops),
                min_new_tokens=int(sample.stop_newline),
            )
            for sample in samples
        ],
        codec=NoCodec(),
        cache_dir=folder,
    )
    return sorted(found, key=lambda pair: pair[0].index)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Policy and number of prompts of every run of an engine."""
    generate, found = Engine.generate, []

    def spy(engine: Engine, prompts: Sequence, **options: object) -> object:
        found.append((type(engine.policy).__name__, len(prompts)))
        return generate(engine, prompts, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    return found


# ---- what is measured ----


def test_measures_of_a_hand_made_answer_of_two_tokens() -> None:
    full = torch.tensor([[3.0, 1.0], [1.0, 9.0]]).log() + 5  # a constant changes nothing
    policy = torch.tensor([[1.0, 1.0001], [1.0, 9.0]]).log() - 7
    measures = compare(full, policy, [0, 1])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert measures[KL] == pytest.approx([kl, 0], abs=1e-4)
    assert measures["kl_mean"] == pytest.approx(kl / 2, abs=1e-4)
    assert measures["kl_max"] == max(measures[KL])
    assert measures["agrees_per_token"] == [0, 1]
    assert measures["score"] == 0.5
    difference = math.log(0.75) - math.log(0.5)
    assert measures["nll_difference_per_token"] == pytest.approx([difference, 0], abs=1e-4)
    assert measures["nll_full"] == pytest.approx(-(math.log(0.75) + math.log(0.9)) / 2)
    assert measures["nll_policy"] - measures["nll_full"] == pytest.approx(
        measures["nll_difference"]
    )
    assert measures["num_reference_tokens"] == 2


def test_kl_is_that_of_torch_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    full, policy = torch.randn(2, 50, 300, generator=generator, dtype=torch.float64) * 6
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=full),
        torch.distributions.Categorical(logits=policy),
    )
    assert compare(full, policy, [0] * 50)[KL] == pytest.approx(expected.tolist())
    near = compare(full, full + 1e-9 * torch.rand(full.shape, generator=generator), [0] * 50)
    assert min(near[KL]) >= 0


def test_extreme_logits_give_finite_measures() -> None:
    full = torch.tensor([[2e4, 0.0, -2e4], [0.0, float("-inf"), 0.0]])
    policy = torch.tensor([[0.0, 2e4, -2e4], [0.0, float("-inf"), 0.0]])
    assert compare(full, policy, [0, 0])[KL] == [2e4, 0]


def test_half_precision_logits_are_compared_in_double_precision() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert compare(logits.float(), logits, [1, 2, 3])["kl_max"] == 0


# ---- the runs ----


@pytest.mark.parametrize("given", [None, [5, 6, 7]])
def test_the_full_policy_has_no_divergence(given: list[int] | None, tmp_path: Path) -> None:
    for _, measures in forced(tmp_path, Full(), task=ToyForced(given)):
        assert measures["kl_max"] < 1e-6
        assert measures["score"] == 1
        assert measures["nll_difference_per_token"] == pytest.approx(
            [0] * len(measures[KL]), abs=1e-5
        )


def test_what_is_forced_is_the_full_caches_own_greedy_answer(tmp_path: Path) -> None:
    prompts = [sample.prompt_token_ids for sample in toy_samples()]
    engine = Engine(toy_model(dtype=torch.float64), Full())
    own = [run.token_ids for run in engine.generate(prompts, max_new_tokens=8)]
    assert [run.token_ids for run, _ in forced(tmp_path, KeyDiff(), 32)] == own
    stopped = [run.token_ids for run, _ in forced(tmp_path, KeyDiff(), 32, stops=[own[0][3]])]
    assert stopped[0] == own[0][: own[0].index(own[0][3]) + 1]
    cut = forced(tmp_path, KeyDiff(), 32, samples=toy_samples(max_new_tokens=3))
    assert [run.token_ids for run, _ in cut] == [token_ids[:3] for token_ids in own]
    assert cut[0][1]["num_reference_tokens"] == len(cut[0][1][KL]) == 3


def test_measures_are_those_of_two_runs_by_hand(tmp_path: Path) -> None:
    model, answer = toy_model(dtype=torch.float64), [9, 4, 4, 80]
    logits = []
    for policy, budget in ((Full(), None), (KeyDiff(), 40)):
        engine = Engine(model, policy, budget_tokens=budget, chunk_tokens=32, slots=1)
        prompt = toy_samples()[1].prompt_token_ids
        asked = Request(prompt=prompt, forced=answer)
        run = next(engine.generate([asked], record_logits="answer"))
        logits.append(run.logits)
    expected = compare(*logits, answer)
    measures = forced(tmp_path, KeyDiff(), 40, task=ToyForced(answer))[1][1]
    assert measures["kl_mean"] > 0.01
    assert measures == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_an_answer_of_one_token_is_measured(tmp_path: Path) -> None:
    for recall in (False, True):
        task = ToyForced([5], attention_recall=recall)
        for _, measures in forced(tmp_path, KeyDiff(), 40, task=task):
            assert measures["num_reference_tokens"] == len(measures[KL]) == 1


def test_a_larger_budget_stays_nearer_to_the_full_cache(tmp_path: Path) -> None:
    means = []
    for budget in (24, 150, 215, 400):
        found = forced(tmp_path, KeyDiff(), budget, samples=toy_samples(8))
        means.append(sum(measures["kl_mean"] for _, measures in found) / len(found))
    assert means == sorted(means, reverse=True)
    assert means[0] > 10 * means[2]
    assert means[3] < 1e-6


# ---- the full cache runs once ----


def test_a_second_policy_does_not_run_the_full_cache_again(
    tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    first = forced(tmp_path, KeyDiff(), 32)
    assert runs == [("Full", 4), ("KeyDiff", 4)]
    forced(tmp_path, build(load_choice("policy", "snapkv")), 64)
    again = forced(tmp_path, KeyDiff(), 32, question_tokens=5)
    assert runs[2:] == [("SnapKV", 4), ("KeyDiff", 4)]
    assert [run.token_ids for run, _ in again] == [run.token_ids for run, _ in first]
    assert not list(tmp_path.rglob(".*"))


def test_only_the_references_that_are_missing_are_made(
    tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    forced(tmp_path, KeyDiff(), 32, samples=toy_samples(2))
    runs.clear()
    forced(tmp_path, KeyDiff(), 32)
    assert runs == [("Full", 2), ("KeyDiff", 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 16},
        {"stops": [5]},
        {"task": ToyForced([4, 5])},
        {"samples": toy_samples(max_new_tokens=5)},
        {"samples": toy_samples(num_tokens=201)},
        {"samples": toy_samples(stop_newline=True)},
    ],
)
def test_what_could_change_a_reference_gives_another_one(
    changes: dict, tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    forced(tmp_path, KeyDiff(), 32)
    runs.clear()
    forced(tmp_path, KeyDiff(), 32, **changes)
    assert runs[0] == ("Full", 4)


def test_a_stop_token_that_may_not_come_first_still_has_its_likelihood(tmp_path: Path) -> None:
    samples = toy_samples(stop_newline=True)
    for _, measures in forced(tmp_path, Full(), samples=samples, stops=range(60)):
        assert measures["kl_max"] < 1e-6


# ---- attention recall ----


def written_out_recall(
    architecture: str, prompt: list[int], answer: list[int], history: list, dtype: torch.dtype
) -> torch.Tensor:
    """[L, H] from one pass of transformers' own attention over prompt and answer."""
    model = toy_model(architecture, dtype=dtype)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([[*prompt, *answer[:-1]]]), output_attentions=True)
    kept_after = {step.seen_tokens: step.positions for step in history}
    num_seen = [0, *kept_after]
    shares = []
    for layer, weights in enumerate(output.attentions):  # [1, H, Q, T]
        for head in range(weights.shape[1]):
            kv_head = head // 2
            fractions = []
            for query in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
                start = max(seen for seen in num_seen if seen <= query)
                kept = set(kept_after[start][layer][kv_head].tolist()) if start else set()
                held = sorted(kept | set(range(start, query + 1)))
                row = weights[0, head, query]
                fractions.append(float(row[held].sum() / row.sum()))
            shares.append(sum(fractions) / len(fractions))
    return torch.tensor(shares, dtype=torch.float64).view(len(output.attentions), -1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("name", "question_tokens"), [("keydiff", 0), ("keydiff", 20), ("snapkv", 0), ("h2o", 9)]
)
def test_recall_equals_written_out_attention(
    architecture: str, name: str, question_tokens: int
) -> None:
    prompt, answer = toy_prompt(150), [7, 30, 8, 99, 12]
    model = toy_model(architecture)
    policy = build(load_choice("policy", name))
    engine = Engine(model, policy, budget_tokens=40, chunk_tokens=32)
    asked = Request(prompt=prompt, forced=answer)
    held_back = replace(asked, question_tokens=question_tokens)
    run = next(engine.generate([held_back], record_history=True))
    probe = RecallProbe(len(prompt), run.kept_history)
    next(Engine(model, probe, chunk_tokens=48, slots=1).generate([asked]))
    expected = written_out_recall(architecture, prompt, answer, run.kept_history, torch.float32)
    assert probe.shares.shape == expected.shape == (3, 4)
    torch.testing.assert_close(probe.shares, expected, rtol=0, atol=1e-5)
    assert 0.05 < expected.mean() < 0.99


def test_recall_is_in_the_measures_and_one_for_the_full_cache(tmp_path: Path) -> None:
    task = ToyForced(attention_recall=True)
    for policy, budget in ((Full(), None), (KeyDiff(), 1000)):
        for _, measures in forced(tmp_path, policy, budget, task=task):
            assert measures["attention_recall"] == pytest.approx(1)
            assert measures["attention_recall_by_layer_head"] == [[1.0] * 4] * 3
    for _, measures in forced(tmp_path, KeyDiff(), 40, task=task):
        shares = torch.tensor(measures["attention_recall_by_layer_head"], dtype=torch.float64)
        assert shares.shape == (3, 4)
        assert 0 < measures["attention_recall"] < 0.9
        assert measures["attention_recall"] == pytest.approx(float(shares.mean()), abs=1e-4)
        assert len(json.dumps(measures["attention_recall_by_layer_head"])) <= 3 * 4 * 8 + 6


def test_without_recall_nothing_is_probed(tmp_path: Path, runs: list[tuple[str, int]]) -> None:
    found = forced(tmp_path, KeyDiff(), 40)
    assert all("attention_recall" not in measures for _, measures in found)
    assert all(run.kept_history is None for run, _ in found)
    assert "RecallProbe" not in dict(runs)


# ---- the task ----


TOKENIZER = CharTokenizer(has_start=True)  # special tokens would show


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """What needle's samples are, in place of its own."""
    samples = toy_samples(2, references=("", " ", "42 is it", "43"), meta={"depth": 5})
    needle = type(build(load_choice("task", "needle")))
    monkeypatch.setattr(needle, "samples", lambda task, tokenizer, seed, limit: samples)
    return samples


def test_samples_are_those_of_the_task_within(inner: list[Sample]) -> None:
    found = Fidelity(of="needle", max_tokens=5).samples(TOKENIZER, 0)
    for sample, own in zip(found, inner, strict=True):
        assert sample.prompt_token_ids == own.prompt_token_ids
        assert sample.references == own.references
        assert sample.max_new_tokens == 5
        assert sample.meta == {"depth": 5, "of": "needle", "forced": "full"}
        assert sample.id != own.id
    (longer, _) = Fidelity(max_tokens=99).samples(TOKENIZER, 0)
    assert longer.max_new_tokens == 8
    assert longer.id == found[0].id
    (gold, _) = Fidelity(reference="gold").samples(TOKENIZER, 0)
    assert gold.id != found[0].id


@pytest.mark.usefixtures("inner")
def test_gold_is_the_first_reference_that_is_not_blank_cut_and_without_special_tokens() -> None:
    task = Fidelity(reference="gold", max_tokens=4)
    (sample, _) = task.samples(TOKENIZER, 0)
    assert task.forced_token_ids(TOKENIZER, sample) == [ord(letter) for letter in "42 i"]
    assert Fidelity().forced_token_ids(TOKENIZER, sample) is None


def test_a_sample_without_a_gold_answer_is_refused(
    inner: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner[1:] = toy_samples(1, id="hollow", references=("", " \n"))
    with pytest.raises(ValueError, match="hollow has no gold answer to force; use reference=full"):
        Fidelity(reference="gold").samples(TOKENIZER, 0)
    assert len(Fidelity().samples(TOKENIZER, 0)) == 2


def test_stop_newline_and_question_stay(inner: list[Sample]) -> None:
    inner[:] = toy_samples(1, stop_newline=True, question_tokens=11)
    (sample,) = Fidelity().samples(TOKENIZER, 0)
    assert sample.stop_newline
    assert sample.question_tokens == 11


def test_options_reach_the_task_within_and_name_and_version_say_so() -> None:
    assert Fidelity(options={"lengths": [300]})._task.lengths == (300,)
    assert Fidelity()._task == build(load_choice("task", "needle"))
    assert Fidelity().name == "fidelity-needle"
    assert Fidelity(reference="gold").name == "fidelity-needle-gold"
    versions = {Fidelity(options=options).version for options in (None, {"lengths": [300]})}
    assert len(versions) == 2
    assert Fidelity(options={}).version == Fidelity().version


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "neadle"}, "unknown task 'neadle'. Did you mean needle"),
        ({"of": "fidelity"}, "of must name another task"),
        ({"reference": "foo"}, "unknown reference 'foo'. Available: full, gold"),
        ({"options": {"lenghts": [300]}}, "unknown option of task needle 'lenghts'. Did you mean"),
        ({"options": {"lengths": [3]}}, "lengths must be a list"),
        ({"options": "lengths"}, "options must be a mapping or null, got 'lengths'"),
        ({"options": {"_target_": "os.system"}}, "unknown option of task needle '_target_'"),
        ({"max_tokens": 0}, "max_tokens must be an int from 1 on, got 0"),
        ({"max_tokens": True}, "max_tokens must be an int from 1 on, got True"),
        ({"attention_recall": 1}, "attention_recall must be a bool, got 1"),
    ],
)
def test_bad_options_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build({**load_choice("task", "fidelity"), **settings})


def test_only_fidelity_is_teacher_forced() -> None:
    for name in choices("task"):
        module, _, class_name = load_choice("task", name)["_target_"].rpartition(".")
        task_class = getattr(__import__(module, fromlist=[class_name]), class_name)
        assert task_class.is_teacher_forced == (name == "fidelity")


# ---- cells ----


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    return save_model_folder(folder / "toy"), save_haystack(folder / "hay")


def toy_cell(files: tuple[Path, Path], policy: str = "keydiff", **changes: Any) -> Cell:
    cell_runs._held_model.cache_clear()
    options = {"haystack": str(files[1]), "lengths": [400], "depths": [0, 100]}
    task = {**load_choice("task", "fidelity"), "options": options, "max_tokens": 6}
    settings: dict[str, Any] = {
        "policy": load_choice("policy", policy),
        "shape": load_choice("shape", "uniform"),
        "codec": load_choice("codec", "none"),
        "model": {"name": "toy", "source": str(files[0])},
        "budget": 64,
        "slots": 2,
        "chunk": 64,
    }
    task |= changes.pop("task", {})
    return Cell(settings=CellSettings(**settings | changes, task=task))


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_rows_have_the_columns_of_every_task_and_the_measures(
    toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    cell = toy_cell(toy_files)
    folder = run_cell(cell, tmp_path).path
    assert folder.relative_to(tmp_path).parts[:3] == ("runs", "fidelity-needle", "toy")
    rows = rows_in(folder)
    inner = run_cell(cell_of_needle(cell), tmp_path).path
    assert set(rows_in(inner)[0]) <= set(rows[0])
    for row in rows:
        assert (row["task"], row["meta_of"], row["status"]) == ("fidelity-needle", "needle", "ok")
        assert row["budget_tokens"] == 64
        assert 0 <= row["score"] <= 1
        assert row["score"] == sum(row["agrees_per_token"]) / row["num_reference_tokens"]
        assert row["generated_tokens"] == row["num_reference_tokens"] == len(row[KL])
        assert 0 < row["kl_mean"] <= row["kl_max"]
        assert row["kv_bytes_peak"] > row["kv_bytes_kept"] > 0


def cell_of_needle(cell: Cell) -> Cell:
    """The cell of the task within."""
    task = {**load_choice("task", "needle"), **cell.settings.task["options"], "max_new_tokens": 6}
    return Cell(settings=replace(cell.settings, task=task))


def test_a_sweep_pays_for_the_full_cache_once_and_goes_on_where_it_stopped(
    toy_files: tuple[Path, Path], tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    run_cell(toy_cell(toy_files, limit=1), tmp_path)
    folder = run_cell(toy_cell(toy_files), tmp_path).path
    run_cell(toy_cell(toy_files, "l2norm", question="after", budget=128), tmp_path)
    run_cell(toy_cell(toy_files), tmp_path)
    expected = [("Full", 1), ("KeyDiff", 1), ("Full", 1), ("KeyDiff", 1), ("L2Norm", 2)]
    assert runs == expected
    assert len(rows_in(folder)) == len({row["sample_id"] for row in rows_in(folder)}) == 2
    assert len(list(tmp_path.glob("cache/fidelity/*/*.safetensors"))) == 2


def test_gold_is_forced_as_text(toy_files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = run_cell(toy_cell(toy_files, task={"reference": "gold"}), tmp_path).path
    for row in rows_in(folder):
        assert row["prediction"] == row["references"][0][:6]
        assert row["task"] == "fidelity-needle-gold"


def test_sampling_is_refused(toy_files: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"forces its answers; leave out sampling\.temperature"):
        toy_cell(toy_files, sampling=Sampling(temperature=0.5))
