"""Inputs nobody should have given: refused in one line before the model loads, or run as they are.

T10  rows of data that are wrong      T16  budgets that are none
T13  prompts over the context         T17  parts that are not installed, names that do not exist
T14  empty and very short texts       T19  files and names that would do something else
T15  characters of every kind
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from faulty import Kvarena, comparable, no_model_loads, read_rows
from kvarena.harness.engine import Engine
from kvarena.policies.keydiff import KeyDiff
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from kvarena.tasks.math.answers import is_correct
from kvarena.tasks.math500 import Math500
from kvarena.tasks.needle import Needle
from toy_folder import toy_overrides
from toy_tokenizers import CharTokenizer
from toys import toy_model, toy_prompt

CODE = Path(__file__).parents[1]
LONGBENCH = SAMPLE_FOLDER / "longbench"


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    return Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))


@pytest.fixture
def math(kvarena: Kvarena) -> Kvarena:
    """MATH-500 on problems.jsonl, which a test writes."""
    data = kvarena.folder / "problems.jsonl"
    kvarena.overrides[1:] = ["task=math500", f"task.data={data}", "task.max_new_tokens=3"]
    kvarena.overrides += ["budget=64"]
    return kvarena


def save_problems(kvarena: Kvarena, *problems: Any) -> Path:
    """Any: a problem's text, or fields that are not as they should be."""
    path = kvarena.folder / "problems.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for number, problem in enumerate(problems):
            fields = problem if isinstance(problem, dict) else {"problem": problem}
            row = {"solution": "x", "answer": "1", "subject": "x", "level": 1}
            row |= {"problem": "p", "unique_id": str(number)} | fields
            stream.write(json.dumps({k: v for k, v in row.items() if v is not ...}) + "\n")
    return path


@pytest.fixture
def longbench(kvarena: Kvarena) -> Kvarena:
    """Both sample rows of qasper, in a folder of their own."""
    data = kvarena.folder / "data"
    data.mkdir()
    shutil.copy(LONGBENCH / "qasper.jsonl", data)
    shutil.copy(LONGBENCH / "dataset2prompt.json", data)
    (data / "dataset2maxlen.json").write_text('{"qasper": 3}')
    kvarena.overrides[1:] = ["task=longbench", f"task.data={data}", "task.tasks=[qasper]"]
    kvarena.overrides += ["task.max_length=600", "budget=64"]
    return kvarena


def check_refused(kvarena: Kvarena, *arguments: str) -> str:
    """Bad input: one line, code 2, no model, no rows. Returns the line."""
    with no_model_loads():
        outcome = kvarena(*arguments)
    assert (outcome.code, outcome.is_one_line) == (2, True), outcome
    assert kvarena.num_cells == 0
    return outcome.err


# ---- T10 ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": ...}, "lacks the field 'answer'"),
        ({"answer": 5}, "field 'answer' must be a text that is not empty, got 5"),
        ({"answer": ""}, "field 'answer' must be a text that is not empty, got \"\""),
        ({"problem": None}, "field 'problem' must be a text that is not empty, got null"),
        ({"problem": "half \ud83e"}, "field 'problem' must be a text that is not empty, got"),
    ],
)
def test_a_bad_row_is_told_with_file_line_and_field(
    fields: dict[str, Any], message: str, math: Kvarena
) -> None:
    path = save_problems(math, "good", fields)
    line = check_refused(math)
    assert f"{path} line 2" in line
    assert message in line


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"not JSON\n", b"[]\n", b"\xff\xfe{}\n", b'{"problem": "p"', b"\x00"]
)
def test_a_file_that_holds_no_rows_is_told_by_name(content: bytes, math: Kvarena) -> None:
    path = save_problems(math)
    path.write_bytes(content)
    assert str(path) in check_refused(math)


@pytest.mark.parametrize("field", ["answers", "context"])
def test_a_missing_field_of_longbench_is_told(field: str, longbench: Kvarena) -> None:
    path = longbench.folder / "data" / "qasper.jsonl"
    path.write_text(path.read_text("utf-8").replace(f'"{field}":', '"other":'), encoding="utf-8")
    line = check_refused(longbench)
    assert f"qasper.jsonl line 1 lacks the field '{field}'" in line


# ---- T13 ----


def test_a_prompt_over_the_context_is_refused_by_name(math: Kvarena) -> None:
    save_problems(math, "short", "long " * 300)
    line = check_refused(math)
    assert re.search(r"sample [0-9a-f]{16} has 1\d\d\d tokens, with 3 new ones 1\d\d\d: over", line)
    assert "over the model's context of 1024; the prompt alone fills it: use a model with a" in line


def test_a_prompt_that_fits_only_without_its_answer_is_refused(math: Kvarena) -> None:
    save_problems(math, "x" * 800)
    assert math("mode=plan").code == 0
    line = check_refused(math, "task.max_new_tokens=900")
    assert "over the model's context of 1024" in line
    most = re.search(r"use MAX_TOKENS=(\d+) or less \(task\.max_new_tokens=\1\)", line)
    assert most, line
    assert math("mode=plan", f"task.max_new_tokens={most[1]}").code == 0
    assert math("mode=plan", f"task.max_new_tokens={int(most[1]) + 1}").code == 2


def test_a_prompt_that_is_cut_says_so_with_both_lengths(longbench: Kvarena) -> None:
    assert longbench("task.max_length=300").code == 0
    assert longbench.num_cells == 1
    for row in longbench.rows:
        assert row["meta_truncated"] is True
        assert row["meta_prompt_tokens_before_truncation"] > row["meta_max_length"] == 300
        assert row["prompt_tokens"] <= 301  # and the special token at the front


# ---- T14 ----


def test_an_empty_answer_scores_0_and_is_no_error() -> None:
    for text in ("", " ", "\n\n", "\u200b"):
        assert is_correct(text, "5") is False
        assert is_correct(rf"\boxed{{{text}}}", "5") is False
        for task in (Needle(), Math500(data="sample")):
            sample = task.samples(CharTokenizer(), 0, 1)[0]
            assert task.score(sample, text)["score"] == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_a_prompt_within_the_budget_is_answered_as_with_the_full_cache(num_tokens: int) -> None:
    model = toy_model()
    prompt = toy_prompt(num_tokens)
    answers = []
    for budget in (64, None):
        engine = Engine(model, KeyDiff(), budget_tokens=budget, chunk_tokens=16)
        (answer,) = engine.generate([prompt], max_new_tokens=8)
        answers.append((answer.token_ids, answer.prompt_tokens, answer.kv_bytes_kept))
    assert answers[0] == answers[1]
    assert answers[0][1] == max(1, num_tokens)  # an empty prompt is the model's BOS token


@pytest.mark.parametrize("problem", [" ", "\n\n", "0"])
def test_a_blank_problem_runs(problem: str, math: Kvarena) -> None:
    save_problems(math, problem, "another")
    assert math(with_report=True).code == 0
    assert [row["status"] for row in math.rows] == ["ok", "ok"]
    assert [row["score"] for row in math.rows] == [0, 0]


# ---- T15 ----

TEXTS = {
    "emoji": "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001faa1",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202e\u0645\u0631\u202c",
    "chinese": "汉字\uff0c\U00020000",
    "line ends": "a\r\nb\rc\nd\u2028e\u2029f\x85g\x0bh\x0ci",
    "nul": "a\x00b",
    "quotes": "\"'\\,;\t{}[]=@SUM(A1)",
    "combining": "e\u0301 é \ufeff",
}


def test_every_character_comes_back_from_data_rows_and_tables(math: Kvarena) -> None:
    save_problems(math, *({"problem": text, "answer": text} for text in TEXTS.values()))
    assert math(with_report=True).code == 0
    assert {row["references"][0] for row in math.rows} == set(TEXTS.values())
    table = pd.read_csv(
        math.results / "tables" / "math500.csv",
        keep_default_na=False,
        dtype=str,
        lineterminator="\n",
    )
    written = dict(zip(table["sample_id"], table["reference"], strict=True))
    assert written == {row["sample_id"]: row["references"][0] for row in math.rows}


def test_a_line_of_a_megabyte_is_read_and_cut(longbench: Kvarena) -> None:
    path = longbench.folder / "data" / "qasper.jsonl"
    row = json.loads(path.read_bytes().split(b"\n")[0])
    row["context"] = "汉 word\u2028" * 120_000
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    assert path.stat().st_size > 1_000_000
    assert longbench().code == 0
    (row,) = longbench.rows
    assert row["meta_truncated"]
    assert row["meta_prompt_tokens_before_truncation"] > 1_000_000


# ---- T16 and T17; most of them are in test_cli.py ----


@pytest.mark.parametrize(
    "budget", ["1e9", "true", "0x40", "٦٤", "64.0", "64 tokens", "0k", "-25%", "%", "1e1%", "2K8"]
)
def test_a_budget_outside_the_grammar_is_told_the_grammar(budget: str, kvarena: Kvarena) -> None:
    line = check_refused(kvarena, f"budget='{budget}'")
    assert f"budget={budget} is not a number of tokens (512), of 1024 tokens (2k, 8k)" in line


def test_a_budget_over_every_prompt_takes_no_memory_for_it(kvarena: Kvarena) -> None:
    assert kvarena("budget=1000000000").code == 0
    assert {row["budget_tokens"] for row in kvarena.rows} == {1_000_000_000}
    assert all(row["kv_bytes_kept"] < 1_000_000 for row in kvarena.rows)


def test_flash_attention_on_a_cpu_comes_with_what_runs_there(kvarena: Kvarena) -> None:
    line = check_refused(kvarena, "-m", "attention=flash", "policy=keydiff")
    assert "use attention=sdpa" in line


# ---- T19 ----


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def crater(tmp_path: Path) -> Path:
    return tmp_path / "crater"


def test_the_bomb_works(crater: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.is_dir()


def test_pickles_in_every_folder_that_is_read_stay_closed(kvarena: Kvarena, crater: Path) -> None:
    haystack = kvarena.overrides[1].partition("=")[2]
    kvarena.overrides[1:] = [
        *("task=fidelity", "task.max_tokens=2", "budget=64"),
        f"+task.options.haystack={haystack}",
        *("+task.options.lengths=[400]", "+task.options.depths=[0]"),
    ]
    assert kvarena(with_report=True).code == 0
    folders = [path for path in kvarena.folder.rglob("*") if path.is_dir()]
    for folder in folders:
        for name in ("x.pkl", "x.pickle", "pytorch_model.bin", "x.pt", "cache.joblib", "x.npy"):
            (folder / name).write_bytes(pickle.dumps(Bomb(crater)))
    # More files in the model's folder make it another model, whose cells begin anew.
    outcome = kvarena("budget=96", with_report=True)
    assert outcome.code == 0, outcome
    assert not crater.exists()


def test_a_pickle_that_hydra_would_run_again_stays_closed(kvarena: Kvarena, crater: Path) -> None:
    pickled = kvarena.folder / "config.pickle"
    pickled.write_bytes(pickle.dumps(Bomb(crater)))
    line = check_refused(kvarena, f"--experimental-rerun={pickled}")
    assert "reads a pickle, which can run any code" in line
    assert not crater.exists()


def test_a_pickle_in_place_of_what_the_full_cache_said_is_replaced_unread(
    kvarena: Kvarena, crater: Path
) -> None:
    haystack = kvarena.overrides[1].partition("=")[2]
    kvarena.overrides[1:] = [
        *("task=fidelity", "task.max_tokens=2", "budget=64"),
        f"+task.options.haystack={haystack}",
        *("+task.options.lengths=[400]", "+task.options.depths=[0]"),
    ]
    assert kvarena().code == 0
    (path,) = kvarena.results.glob("cache/fidelity/*/*.safetensors")
    path.write_bytes(pickle.dumps(Bomb(crater)))
    assert kvarena("policy=tova").code == 0
    (rows,) = kvarena.results.glob("runs/*/*/tova-*/samples.jsonl")
    assert [row["status"] for row in read_rows(rows)] == ["ok"]
    assert not crater.exists()


def test_weights_that_are_a_pickle_with_code_are_refused(kvarena: Kvarena, crater: Path) -> None:
    model = kvarena.folder / "toy"
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(crater)}, model / "pytorch_model.bin")
    outcome = kvarena()
    assert outcome.code == 2
    assert "cannot load" in outcome.err
    assert "Traceback" not in outcome.err
    assert not crater.exists()


def test_weights_in_the_old_format_are_read_as_weights_only(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load, seen = kvarena.folder / "toy", torch.load, []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options.get("weights_only"))
        return load(*arguments, **options)

    assert kvarena().code == 0
    before = comparable(kvarena.rows)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    kvarena.results = kvarena.folder / "again"
    monkeypatch.setattr(torch, "load", spy)
    assert kvarena().code == 0
    assert seen
    assert set(seen) == {True}
    assert comparable(kvarena.rows, "run_id") == {
        name: {key: value for key, value in row.items() if key != "run_id"}
        for name, row in before.items()
    }


def test_a_model_that_brings_code_of_its_own_is_refused(kvarena: Kvarena, crater: Path) -> None:
    model = kvarena.folder / "toy"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(crater)!r})\n")
    line = check_refused(kvarena)
    assert "model toy: cannot load" in line
    assert not crater.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=../../x"],
        ["policy=../policy/keydiff"],
        ["experiment=../model/custom"],
        ["task=fidelity", "task.of=../../x"],
        ["task=longbench", "task.tasks=[../../x]"],
        ["task=ruler", "task.tasks=[../../x]"],
        ["-m", "policy=keydiff,../../x"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_a_name_is_never_a_path(arguments: list[str], kvarena: Kvarena) -> None:
    kvarena.overrides[1:] = []
    check_refused(kvarena, *arguments)


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/../../../x", "\\x"])
def test_a_models_name_leads_nowhere_else(name: str, kvarena: Kvarena) -> None:
    assert kvarena(f"model.name='{name}'", "limit=1", with_report=True).code == 0
    inside = {path for path in kvarena.folder.rglob("*") if path.name == "samples.jsonl"}
    assert len(inside) == 1
    assert len(inside.pop().relative_to(kvarena.results).parts) == 5
    assert {path.name for path in kvarena.folder.iterdir()} == {"results", "toy", "hay"}
    assert {path.name for path in kvarena.results.iterdir()} <= {"runs", "tables", "plots"}


def test_a_zip_that_would_write_elsewhere_writes_nothing(longbench: Kvarena) -> None:
    data = longbench.folder / "data"
    rows = (data / "qasper.jsonl").read_bytes()
    with zipfile.ZipFile(longbench.folder / "lb.zip", "w") as archive:
        archive.writestr("../../outside/qasper.jsonl", rows)
        archive.writestr("dataset2prompt.json", (data / "dataset2prompt.json").read_bytes())
        archive.writestr("dataset2maxlen.json", '{"qasper": 3}')
    assert longbench(f"task.data={longbench.folder / 'lb.zip'}", "limit=1").code == 0
    assert not list(longbench.folder.parents[1].rglob("outside"))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['{crater}']",
        "!!python/object/new:os.mkdir ['{crater}']",
        "!!python/name:os.mkdir",
    ],
)
def test_a_yaml_that_names_python_code_runs_none_of_it(
    text: str, kvarena: Kvarena, crater: Path
) -> None:
    folder = kvarena.folder / "conf"
    folder.mkdir()
    tag = text.format(crater=crater)
    (folder / "evil.yaml").write_text(f"budget: {tag}\n")
    line = check_refused(kvarena, f"--config-dir={folder}", "--config-name=evil")
    assert "!!python" in line or "tag:yaml.org,2002:python" in line
    check_refused(kvarena, f'budget="{tag}"')
    assert not crater.exists()


SERIALISERS = re.compile(
    r"\b(?:import|from)\s+pickle\b(?! import UnpicklingError)"
    r"|\b(?:import|from)\s+(?:dill|cloudpickle|joblib|shelve|marshal)\b"
    r"|torch\.load\((?!.*weights_only=True)|allow_pickle|read_pickle|yaml\.(?:unsafe_|full_)?load\(|trust_remote_code"
    r"|(?<!\.)\b(?:eval|exec)\(|shell=True"
)


@pytest.mark.parametrize("folder", ["harness", "tasks", "policies"])
def test_no_code_reads_a_format_that_can_run_code(folder: str) -> None:
    files = sorted((CODE / folder).rglob("*.py"))
    assert len(files) > 5
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1)
        if SERIALISERS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import load",
        "x = torch.load(path)",
        "yaml.load(text)",
        "eval(x)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert SERIALISERS.search(line)
    assert not SERIALISERS.search("x = torch.load(path, weights_only=True)")


def test_the_search_finds_nothing_else() -> None:
    assert not SERIALISERS.search("model.eval()")
    assert not SERIALISERS.search("yaml.safe_load(text)")
