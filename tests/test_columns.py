"""Columns are declared once: rows hold no others, types and bounds hold, the dictionary says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest

import toy_folder
from kvarena.harness.analysis.comparison import CELL, compare_cells
from kvarena.harness.analysis.distances import with_kl
from kvarena.harness.analysis.row_frame import read_rows, recorded_rows
from kvarena.harness.cells.cell import Cell
from kvarena.harness.cells.rescore import rescore_cell
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.column import Column
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import choices, load_choice, named_class
from kvarena.harness.report.text_tables import storable
from kvarena.harness.store import columns
from kvarena.harness.store.columns import (
    CHECKED,
    DICTIONARY,
    FORCED,
    ROWS,
    SUMMARY,
    SUMMARY_OF_FORCED,
    TURNS,
    all_columns,
    columns_of_tasks,
    with_tables,
)
from kvarena.harness.store.row_files import parse_row, row_model
from kvarena.tasks.base import Task
from kvarena.tasks.needle import Needle
from toy_folder import save_haystack, save_model_folder, toy_cell
from toys import save_policy_files

TASKS = choices("task")
DTYPES = {int: "Int64", float: "Float64", bool: "boolean"}
RECORDED = [
    path
    for folder in ("reference", "equal-bytes", "score-protection-shape")
    for path in sorted((DICTIONARY.parent / folder).glob("*.csv"))
    if path.read_text(encoding="utf-8").startswith("task,task_version,")
]
# Where a task's own defaults are too much for a toy.
SMALL = {
    "needle": {"lengths": [400], "depths": [50]},
    "ruler": {"lengths": [3000], "tasks": ["niah_multivalue", "vt"]},
    "scbench": {
        "families": ["retr_multihop", "math_find"],
        "lengths": [900],
        "num_contexts": 2,
        "turns_per_context": 2,
        "data": "generated",
    },
    "longbench": {"tasks": ["trec", "gov_report", "lcc"], "max_length": 300},
    "fidelity": {"options": {"lengths": [400], "depths": [50]}, "attention_recall": True},
}


class Runs:
    """Cells of toys in one folder, and the lines that they wrote, by the task's name in conf/."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.cells: list[Path] = []

    def run(self, name: str, task: dict[str, Any] | None = None, **changes: Any) -> Path:
        """One cell of it, where another one may be already."""
        small = {"data": "sample", "haystack": str(self.folder / "hay"), "max_new_tokens": 6}
        settings = load_choice("task", name)
        settings |= {key: value for key, value in small.items() if key in settings}
        settings |= SMALL.get(name, {}) | (task or {})
        if name == "fidelity":
            settings["options"] = {**settings["options"], "haystack": str(self.folder / "hay")}
        cell = toy_cell(self.folder, **({"task": settings, "limit": 2} | changes))
        path = run_cell(cell, self.results).path
        self.note(name, path)
        return path

    def note(self, name: str, path: Path) -> None:
        text = (path / "samples.jsonl").read_text(encoding="utf-8")
        self.lines.setdefault(name, []).extend(json.loads(line) for line in text.splitlines())
        self.cells += [path] if path not in self.cells else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Every task, policy and codec, budgets of every kind, failures, and answers scored again."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_folder, "CONTEXT_TOKENS", 8192)  # GSM8K's examples are long in bytes
        patch.chdir(folder)
        save_model_folder(folder / "toy")
        save_haystack(folder / "hay")
        save_policy_files(folder)
        runs = Runs(folder)
        for name in TASKS:
            runs.run(name)
        runs.run("needle", {"num_needles": 3, "num_asked": 2})
        runs.run("fidelity", {"reference": "gold"})
        save_mixture(folder / "scbench_summary_with_needles.jsonl")
        runs.run("scbench", {"families": ["mix_sum_niah"], "data": str(folder)})
        for policy in choices("policy"):
            runs.run("needle", policy=policy, question="after", budget="128")
        for codec in choices("codec"):
            runs.run("needle", policy="full", codec=codec, budget="full")
        runs.run("needle", codec="kivi", budget="200kB")
        for shape in choices("shape"):
            runs.run("needle", shape=shape, protect="4+8", evict_every=4)
        runs.run("needle", budget="25%", seed=1, kv_dtype="float16")
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(Cell, "engine", _raises(MemoryError("full")))
            runs.run("needle", seed=2)
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(Needle, "score", _raises(RuntimeError("no such metric")))
            path = runs.run("needle", seed=3)
        rescore_cell(path)
        runs.note("needle", path)
        yield runs


def save_mixture(path: Path) -> None:
    """A context of SCBench whose two turns are scored in different ways."""
    tasks = {"scbench_summary": "Trees, tall.", "scbench_passkey": "71432"}
    turns = [{"input": "What?", "answer": answer, "task": task} for task, answer in tasks.items()]
    row = {"context": "Trees are tall. The pass key is 71432.", "id": 0, "multi_turns": turns}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")


def _raises(error: Exception) -> Any:  # Any: stands for a method
    def method(*arguments: object, **options: object) -> None:
        raise error

    return method


def declared(name: str) -> dict[str, Column]:
    """The columns that rows of a task may have."""
    names = [name, "needle"] if name == "fidelity" else [name]
    kinds = [named_class(load_choice("task", one)["_target_"], Task) for one in names]
    found = [*ROWS, *(FORCED if kinds[0].is_teacher_forced else ())]
    return {column.name: column for column in found + [c for k in kinds for c in k.row_columns]}


# ---- rows ----


@pytest.mark.parametrize("name", TASKS)
def test_rows_hold_no_column_that_is_not_declared(runs: Runs, name: str) -> None:
    assert runs.lines[name]
    for line in runs.lines[name]:
        assert set(line) <= set(declared(name))


@pytest.mark.parametrize("name", TASKS)
def test_declared_types_and_bounds_hold(runs: Runs, name: str) -> None:
    allowed = declared(name)
    model = row_model(allowed.values())
    for line in runs.lines[name]:
        model.model_validate(line)
        for key, value in line.items():
            # What people write may be 4e6; what kvarena writes is of the very type.
            items = get_args(allowed[key].dtype)
            kind = list if items else allowed[key].dtype
            assert value is None or type(value) is kind, key


def test_the_runs_are_of_every_status_but_those_of_a_broken_model(runs: Runs) -> None:
    assert {line["status"] for line in runs.lines["needle"]} == {"ok", "oom", "score_error"}


def test_every_declared_column_occurs_somewhere(runs: Runs) -> None:
    frame = read_rows(runs.cells)
    lines = [line for found in runs.lines.values() for line in found]
    seen = {key for line in lines for key, value in line.items() if value is not None}
    assert set(all_columns()) == seen | set(frame.dropna(axis=1, how="all").columns)


def test_a_frame_of_rows_has_declared_columns_with_their_types(runs: Runs) -> None:
    frame = storable(read_rows(runs.cells))
    assert set(frame.columns) <= set(all_columns())
    for name, dtype in frame.dtypes.items():
        assert dtype == DTYPES.get(all_columns()[name].dtype, "string"), name


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_rows_have_declared_columns_with_their_types(path: Path) -> None:
    assert len(RECORDED) >= 7
    frame = storable(recorded_rows(path))
    for name, dtype in frame.dtypes.items():
        assert dtype == DTYPES.get(all_columns()[name].dtype, "string"), name


# ---- what a line may hold ----


def refused(column: Column, value: object) -> str:
    """Why a line with that value is refused; "" if it is not."""
    try:
        parse_row(json.dumps({"sample_id": "a", column.name: value}).encode())
    except ValueError as error:
        return str(error)
    return ""


NUMBERS = [column for column in CHECKED if column.dtype in (int, float)]


@pytest.mark.parametrize("column", CHECKED, ids=lambda column: column.name)
def test_a_line_may_lack_any_column_and_hold_no_value_in_it(column: Column) -> None:
    assert parse_row(b'{"sample_id": "a"}') == {"sample_id": "a"}
    if column.name != "sample_id":
        assert not refused(column, None)


@pytest.mark.parametrize(
    "column", [one for one in CHECKED if one.name != "sample_id"], ids=lambda column: column.name
)
def test_a_line_with_another_type_is_refused(column: Column) -> None:
    for value in ({"a": 1}, 1 if column.dtype in (str, bool) else "1"):
        assert refused(column, value).startswith(f"has {column.name} ")


@pytest.mark.parametrize("column", NUMBERS, ids=lambda column: column.name)
def test_a_line_with_a_number_out_of_bounds_is_refused(column: Column) -> None:
    for bound, outside in ((column.low, -1), (column.high, 1)):
        if bound is not None:
            assert not refused(column, bound)
            assert "than or equal to" in refused(column, bound + outside)
    if column.dtype is int:
        assert "a multiple of 1" in refused(column, 1.5)
    if column.finite and column.name != "score":  # an answer without a score has failed
        assert refused(column, float("inf"))
        assert refused(column, float("nan"))


def test_a_text_is_one_of_those_declared() -> None:
    for column in CHECKED:
        for choice in column.choices:
            assert not refused(column, choice)
        if column.choices:
            assert "Input should be" in refused(column, "other")


def test_bounds_of_a_list_are_those_of_its_items() -> None:
    shares = Column("shares", list[list[float]], "", "of each head", low=0, high=1)
    model = row_model([shares])
    model.model_validate({"shares": [[0, 0.5], []]})
    for bad in ([[0, 1.5]], [0.5], [["a"]], [[float("nan")]]):
        with pytest.raises(ValueError, match="shares"):
            model.model_validate({"shares": bad})


# ---- summary ----


def test_a_summary_has_the_declared_columns_with_their_types_and_bounds(runs: Runs) -> None:
    rows = read_rows(runs.cells)
    rows = rows[rows["seed"] == 0]
    forced = rows["task"].str.startswith("fidelity")
    declared = {True: (*SUMMARY, *SUMMARY_OF_FORCED), False: SUMMARY}
    for is_forced, own in rows.groupby(forced):
        table = with_kl(compare_cells(own, allow_partial=True), own)
        assert list(table.columns) == [*CELL, *(column.name for column in declared[is_forced])]
        model = row_model(declared[is_forced])
        for line in json.loads(table.to_json(orient="records")):
            model.model_validate(line)


# ---- declarations ----


def test_a_name_is_declared_once() -> None:
    rows = [column.name for column in (*ROWS, *FORCED, *columns_of_tasks())]
    summary = [*CELL, *(column.name for column in (*SUMMARY, *SUMMARY_OF_FORCED))]
    for names in (rows, summary, [*CELL, *(column.name for column in TURNS)]):
        assert len(set(names)) == len(names)


def test_every_column_says_what_it_means() -> None:
    for column in (*ROWS, *FORCED, *columns_of_tasks(), *SUMMARY, *SUMMARY_OF_FORCED, *TURNS):
        assert column.meaning
        assert column.meaning.strip() == column.meaning


# ---- the dictionary ----


def test_the_dictionary_is_made_of_the_declarations() -> None:
    readme = DICTIONARY.read_text(encoding="utf-8")
    assert with_tables(readme) == readme, "run make dictionary"
    for name in all_columns():
        assert f"\n| `{name}` | " in readme


def test_another_declaration_makes_another_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = DICTIONARY.read_text(encoding="utf-8")
    new = Column("heat", list[float], "K", "of a | of b", low=0, high=9)
    monkeypatch.setattr(columns, "ROWS", (*ROWS, new))
    line = r"| `heat` | list of numbers | K | of a \| of b |" + "\n"
    assert with_tables(readme) == readme.replace(
        "<!-- columns of rows: end", f"{line}<!-- columns of rows: end"
    )
    monkeypatch.setattr(Needle, "row_columns", (*Needle.row_columns, new))
    assert r"| `heat` | needle | list of numbers | K | of a \| of b |" in with_tables(readme)


def test_the_command_writes_the_dictionary_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, copy = DICTIONARY.read_text(encoding="utf-8"), tmp_path / "README.md"
    copy.write_text(readme.replace("| `kept_tokens` |", "| `tokens_kept` |"), encoding="utf-8")
    monkeypatch.setattr(columns, "DICTIONARY", copy)
    columns.main()
    assert copy.read_text(encoding="utf-8") == readme
    copy.write_text(readme.replace("<!-- columns of tasks: end -->", ""), encoding="utf-8")
    with pytest.raises(UsageError, match="lacks the marks <!-- columns of tasks: begin -->"):
        with_tables(copy.read_text(encoding="utf-8"))
    with pytest.raises(SystemExit, match="2"):
        columns.main()
    assert "columns of tasks: end" in capsys.readouterr().err


# ---- types of tables ----


def test_types_of_a_table_do_not_depend_on_the_values_that_are_in_it() -> None:
    one = {"score": [1.0, 0.0], "budget_tokens": [None, None], "compressed": [None, None]}
    two = {"score": [0.5, None], "budget_tokens": [64, None], "compressed": [True, False]}
    one |= {
        "commit": [123456789012, 1],
        "meta_max_length": [None, None],
        "kl_per_token": [None, None],
    }
    two |= {"commit": ["abc", "+"], "meta_max_length": [300, None], "kl_per_token": [[1.5], [2]]}
    first, second = (storable(pd.DataFrame(rows)) for rows in (one, two))
    assert first.dtypes.to_dict() == second.dtypes.to_dict()
    assert first["commit"].tolist() == ["123456789012", "1"]
    assert second["kl_per_token"].tolist() == ["[1.5]", "[2]"]


def test_values_of_another_type_than_declared_stay_what_they_are() -> None:
    rows = storable(pd.DataFrame({"meta_level": ["hard", 3], "slots": [1.5, 2.0]}))
    assert rows["meta_level"].tolist() == ["hard", "3"]
    assert rows["slots"].tolist() == [1.5, 2.0]
