"""Tables for a paper: what stands in them, what is marked, escaped and written."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvarena.harness.analysis.comparison import compare_cells, compare_pairs
from kvarena.harness.errors import UsageError
from kvarena.harness.files import file_name
from kvarena.harness.report import paper_notes
from kvarena.harness.report.paper_markup import (
    AT_LEAST,
    DIFFERS,
    MINUS,
    MISSING,
    TIE,
    UNBOUND,
    Grid,
    StyledText,
    escape_latex,
    escape_markdown,
    latex_file,
    to_latex,
    to_markdown,
)
from kvarena.harness.report.paper_tables import grids as grids_of
from kvarena.harness.report.paper_tables import unique_names, write_tables
from kvarena.harness.report.text_tables import storable

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


def grids(cells: pd.DataFrame, rows: pd.DataFrame) -> list[Grid]:
    return grids_of(cells, rows, "bench-m")


def texts(table: Grid, policy: str) -> list[str]:
    return [one.text for one in table.lines[policy]]


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
    bold = {name: [one.bold for one in texts] for name, texts in table.lines.items()}
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
    assert "budget of 25% of the prompt's tokens" in tables[3].caption
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
        marks = {name: texts[place] for name, texts in table.lines.items() if name != "full"}
        assert sum(one.bold for one in marks.values()) == 1
        assert not marks["tova"].bold
        assert "†" not in marks["tova"].text
    near = [*table.lines["keydiff"], *table.lines["snap_kv"]]
    assert any("†" in one.text for one in near)


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


def test_captions_say_in_a_sentence_what_is_shown() -> None:
    rows = benchmark_rows()
    captions = [table.caption for table in grids(compare_cells(rows), rows)]
    where = "the task bench with the model m (question=after), at a cache budget of"
    tokens, share = "1k tokens per layer and KV head", "25% of the prompt's tokens"
    assert captions == [
        f"Mean score in percent of each KV cache policy on {where} {tokens} or {share} (k = 1024).",
        "Difference in score, in points, between each KV cache policy and the full cache on "
        f"{where} {tokens} or {share} (k = 1024).",
        f"Mean score in percent of each KV cache policy on the parts of {where} {tokens} "
        "(k = 1024).",
        f"Mean score in percent of each KV cache policy on the parts of {where} {share}.",
    ]


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        (["256", "512"], "at a cache budget of 256 or 512 tokens per layer and KV head."),
        (["1k", "2k", "4k"], "of 1k, 2k or 4k tokens per layer and KV head (k = 1024)."),
        (["12MB"], "at a cache budget of 12MB."),
        (["full"], "without a budget."),
    ],
)
def test_captions_name_budgets_of_any_kind(budgets: list[str], words: str) -> None:
    rows = benchmark_rows().query("budget == '1k'")
    rows = pd.concat([rows.assign(budget=budget) for budget in budgets])
    assert grids(compare_cells(rows), rows)[0].caption.endswith(words)


def test_captions_of_forced_answers_name_the_agreement() -> None:
    rows = benchmark_rows().assign(kl_mean=0.1)
    for table in grids(compare_cells(rows), rows):
        assert "token agreement with the full cache" in table.caption


@pytest.mark.parametrize(("num", "words"), [(1, "1 sample (1 document)"), (2, "2 samples (2 ")])
def test_numbers_have_their_nouns(num: int, words: str) -> None:
    rows = needle_rows()
    rows = rows[rows["sample_id"].isin(rows["sample_id"].unique()[:num])].assign(num_planned=num)
    tables = grids(compare_cells(rows), rows)
    assert words in tables[0].notes[0]
    assert f"Over the {words.split(' (')[0]} that both have" in " ".join(tables[1].notes)
    rows.loc[rows["policy"] == "tova", "status"] = "oom"
    lost = grids(compare_cells(rows), rows)[0].notes
    assert f"tova at 256: 0 of {num} sample{'s' if num > 1 else ''}." in lost


def bold_lines(table: Grid, place: int = 0) -> list[str]:
    return [name for name, texts in table.lines.items() if texts[place].bold]


def test_one_policy_alone_is_not_the_best() -> None:
    rows = benchmark_rows()
    alone = rows[rows["policy"].isin(["full", "keydiff"])]
    for table in grids(compare_cells(alone), alone):
        assert not bold_lines(table)
        assert "Bold" not in " ".join(table.notes)
    rows.loc[rows["policy"].isin(["snap_kv", "tova"]), "compressed"] = False
    for table in grids(compare_cells(rows), rows):
        assert not bold_lines(table)  # two that evicted nothing are no rivals
    rows.loc[(rows["policy"] == "tova") & (rows["budget"] == "1k"), "compressed"] = True
    table = grids(compare_cells(rows), rows)[0]
    assert bold_lines(table, 0) == ["keydiff"]
    assert not bold_lines(table, 1)


def test_cells_in_which_nothing_was_evicted_are_marked() -> None:
    rows = benchmark_rows().assign(compressed=True)
    rows.loc[(rows["budget"] == "25%") | (rows["policy"] == "full"), "compressed"] = False
    tables = grids(compare_cells(rows), rows)
    for table in (tables[0], tables[1]):
        for policy in ("keydiff", "tova"):
            assert [UNBOUND in text for text in texts(table, policy)] == [False, True]
        assert f"{UNBOUND} nothing was evicted: the budget never bound." in table.notes
    assert UNBOUND not in " ".join(texts(tables[0], "full") + tables[2].notes)
    assert all(UNBOUND in text for text in texts(tables[3], "tova"))
    coded = rows.replace({"policy": {"tova": "full+kivi", "keydiff": "keydiff+kivi"}})
    table = grids(compare_cells(coded), coded)[0]
    assert UNBOUND not in " ".join(texts(table, "full+kivi"))
    assert UNBOUND in texts(table, "keydiff+kivi")[1]


def test_budgets_that_bound_for_some_samples_only_are_named() -> None:
    rows = benchmark_rows().assign(compressed=True)
    first = rows["sample_id"].str.endswith("-00")
    rows.loc[rows["budget"] == "25%", "compressed"] = first
    rows.loc[(rows["policy"] == "tova") & (rows["budget"] == "1k"), "compressed"] = ~first
    notes = grids(compare_cells(rows), rows)[0].notes
    assert "At 25%, something was evicted in 3 of 36 samples." in notes
    assert "At 1k, something was evicted by tova in 33 of 36 samples." in notes
    assert sum("was evicted" in note for note in notes) == 2


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
    texts = [
        StyledText(f"{MINUS}1.0* [0, 2]", bold=True),
        *[StyledText(MISSING)] * (num_columns - 1),
    ]
    columns = ["25%", *["p_1"] * (num_columns - 1)]
    return Grid("some-name", "50% of a_b.", columns, {"full": texts, AWKWARD: texts}, ["p < 1"])


def test_a_markdown_table_has_as_many_cells_in_every_line() -> None:
    lines = [line for line in to_markdown(awkward_grid()).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[1] == "| --- | ---: | ---: |"
    assert rf"| **{MINUS}1.0\* \[0, 2\]** | {MISSING} |" in lines[2]


def test_latex_names_signs_that_pdflatex_does_not_know() -> None:
    assert escape_latex("größe, 中") == "größe, [U+4E2D]"


@pytest.mark.parametrize(
    ("num_columns", "packages"),
    [(2, r"\usepackage{booktabs}"), (7, r"\usepackage{booktabs} and \usepackage{graphicx}")],
)
def test_a_latex_file_begins_with_what_it_needs(num_columns: int, packages: str) -> None:
    text = latex_file([awkward_grid(), awkward_grid(num_columns)])
    assert text.startswith(f"% needs {packages}\n")
    assert text.count(r"\begin{table}") == 2


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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("needle-llama-3.1-8b", "needle-llama-3-1-8b"),
        ("keydiff(recent=32)+kivi(bits=4)", "keydiff-recent-32-kivi-bits-4"),
        ("longbench-m-chunk=64, question=after", "longbench-m-chunk-64-question-after"),
        ("../m__é 25%", "m-e-25-percent"),
        ("中", "table"),
    ],
)
def test_names_are_words_with_dashes(text: str, name: str) -> None:
    assert unique_names([text]) == [name]


def test_names_of_two_texts_differ_on_any_disk() -> None:
    texts = ["a-llama-3.1", "a-llama-3-1", "A-LLAMA 3 1", "a-tova"]
    names = unique_names(texts)
    assert len({name.lower() for name in names}) == 4
    assert names[3] == "a-tova"
    assert all(re.fullmatch("(?i)a-llama-3-1-[0-9a-f]{4}", name) for name in names[:3])


def test_labels_of_latex_hold_letters_digits_and_dashes_only() -> None:
    rows = benchmark_rows().assign(model="org/a_b%")
    (name,) = unique_names(["bench-org/a_b%-question=after"])
    names = [table.name for table in grids_of(compare_cells(rows), rows, name)]
    assert name == "bench-org-a-b-percent-question-after"
    assert len(set(names)) == 4
    assert names[3].endswith("25-percent")  # not the name of a budget of 25 tokens
    assert all(re.fullmatch("[A-Za-z0-9-]+", name) for name in names)


# ---- from cells to files ----


def write_cell(results_dir: Path, rows: list[dict[str, Any]], name: str) -> None:
    """A cell's folder as runs leave it."""
    first = rows[0]
    folder = results_dir / "runs" / file_name(first["task"]) / file_name(first["model"]) / name
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
    command = [sys.executable, "-m", "kvarena.harness.report.paper_tables"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage" in done.stderr


def test_one_document_per_part_is_said_to_give_no_interval() -> None:
    cells = pd.DataFrame({"score": [0.5], "score_low": [math.nan]})
    note = paper_notes.intervals(cells)
    assert "No intervals: a part has one document only" in note
    assert "In brackets" not in note
    assert "In brackets" in paper_notes.intervals(cells.assign(score_low=0.2))


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_every_latex_file_compiles(tmp_path: Path) -> None:
    """With signs that LaTeX reads otherwise in every place, wide tables and long notes."""
    rows = benchmark_rows().drop(columns=["variant", "num_planned"])
    odd = {"keydiff": "keydiff(recent=32)+kivi(bits=4)", "snap_kv": AWKWARD + "é中\N{MINUS SIGN}"}
    odd_rows = rows.replace({"policy": odd, "part": {"qa_en": "q&a_{en}", "code": "100%"}})
    odd_rows = odd_rows.assign(model="org/model-1.5_b%&#", task="bench_2~^")
    wide = pd.concat([rows.assign(part=f"{part}_{i}") for i, part in enumerate(9 * ["part"])])
    wide = wide.assign(model="wide", sample_id=wide["sample_id"] + wide["part"], compressed=False)
    few = rows[rows["sample_id"].str.endswith("-00")].assign(model="few", part="")
    for frame in (odd_rows, wide, few):
        for i, (_, own) in enumerate(frame.groupby(["policy", "budget"])):
            write_cell(tmp_path, own.to_dict("records"), f"cell-{i}")
    files = [path for path in write_tables(tmp_path) if path.suffix == ".tex"]
    assert len(files) == 3
    for path in files:
        first, _ = path.read_text(encoding="utf-8").split("\n", 1)
        packages = "".join(re.findall(r"\\usepackage{[a-z]+}", first))
        document = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{{path.name}}}"
        (path.parent / "paper.tex").write_text(rf"{document}\end{{document}}")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(
            command, cwd=path.parent, capture_output=True, text=True, errors="replace"
        )
        assert done.returncode == 0, done.stdout[-2000:]
        log = (path.parent / "paper.log").read_text(errors="replace")
        assert "Missing character" not in log
        too_wide = [
            float(points) for points in re.findall(r"Overfull .hbox \((.*)pt too wide", log)
        ]
        assert max(too_wide, default=0) < 20
        assert "Float too large" not in log
