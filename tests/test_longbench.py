"""LongBench: prompts to the letter, the cut in the middle, and data that is refused."""

import gzip
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvarena.conf
from kvarena.tasks.base import Sample
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from kvarena.tasks.longbench import LongBench, data
from kvarena.tasks.longbench.length import cut_middle
from kvarena.tasks.longbench.names import (
    CATEGORIES,
    E_TASKS,
    EN_CODE_16,
    METRIC_OF,
    NEEDS_JIEBA,
    NUM_ROWS,
    TASKS,
    base_task,
    chosen_tasks,
)
from kvarena.tasks.longbench.task import NO_CHAT
from kvarena.tasks.longbench.token_f1 import chinese_segmenter
from toy_tokenizers import CharTokenizer

SAMPLE = SAMPLE_FOLDER / "longbench"
# ../shared beside the checkout, or wherever the variable says.
SHARED = Path(os.environ.get("KVARENA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SHARED /= "longbench"
WITHOUT_JIEBA = tuple(task for task in TASKS if task not in NEEDS_JIEBA)


TOKENIZER = CharTokenizer("USER: {} ASSISTANT:", has_start=True)


def samples(limit: int | None = None, **options: Any) -> list[Sample]:
    task = LongBench(**{"data": "sample", "tasks": WITHOUT_JIEBA, **options})
    return task.samples(TOKENIZER, 0, limit)


def text_of(sample: Sample) -> str:
    """The prompt without the special token at its front or the chat template around it."""
    text = TOKENIZER.decode(list(sample.prompt_token_ids), skip_special_tokens=True)
    if base_task(sample.meta["dataset"]) in NO_CHAT:
        return text
    return text.removeprefix("USER: ").removesuffix(" ASSISTANT:")


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    [path] = [path for path in folder.glob(f"{task}.jsonl*") if path.stem.split(".")[0] == task]
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in content.split(b"\n") if line]


def copied(folder: Path, task: str = "qasper", **changes: object) -> Path:
    """A folder with one task of the sample, its second row changed; ... takes a field away."""
    rows = rows_of(SAMPLE, task)
    rows[1] = {k: v for k, v in (rows[1] | changes).items() if v is not ...}
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    return folder


# ---- prompts ----


def check_prompts(folder: Path, settings: Path, found: list[Sample]) -> None:
    """Every prompt is its template filled in, byte for byte, in the order of the files."""
    templates = json.loads((settings / "dataset2prompt.json").read_text("utf-8"))
    lengths = json.loads((settings / "dataset2maxlen.json").read_text("utf-8"))
    pairs = [(task, row) for task in TASKS for row in rows_of(folder, task)]
    pairs = [(task, row) for task, row in pairs if task in {s.meta["dataset"] for s in found}]
    assert len(pairs) == len(found)
    for (task, row), sample in zip(pairs, found, strict=True):
        assert text_of(sample).encode() == templates[task].format(**row).encode()
        assert sample.references == tuple(row["answers"])
        assert sample.max_new_tokens == lengths[task]
        assert sample.meta["row_id"] == row["_id"]
        assert sample.meta["dataset"] == task
        assert not sample.meta["truncated"]


def test_prompts_of_all_tasks_are_their_templates_filled_in_byte_for_byte() -> None:
    pytest.importorskip("jieba")
    found = samples(tasks="all", max_length=10**6)
    check_prompts(SAMPLE, SAMPLE, found)
    assert {sample.meta["dataset"] for sample in found} == set(TASKS)


@pytest.mark.shared_data
def test_prompts_of_real_rows_are_the_official_templates_filled_in() -> None:
    pytest.importorskip("jieba")
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    found = samples(data=str(SHARED / "mini"), tasks="all", max_length=10**6)
    assert len(found) == 237
    check_prompts(SHARED / "mini", SHARED, found)


@pytest.mark.shared_data
def test_a_gold_answer_of_a_real_row_scores_1() -> None:
    pytest.importorskip("jieba")
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    task = LongBench(data=str(SHARED / "mini"), max_length=100)
    for sample in task.samples(TOKENIZER, 0):
        assert task.score(sample, sample.references[0])["score"] == pytest.approx(1, abs=1e-7)


def test_six_tasks_have_no_chat_template() -> None:
    for sample in samples():
        text = TOKENIZER.decode(list(sample.prompt_token_ids))
        plain = sample.meta["dataset"] in NO_CHAT
        assert text.startswith("<s>") == plain, "a chat template writes its own special tokens"
        assert text.endswith(" ASSISTANT:") != plain


def test_a_model_without_chat_template_gets_every_prompt_plain() -> None:
    task = LongBench(data="sample", tasks=["qasper", "lcc"])
    for sample in task.samples(CharTokenizer(has_start=True), 0):
        assert TOKENIZER.decode(list(sample.prompt_token_ids)).startswith("<s>")


def test_only_samsum_stops_at_a_newline() -> None:
    assert {s.meta["dataset"] for s in samples() if s.stop_newline} == {"samsum"}


@pytest.mark.parametrize("max_length", [10**6, 300])
def test_question_tokens_begin_where_the_context_ends(max_length: int) -> None:
    templates = json.loads((SAMPLE / "dataset2prompt.json").read_text("utf-8"))
    for sample in samples(max_length=max_length, tasks=["qasper", "trec", "repobench-p"]):
        task = sample.meta["dataset"]
        [row] = [row for row in rows_of(SAMPLE, task) if row["_id"] == sample.meta["row_id"]]
        after = templates[task].split("{context}")[1].format(**row)
        text = TOKENIZER.decode(list(sample.prompt_token_ids[-sample.question_tokens :]))
        if max_length > 300 or len(after) <= 150:
            assert text.removesuffix(" ASSISTANT:") == after
        else:  # longer than the tail that is kept: the head has the context, the tail no end of it
            assert len(text.removesuffix(" ASSISTANT:")) == 150


# ---- the cut in the middle ----


@pytest.mark.parametrize("max_length", [2, 3, 99, 100, 801])
def test_a_long_prompt_keeps_exactly_its_first_and_last_halves(max_length: int) -> None:
    whole = samples(tasks=["narrativeqa", "trec"], max_length=10**6)
    for full, cut in zip(
        whole, samples(tasks=["narrativeqa", "trec"], max_length=max_length), strict=True
    ):
        text, half = text_of(full), max_length // 2
        # The special token at the front is one of those kept, and is not written out.
        expected = text[: half - 1] + text[-half:] if len(text) + 1 > max_length else text
        assert text_of(cut) == expected
        assert cut.meta["truncated"]
        assert cut.meta["prompt_tokens_before_truncation"] == len(text) + 1
        assert cut.id == full.id


def test_a_prompt_of_exactly_the_allowed_length_is_not_cut() -> None:
    [first, _] = samples(tasks="trec", max_length=10**6)
    num_tokens = len(first.prompt_token_ids)  # no chat template: these are all
    for max_length, truncated in ((num_tokens, False), (num_tokens - 1, True)):
        [sample, _] = samples(tasks="trec", max_length=max_length)
        assert sample.meta["truncated"] == truncated
        assert (sample.prompt_token_ids == first.prompt_token_ids) != truncated


@pytest.mark.parametrize(
    ("context_end", "expected"),
    [(18, 8), (15, 5), (12, 4), (5, 4), (4, 4), (3, 3)],
)
def test_the_end_of_the_context_survives_the_cut(context_end: int, expected: int) -> None:
    # 19 characters and a special token; 4 characters and 5 more are kept.
    text, found, num_tokens = cut_middle(TOKENIZER, "abcdefghijklmnopqrs", context_end, 10)
    assert (text, num_tokens) == ("abcdopqrs", 20)
    assert found == expected


# ---- names, limits, ids, what rows are told ----


def test_there_are_21_tasks_in_6_categories_16_of_them_english_or_code_and_13_in_e() -> None:
    assert (len(TASKS), len(CATEGORIES), len(EN_CODE_16), len(E_TASKS)) == (21, 6, 16, 13)
    assert set(TASKS) == set(METRIC_OF)
    assert sum(NUM_ROWS.values()) == 4750


def test_tasks_are_named_in_groups_lists_or_with_commas() -> None:
    assert chosen_tasks("all") == TASKS
    assert chosen_tasks("en_code16") == EN_CODE_16
    assert chosen_tasks("e")[0] == "qasper_e"
    assert chosen_tasks("qasper, lcc") == chosen_tasks(["qasper", "lcc"]) == ("qasper", "lcc")
    assert chosen_tasks(["lcc", "qasper", "lcc"]) == ("lcc", "qasper")
    assert chosen_tasks(["qasper", "en_code16"])[0] == "qasper"
    assert len(chosen_tasks(["qasper", "en_code16"])) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": "qaspr"},
            "unknown LongBench task 'qaspr'. Did you mean qasper.* Known: all, en",
        ),
        ({"tasks": ["narrativeqa_e"]}, "unknown LongBench task 'narrativeqa_e'. Did you mean narr"),
        ({"tasks": []}, "at least one task"),
        ({"max_length": 1}, "max_length must be auto, an int from 2 on or null, got 1"),
        ({"max_length": "4k"}, "max_length must be auto, an int from 2 on or null, got '4k'"),
        ({"code_similarity": "x"}, "code_similarity must be rapidfuzz or difflib, got 'x'"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongBench(**options)


def test_the_limit_holds_for_each_task() -> None:
    one = samples(limit=1)
    assert [sample.meta["dataset"] for sample in one] == list(WITHOUT_JIEBA)
    assert [sample.id for sample in one] == [sample.id for sample in samples()][::2]


def test_ids_depend_on_the_row_alone() -> None:
    every = {sample.id for sample in samples()}
    assert len(every) == 2 * len(WITHOUT_JIEBA)
    assert {s.id for s in samples(tasks="lcc", max_length=50, code_similarity="difflib")} < every


def test_a_sample_names_its_task_and_the_context_it_shares(tmp_path: Path) -> None:
    assert all(sample.part == sample.meta["dataset"] for sample in samples())
    first, second = samples(tasks="qasper")
    assert first.document != second.document
    context = rows_of(SAMPLE, "qasper")[0]["context"]
    first, second = samples(tasks="qasper", data=str(copied(tmp_path / "lb", context=context)))
    assert first.document == second.document
    assert first.id != second.id


def test_rows_say_that_they_are_a_sample_and_not_the_benchmark(tmp_path: Path) -> None:
    for sample in samples():
        assert sample.meta["is_sample"]
        assert sample.meta["data"] == "sample"
    for sample in samples(tasks="qasper", data=str(copied(tmp_path / "copy"))):
        assert not sample.meta["is_sample"]
        assert sample.meta["data"] == "folder:copy"


def test_meta_is_json_and_names_what_decides_a_score() -> None:
    for sample in samples(code_similarity="difflib", max_length=777):
        assert json.loads(json.dumps(sample.meta)) == dict(sample.meta)
        assert sample.meta["code_similarity"] == "difflib"
        assert sample.meta["max_length"] == 777
        assert ("all_classes" in sample.meta) == (sample.meta["dataset"] in ("trec", "lsht"))


def test_answers_are_scored_as_the_task_says() -> None:
    task = LongBench(data="sample", tasks=WITHOUT_JIEBA)
    for sample in task.samples(TOKENIZER, 0):
        found = task.score(sample, sample.references[0])
        assert found["score"] == pytest.approx(1, abs=1e-7)
        rouge = METRIC_OF[sample.meta["dataset"]] == "rouge"
        assert set(found) == {"score"} | ({"rouge_official_zero"} if rouge else set())
        assert task.score(sample, "")["score"] == 0
    [code, _] = samples(tasks="lcc")
    answer = "tides tides self.tides lambda"
    scores = {
        name: LongBench(code_similarity=name).score(code, answer)["score"]
        for name in ("rapidfuzz", "difflib")
    }
    assert scores["rapidfuzz"] != scores["difflib"]


def test_the_sample_has_two_rows_and_settings_for_every_task() -> None:
    for task in TASKS:
        rows = rows_of(SAMPLE, task)
        assert len(rows) >= 2
        assert {row["dataset"] for row in rows} == {task}
        assert all(row["language"] == ("zh" if task not in EN_CODE_16 else "en") for row in rows)
    size = sum(path.stat().st_size for path in SAMPLE.iterdir())
    assert size < 250_000


def test_the_yaml_agrees_with_the_class() -> None:
    text = (Path(kvarena.conf.__path__[0]) / "task" / "longbench.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings.pop("_target_") == "kvarena.tasks.longbench.LongBench"
    assert LongBench(**settings) == LongBench()


# ---- data ----


def test_a_folder_a_zip_and_gzipped_files_give_the_same_samples(tmp_path: Path) -> None:
    plain = copied(tmp_path / "data")
    packed = tmp_path / "packed"
    packed.mkdir()
    content = (plain / "qasper.jsonl").read_bytes()
    (packed / "qasper.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (tmp_path / name).write_bytes((plain / name).read_bytes())  # one level up of all three
        (plain / name).unlink()
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", content)
    by_source = [
        samples(tasks="qasper", data=str(tmp_path / name))
        for name in ("data", "packed", "data.zip")
    ]
    labels = [found[0].meta["data"] for found in by_source]
    assert labels == ["folder:data", "folder:packed", "zip:data.zip"]
    for found in by_source:
        for sample, first in zip(found, by_source[0], strict=True):
            assert (sample.id, sample.prompt_token_ids) == (first.id, first.prompt_token_ids)
            assert sample.meta["data_sha256"] == first.meta["data_sha256"]


def test_e_tasks_use_the_templates_and_lengths_of_their_base(tmp_path: Path) -> None:
    folder = copied(tmp_path / "e")
    (folder / "qasper.jsonl").rename(folder / "qasper_e.jsonl")
    found = samples(tasks="qasper_e", data=str(folder))
    assert [sample.meta["dataset"] for sample in found] == ["qasper_e"] * 2
    assert [text_of(s) for s in found] == [text_of(s) for s in samples(tasks="qasper")]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("qasper", {"answers": ...}, "lacks the field 'answers', which must be a list of texts"),
        ("qasper", {"answers": []}, r"field 'answers' must be a list of texts, got \[\]"),
        ("qasper", {"answers": "yes"}, "field 'answers' must be a list of texts, got \"yes\""),
        ("qasper", {"context": None}, "field 'context' must be a text, got null"),
        ("qasper", {"input": 3}, "field 'input' must be a text, got 3"),
        ("qasper", {"length": "9"}, "field 'length' must be a whole number"),
        ("qasper", {"dataset": "lcc"}, 'field \'dataset\' must be "qasper", got "lcc"'),
        ("qasper", {"_id": ...}, "lacks the field '_id'"),
        ("trec", {"all_classes": None}, "field 'all_classes' must be a list of texts, got null"),
        (
            "passage_retrieval_en",
            {"answers": ["7"]},
            "field 'answers' must be a list of texts that name a para",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    tmp_path: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    folder = copied(tmp_path / "bad", task, **changes)
    with pytest.raises(ValueError, match=rf"bad/{task}\.jsonl line 2:? {message}"):
        samples(tasks=task, data=str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset2prompt.json", {}, "'qasper' must be a text, got None"),
        ("dataset2prompt.json", {"qasper": "no"}, "must have {context} once .*, got none"),
        ("dataset2prompt.json", {"qasper": "{context}{context}"}, "must have {context} once"),
        ("dataset2prompt.json", {"qasper": "{context}{answer}"}, "no other fields than a row's"),
        ("dataset2maxlen.json", {"qasper": 0}, "'qasper' must be a whole number from 1 on, got 0"),
    ],
)
def test_bad_settings_are_named_by_file_and_task(
    tmp_path: Path, name: str, content: dict[str, Any], message: str
) -> None:
    folder = copied(tmp_path / "bad")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"bad/{name}: .*{message}"):
        samples(tasks="qasper", data=str(folder))


def test_a_folder_without_settings_names_both_files(tmp_path: Path) -> None:
    folder = copied(tmp_path / "lb")
    (folder / "dataset2maxlen.json").unlink()
    with pytest.raises(ValueError, match=r"no dataset2maxlen\.json in .*dataset2prompt\.json and"):
        samples(tasks="qasper", data=str(folder))


def test_a_task_that_is_not_there_is_named_before_anything_is_tokenized(tmp_path: Path) -> None:
    folder = copied(tmp_path / "lb")
    task = LongBench(tasks=["qasper", "lcc"], data=str(folder))
    with pytest.raises(ValueError, match=r"no lcc\.jsonl or lcc\.jsonl\.gz in .*lb"):
        task.samples(None, 0)


def test_offline_the_message_has_every_way_to_get_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))
    for place in ("hub", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="Ways to get LongBench") as refusal:
            samples(data=place)
        for way in ("data=hub", "data=<folder>", "data=<zip>", "data=sample"):
            assert way in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_the_hub_gives_its_zip_with_the_settings_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tmp_path / "lb")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(folder / "qasper.jsonl", "data/qasper.jsonl")
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_, **__: folder)
    monkeypatch.setattr(data, "SETTINGS", ())  # they lie in that folder already
    monkeypatch.setattr(data.HubFile, "fetch", lambda _: tmp_path / "data.zip")
    found = samples(data="hub", tasks="qasper")
    assert [sample.id for sample in found] == [sample.id for sample in samples(tasks="qasper")]
    assert found[0].meta["data"] == "hub:zai-org/LongBench@5e628be"


def test_without_jieba_only_the_tasks_that_need_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    chinese_segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert len(samples(tasks=WITHOUT_JIEBA)) == 2 * len(WITHOUT_JIEBA)
    for task in NEEDS_JIEBA:
        with pytest.raises(ValueError, match="pip install jieba"):
            LongBench(tasks=task).samples(None, 0)
