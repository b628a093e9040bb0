"""Tables for a paper: what stands in them, what is marked, escaped and written."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvarena.harness import table_notes
from kvarena.harness.comparison import compare_cells, compare_pairs
from kvarena.harness.errors import UsageError
from kvarena.harness.paper_tables import (
    AT_LEAST,
    DIFFERS,
    MINUS,
    MISSING,
    TIE,
    Entry,
    Grid,
    escape_latex,
    escape_markdown,
    grids,
    to_latex,
    to_markdown,
    write_tables,
)
from kvarena.harness.tables import storable

# Rows of an early recorded run, kept so that a new recording changes no expectation.
REFERENCE = Path(__file__).parent / "golden" / "needle_rows.csv"
POLICIES = {"full": 0.5, "keydiff": 0.45, "snap_kv": 0.44, "tova": 0.2}


def needle_rows() -> pd.DataFrame:
    rows = pd.read_csv(REFERENCE, dtype={"budget": str})
    return storable(rows.assign(variant="", part="", num_planned=20))


def benchmark_rows() -> pd.DataFrame:
    """Four policies on three parts at two budgets; keydiff and snap_kv hardly differ."""
    generator = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for part, shift in (("qa_en", 0.0), ("code", 0.2), ("few-shot", -0.1)):
        for sample in range(12):
            hardness = generator.uniform(-0.2, 0.2)
            for policy, mean in POLICIES.items():
                for budget in ["full"] if policy == "full" else ["1k", "25%"]:
                    score = mean + shift + hardness + generator.normal(0, 0.03)
                    labels = {"task": "bench", "model": "m", "policy": policy, "budget": budget}
                    lines.append(
                        labels
                        | {"sample_id": f"{part}-{sample:02}", "part": part}
                        | {"document": f"{part}-{sample // 2}", "score": min(1.0, max(0.0, score))}
                    )
    same = {"variant": "question=after", "seed": 0, "status": "ok", "slots": 1, "num_planned": 36}
    sizes = {"kv_bytes_kept": 1, "kv_bytes_peak": 2, "ttft_sec": 1.0, "decode_tokens_per_sec": 1.0}
    return pd.DataFrame(lines).assign(**same, **sizes)


def texts(table: Grid, policy: str) -> list[str]:
    return [entry.text for entry in table.lines[policy]]


def test_scores_stand_by_policy_and_budget_under_the_full_cache() -> None:
    rows = needle_rows()
    table = grids(compare_cells(rows), rows)[0]
    assert table.columns == ["256", "512"]
    ranked = ["full", "streaming_llm", "tova", "keydiff", "h2o", "snapkv", "l2norm"]
    assert list(table.lines) == ranked
    assert texts(table, "full") == ["100.0 [83, 100]"] * 2
    assert texts(table, "keydiff") == ["5.0† [1, 26]", "65.0 [41, 83]"]
    assert texts(table, "l2norm") == ["0.0† [0, 17]", "0.0 [0, 17]"]


def test_the_best_that_evicts_is_bold_at_each_budget() -> None:
    rows = needle_rows()
    table = grids(compare_cells(rows), rows)[0]
    bold = {name: [entry.bold for entry in entries] for name, entries in table.lines.items()}
    assert bold.pop("tova") == [True, False]
    assert bold.pop("keydiff") == [False, True]
    assert not any(map(any, bold.values()))


def test_differences_to_full_have_intervals_signs_and_marks() -> None:
    rows = needle_rows()
    table = grids(compare_cells(rows), rows)[1]
    assert "full" not in table.lines
    assert texts(table, "keydiff") == [
        "-95.0* [-100, -79]".replace("-", MINUS),
        "-35.0* [-57, -12]".replace("-", MINUS),
    ]
    near = compare_cells(rows).assign(p_holm=0.05)
    assert texts(grids(near, rows)[1], "keydiff")[1] == "-35.0 [-57, -12]".replace("-", MINUS)


def test_without_a_full_run_there_is_no_table_of_differences() -> None:
    rows = needle_rows()
    rows = rows[rows.policy != "full"]
    (table,) = grids(compare_cells(rows), rows)
    assert "full" not in table.lines


def test_the_full_cache_alone_has_a_table() -> None:
    rows = needle_rows()
    rows = rows[rows.policy == "full"]
    (table,) = grids(compare_cells(rows), rows)
    assert (table.columns, list(table.lines)) == (["full"], ["full"])


def test_parts_are_columns_beside_their_average_at_each_budget() -> None:
    rows = benchmark_rows()
    cells = compare_cells(rows)
    tables = grids(cells, rows)
    assert [table.columns for table in tables[2:]] == [["code", "few-shot", "qa_en", "average"]] * 2
    assert "budget of 25%" in tables[3].caption
    line = cells[(cells.policy == "tova") & (cells.budget == "1k")].iloc[0]
    shown = texts(tables[2], "tova")
    means = rows[(rows.policy == "tova") & (rows.budget == "1k")].groupby("part")["score"].mean()
    assert shown[:3] == [f"{100 * mean:.1f}" for mean in means]
    low, high = round(100 * line.score_low), round(100 * line.score_high)
    assert shown[3] == f"{100 * means.mean():.1f} [{low}, {high}]"


def test_best_and_ties_are_marked_in_each_part() -> None:
    rows = benchmark_rows()
    table = grids(compare_cells(rows), rows)[2]
    for place in range(3):
        marks = {name: entries[place] for name, entries in table.lines.items() if name != "full"}
        assert sum(entry.bold for entry in marks.values()) == 1
        assert not marks["tova"].bold
        assert "†" not in marks["tova"].text
    near = [*table.lines["keydiff"], *table.lines["snap_kv"]]
    assert any("†" in entry.text for entry in near)


def test_a_cell_with_missing_samples_shows_no_score_in_any_part() -> None:
    rows = benchmark_rows()
    hit = (rows.policy == "tova") & (rows.budget == "1k") & (rows.sample_id == "code-03")
    rows.loc[hit, "status"] = "oom"
    tables = grids(compare_cells(rows), rows)
    assert texts(tables[0], "tova")[0] == MISSING
    assert texts(tables[0], "tova")[1] != MISSING
    assert texts(tables[1], "tova")[0] == MISSING
    assert texts(tables[2], "tova") == [MISSING] * 4
    assert "tova at 1k: 35 of 36 samples." in tables[0].notes


def test_the_notes_say_how_many_and_what_bold_and_the_marks_mean() -> None:
    rows = benchmark_rows()
    tables = grids(compare_cells(rows), rows)
    notes = " ".join(tables[0].notes)
    for part in ("36 samples (18 documents)", "95 %", "Wilson", "Bold", "†", "sign-flip", "parts"):
        assert part in notes
    notes = " ".join(tables[1].notes)
    detectable = 100 * compare_cells(rows).detectable
    few, many = f"{detectable.min():.0f}", f"{detectable.max():.0f}"
    points = few if few == many else f"{few} to {many}"
    for part in ("36 samples that both", "does not reject", "Holm", "*", f"power: {points} points"):
        assert part in notes
    assert "at least 6" not in notes
    assert "per part" in " ".join(tables[2].notes)
    assert "SAMPLE DATA" not in notes


def test_sample_data_is_called_that() -> None:
    rows = benchmark_rows().assign(meta_is_sample=True)
    for table in grids(compare_cells(rows), rows):
        assert table.notes[0].startswith("SAMPLE DATA")


AWKWARD = r"a_b|c\d*e`f[g]<h>#i~j$k%l&m{n}^o"


def test_markdown_shows_every_sign_as_it_is() -> None:
    escaped = escape_markdown(AWKWARD)
    assert escaped.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\") == AWKWARD
    assert re.search(r"(?<!\\)[|*_`<\[]", escaped) is None


def test_latex_sets_every_sign_as_it_is() -> None:
    escaped = escape_latex(AWKWARD + MINUS + MISSING + TIE + AT_LEAST + DIFFERS)
    assert re.search(r"(?<!\\)[%&#_]", escaped) is None
    assert r"\textbackslash{}d" in escaped
    assert r"j\$k\%l\&m\{n\}\textasciicircum{}o$-$--$^{\dagger}$$\geq$$^{*}$" in escaped
    assert escaped.isascii()


def awkward_grid(num_columns: int = 2) -> Grid:
    entries = [Entry(f"{MINUS}1.0* [0, 2]", bold=True), *[Entry(MISSING)] * (num_columns - 1)]
    columns = ["25%", *["p_1"] * (num_columns - 1)]
    return Grid("some-name", "50% of a_b.", columns, {"full": entries, AWKWARD: entries}, ["p < 1"])


def test_a_markdown_table_has_as_many_cells_in_every_line() -> None:
    lines = [line for line in to_markdown(awkward_grid()).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[1] == "| --- | ---: | ---: |"
    assert rf"| **{MINUS}1.0\* \[0, 2\]** | {MISSING} |" in lines[2]


@pytest.mark.parametrize("num_columns", [2, 7])
def test_a_latex_table_is_whole(num_columns: int) -> None:
    text = to_latex(awkward_grid(num_columns))
    bare = re.sub(r"\\[{}\\%&#_$]", "", text)
    depth = np.cumsum([(sign == "{") - (sign == "}") for sign in bare])
    assert depth[-1] == 0
    assert depth.min() == 0
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {num_columns}
    assert rf"\begin{{tabular}}{{l{'r' * num_columns}}}" in text
    assert r"\textbf{$-$1.0$^{*}$ [0, 2]}" in text
    assert (r"\resizebox" in text) == (num_columns == 7)


def test_labels_of_latex_hold_letters_digits_and_dashes_only() -> None:
    rows = benchmark_rows().assign(model="org/a_b%")
    names = [table.name for table in grids(compare_cells(rows), rows)]
    assert len(set(names)) == 4
    assert names[3].endswith("25-percent")  # not the name of a budget of 25 tokens
    assert all(re.fullmatch("[A-Za-z0-9-]+", name) for name in names)


# ---- from cells to files ----


def write_cell(results_dir: Path, rows: list[dict[str, Any]], name: str) -> None:
    """A cell's folder as runs leave it."""
    first = rows[0]
    folder = results_dir / "runs" / first["task"] / first["model"] / name
    folder.mkdir(parents=True)
    identity = {key: {"name": first[key]} for key in ("task", "model", "policy", "budget")}
    (folder / "manifest.json").write_text(json.dumps({"run_id": name, "identity": identity}))
    lines = [json.dumps({**row, "run_id": name}) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines))


@pytest.fixture
def results_dir(tmp_path: Path) -> Path:
    rows = benchmark_rows().drop(columns=["variant", "num_planned"])
    rows["references"] = [["a", "b"]] * len(rows)
    rows["meta_depths"] = [[1.5, 2]] * len(rows)
    rows["budget_tokens"] = None
    for (policy, budget), own in rows.groupby(["policy", "budget"]):
        write_cell(tmp_path, own.to_dict("records"), f"{policy}-{budget}")
    return tmp_path


def test_all_cells_become_rows_comparisons_and_tables(results_dir: Path) -> None:
    written = write_tables(results_dir)
    names = ["rows.parquet", "rows.csv", "summary.csv", "pairs.csv", "bench-m.md", "bench-m.tex"]
    assert [path.name for path in written] == names
    assert {path.name for path in (results_dir / "tables").iterdir()} == set(names)
    rows = pd.read_parquet(results_dir / "tables" / "rows.parquet")
    assert len(rows) == 36 * 7
    assert set(rows["budget"]) == {"1k", "25%", "full"}
    assert json.loads(rows["meta_depths"][0]) == [1.5, 2]
    assert rows["budget_tokens"].isna().all()
    again = pd.read_csv(results_dir / "tables" / "rows.csv", dtype={"budget": str})
    for frame in (rows, again):
        for compare, name in ((compare_cells, "summary.csv"), (compare_pairs, "pairs.csv")):
            table = pd.read_csv(results_dir / "tables" / name, keep_default_na=True)
            expected = compare(frame).replace({"variant": {"": None}})
            assert table["policy"].tolist() == expected["policy"].tolist()
            np.testing.assert_allclose(table["difference"], expected["difference"].astype(float))
    markdown = (results_dir / "tables" / "bench-m.md").read_text()
    assert markdown.count("| policy |") == 4
    latex = (results_dir / "tables" / "bench-m.tex").read_text()
    assert latex.count(r"\toprule") == 4


def test_rows_from_before_there_were_parts_have_tables(tmp_path: Path) -> None:
    rows = benchmark_rows().drop(columns=["part", "document"])
    rows = rows[rows.budget != "25%"]
    for policy, own in rows.groupby("policy"):
        write_cell(tmp_path, own.to_dict("records"), str(policy))
    write_tables(tmp_path)
    text = (tmp_path / "tables" / "bench-m.md").read_text()
    assert text.count("| policy |") == 2
    assert "36 samples (36 documents)" in text


def test_an_empty_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rows"):
        write_tables(tmp_path)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvarena.harness.paper_tables"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage" in done.stderr


def test_one_document_per_part_is_said_to_give_no_interval() -> None:
    cells = pd.DataFrame({"score": [0.5], "score_low": [math.nan]})
    note = table_notes.intervals(cells)
    assert "No intervals: a part has one document only" in note
    assert "In brackets" not in note
    assert "In brackets" in table_notes.intervals(cells.assign(score_low=0.2))


@pytest.mark.parametrize(
    ("num", "words"), [(1, "1 document: no"), (5, "5 documents: no"), (6, ""), (20, "")]
)
def test_too_few_documents_are_said_to_show_no_difference(num: int, words: str) -> None:
    rows = needle_rows()
    rows = rows[rows["sample_id"].isin(rows["sample_id"].unique()[:num])].assign(num_planned=num)
    for table in grids(compare_cells(rows), rows):
        notes = " ".join(table.notes)
        assert words in notes
        assert ("at least 6 are needed" in notes) == bool(words)
