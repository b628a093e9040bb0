"""Summaries: how comparisons print, and what files can hold."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.harness.comparison import compare_cells
from kvarena.harness.tables import markdown, print_summary, storable, write_csv
from score_rows import BASE


def make_rows(*changes: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([BASE | {"sample_id": f"s{i}"} | c for i, c in enumerate(changes)])


def cells(*changes: dict[str, Any]) -> pd.DataFrame:
    """Rows of distinct cells, one sample each, with the same sample id as in a real run."""
    return pd.DataFrame([BASE | {"sample_id": "s0"} | change for change in changes])


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def printed(summary: pd.DataFrame, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    print_summary(summary, stream)
    return stream.getvalue()


def test_plain_output_is_narrow_and_free_of_escape_codes() -> None:
    long = {"policy": "a_policy_with_a_name_" * 6, "model": "model/" * 40, "kv_bytes_kept": 9e12}
    text = printed(compare_cells(cells(long, long | {"policy": "h2o", "status": "error"})))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "..." in text


def test_plain_columns_line_up() -> None:
    rows = cells({}, {"policy": "streaming_llm", "score": 0.0, "kv_bytes_kept": 123_456_789})
    header, rule, *lines = printed(compare_cells(rows)).splitlines()[1:5]
    assert len({len(header), len(rule), *map(len, lines)}) == 1


def test_printed_numbers_carry_the_units_of_the_header() -> None:
    text = printed(compare_cells(make_rows({"score": 1.0}, {"score": 0.0})))
    assert "KV kept MB" in text
    numbers = text.splitlines()[3].split()
    assert numbers == ["keydiff", "512", "50.0", "[0,", "100]", "2.0", "3.0", "0.500", "40.0"]


def test_intervals_are_those_of_the_summary() -> None:
    rows = make_rows(*[{"score": score} for score in [1.0] * 8 + [0.0] * 12])
    line = compare_cells(rows).iloc[0]
    assert (round(100 * line.score_low), round(100 * line.score_high)) == (21, 63)
    assert "40.0 [21, 63]" in printed(compare_cells(rows))
    assert "| 40.0 [21, 63] |" in markdown(compare_cells(rows))


def test_one_sample_prints_a_score_without_an_interval() -> None:
    assert printed(compare_cells(cells({}))).splitlines()[3].split()[:4] == [
        "keydiff",
        "512",
        "100.0",
        "2.0",
    ]


def test_missing_samples_show_only_when_there_are_some_and_hide_the_score() -> None:
    complete = printed(compare_cells(make_rows({}, {})))
    assert "ok/planned" not in complete
    assert "missing" not in complete
    rows = make_rows({}, {"status": "error"})
    text = printed(compare_cells(rows))
    assert "ok/planned" in text
    assert "No score where samples are missing" in text
    assert text.splitlines()[3].split()[:4] == ["keydiff", "512", "-", "1/2"]
    partly = printed(compare_cells(rows, allow_partial=True))
    assert partly.splitlines()[3].split()[:4] == ["keydiff", "512", "100.0", "1/2"]
    assert "No score" not in partly


def test_a_cell_without_scores_prints_dashes() -> None:
    text = printed(compare_cells(make_rows({"status": "error"})))
    assert text.splitlines()[3].split() == ["keydiff", "512", "-", "0/1", *"----"]
    assert "No score" not in text


def test_every_variant_has_a_table_of_its_own() -> None:
    rows = cells(
        {"variant": "chunk=64"}, {"variant": "chunk=128"}, {"policy": "h2o", "variant": ""}
    )
    titles = [
        line for line in printed(compare_cells(rows)).splitlines() if line.startswith("needle")
    ]
    assert titles == ["needle, toy", "needle, toy, chunk=128", "needle, toy, chunk=64"]


def test_markdown_has_a_variant_column_only_when_there_are_variants() -> None:
    assert markdown(compare_cells(cells({}))).startswith("| policy | budget | score % [95 %] |")
    table = markdown(compare_cells(cells({"variant": "chunk=64"})))
    assert table.splitlines()[0].startswith("| policy | variant | budget |")
    assert table.splitlines()[1].startswith("| --- | --- | ---: |")
    assert "| keydiff | chunk=64 | 512 |" in table


def test_a_summary_read_from_csv_prints_the_same(tmp_path: Path) -> None:
    summary = compare_cells(cells({}, {"policy": "h2o"}))
    back = pd.read_csv(write_csv(summary, tmp_path / "s.csv"), dtype={"budget": str})
    assert back["variant"].isna().all()
    assert markdown(back) == markdown(summary)
    assert printed(back) == printed(summary)


def test_the_footnote_says_how_many_sequences_ran_side_by_side() -> None:
    assert "among 4 (slots)" in printed(compare_cells(cells({})))
    assert "alone" in printed(compare_cells(cells({"slots": 1})))
    assert "among 1 to 4 (slots)" in printed(compare_cells(cells({"slots": 1}, {"policy": "h2o"})))


def test_an_ascii_stream_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(compare_cells(cells({"policy": "größte"})), stream)
    stream.flush()
    assert b"gr??te" in raw.getvalue()


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_terminal_of_any_width_gets_every_number(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    names = {"policy": "streaming_llm", "model": "a[bold]b"}
    rows = cells(names, names | {"seed": 1, "status": "error"}, names | {"seed": 2, "score": 0.0})
    rows = pd.concat([rows, rows.assign(sample_id="s1")])
    text = printed(compare_cells(rows, allow_partial=True), Terminal())
    assert "a[bold]b" in text
    for number in ("streaming_llm", "50.0 [", "4/6", "2.0", "3.0", "0.500", "40.0"):
        assert number in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[:-1]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_an_empty_summary_says_so() -> None:
    assert printed(compare_cells(cells({})).iloc[:0]) == "no results\n"


def test_csv_round_trip_keeps_text_and_numbers(tmp_path: Path) -> None:
    awkward = 'two\nlines, a "quote", a carriage\rreturn, ü ± 語'
    rows = make_rows({"prediction": awkward, "ttft_sec": 0.1 + 0.2}, {"prediction": "x"})
    path = write_csv(rows, tmp_path / "new" / "needle.csv")
    back = pd.read_csv(path, dtype={"budget": str}, float_precision="round_trip")
    pd.testing.assert_frame_equal(back, rows, check_exact=True)
    again = compare_cells(back)
    pd.testing.assert_frame_equal(again, compare_cells(rows))


def test_a_failed_write_leaves_the_old_csv_alone(tmp_path: Path) -> None:
    path = write_csv(make_rows({}), tmp_path / "a.csv")
    before = path.read_bytes()

    class Broken(pd.DataFrame):
        def to_csv(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            Path(args[0]).write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_csv(Broken(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def awkward_rows() -> pd.DataFrame:
    """Columns as rows of several tasks have them."""
    return pd.DataFrame(
        {
            "budget": [512, "25%", "full"],
            "text": pd.Series(["a", None, "half \ud800 a pair"], dtype=object),
            "numbers": [[1, 2.5], None, ["語"]],
            "settings": [{"a": [1]}, "plain", 3],
            "count": [1, None, 3],
            "share": [0.1 + 0.2, math.nan, 1e-300],
            "flag": [True, None, False],
            "nothing": [None, None, None],
            "empty": ["", "", ""],
            "later": [math.nan, math.nan, "x"],
        }
    )


def test_every_column_survives_parquet(tmp_path: Path) -> None:
    rows = storable(awkward_rows())
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    back = pd.read_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(back, rows, check_dtype=False)
    assert back["budget"].tolist() == ["512", "25%", "full"]
    assert back["text"].tolist()[::2] == ["a", "half ? a pair"]
    assert json.loads(back["numbers"][0]) == [1, 2.5]
    assert back["numbers"][2] == '["語"]'
    assert back["numbers"].isna().tolist() == [False, True, False]
    assert back["settings"].tolist() == ['{"a": [1]}', "plain", "3"]
    assert back["count"].tolist()[::2] == [1, 3]
    assert back["share"].tolist()[::2] == [0.1 + 0.2, 1e-300]
    assert back["flag"].tolist()[::2] == [True, False]
    assert back["nothing"].isna().all()
    assert back["empty"].tolist() == ["", "", ""]


def test_budgets_that_are_all_numbers_stay_labels() -> None:
    assert storable(pd.DataFrame({"budget": [512, 64]}))["budget"].tolist() == ["512", "64"]


def test_storable_rows_compare_as_before() -> None:
    rows = cells(
        {"score": 0.5}, {"policy": "full", "budget": "full"}, {"budget": 64, "score": None}
    )
    pd.testing.assert_frame_equal(
        compare_cells(storable(rows)), compare_cells(rows), check_dtype=False
    )
