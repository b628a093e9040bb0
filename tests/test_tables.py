"""Summaries: how comparisons print, and what files can hold."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.harness.analysis.comparison import compare_cells
from kvarena.harness.analysis.distances import with_kl
from kvarena.harness.report.text_tables import (
    counted,
    markdown,
    percent,
    percent_limits,
    print_summary,
    significant,
    storable,
    write_csv,
)
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
    assert text.splitlines()[3].split() == ["keydiff", "512", "-", "0/1"]
    assert "No score" not in text
    mixed = cells({"status": "error"}, {"policy": "h2o"})
    line = printed(compare_cells(mixed)).splitlines()[4].split()
    assert line == ["keydiff", "512", "-", "0/1", *"----"]


def test_every_variant_has_a_table_of_its_own() -> None:
    rows = cells(
        {"variant": "chunk=64"}, {"variant": "chunk=128"}, {"policy": "h2o", "variant": ""}
    )
    titles = [
        line for line in printed(compare_cells(rows)).splitlines() if line.startswith("needle")
    ]
    assert titles == ["needle, toy", "needle, toy, chunk=128", "needle, toy, chunk=64"]


def test_markdown_has_a_variant_column_only_when_there_are_variants() -> None:
    assert markdown(compare_cells(cells({}))).startswith("| policy | budget | score % |")
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


def evicted(*shares: tuple[str, str, int, int]) -> pd.DataFrame:
    """Cells of (policy, budget, samples with an eviction, samples)."""
    rows = [
        BASE
        | {"policy": policy, "budget": budget, "sample_id": f"s{i}", "compressed": i < num_evicted}
        for policy, budget, num_evicted, num_samples in shares
        for i in range(num_samples)
    ]
    return compare_cells(pd.DataFrame(rows))


NEVER = "nothing was evicted: the budget never bound"


def test_a_budget_that_never_bound_is_marked_and_explained() -> None:
    summary = evicted(("keydiff", "512", 4, 4), ("keydiff", "8k", 0, 4), ("h2o", "8k", 0, 4))
    text = printed(summary)
    lines = [line.split()[:3] for line in text.splitlines()[3:6]]
    assert lines == [["keydiff", "512", "100.0"], ["h2o", "8k", "(a)"], ["keydiff", "8k", "(a)"]]
    assert text.count("(a)") == 3
    assert f"\n(a) {NEVER}.\n" in text
    assert f"(a) {NEVER}." in printed(summary, Terminal())
    table, _, notes = markdown(summary).partition("\n\n")
    assert "| keydiff | 8k (a) |" in table
    assert "| keydiff | 512 |" in table
    assert notes == f"(a) {NEVER}.\n"


def test_a_budget_that_bound_in_some_samples_says_in_how_many() -> None:
    summary = evicted(
        ("keydiff", "512", 3, 20),
        ("h2o", "512", 3, 20),
        ("tova", "512", 1, 20),
        ("h2o", "1k", 0, 1),
    )
    text = " ".join(printed(summary).split())
    assert "h2o 512 (a)" in text
    assert "keydiff 512 (a)" in text
    assert "tova 512 (b)" in text
    notes = (
        "(a) evicted in 3 of 20 samples; (b) evicted in 1 of 20 samples; (c) nothing was evicted"
    )
    assert notes in text
    assert notes in markdown(summary)


def test_what_keeps_everything_or_does_not_say_has_no_mark() -> None:
    summary = evicted(
        ("full", "full", 0, 4),
        ("full@3fa9", "full", 0, 4),
        ("full+kivi(window=64,bits=2)", "12MB", 0, 4),
        ("keydiff", "full", 0, 4),
    )
    assert "(a)" not in printed(summary)
    assert "(a)" not in markdown(evicted(("keydiff", "512", 0, 4)).drop(columns="num_compressed"))
    assert "(a)" in markdown(evicted(("keydiff+kivi", "12MB", 0, 4)))


def test_many_marks_stay_apart() -> None:
    summary = evicted(*[("h2o", str(100 + i), i, 100) for i in range(30)])
    assert len(set(re.findall(r"\| \d+ (\([a-z]+\)) \|", markdown(summary)))) == 30
    assert max(map(len, printed(summary).splitlines())) <= 100


def test_columns_without_any_value_are_left_out() -> None:
    rows = cells({"decode_tokens_per_sec": None}, {"policy": "h2o", "decode_tokens_per_sec": None})
    text = printed(compare_cells(rows))
    assert "tok/s" not in text
    assert "TTFT: medians" in text
    assert "TTFT" not in printed(compare_cells(rows.assign(ttft_sec=None)))
    some = rows.assign(decode_tokens_per_sec=[None, 3.0])
    assert "tok/s" in printed(compare_cells(some))
    no_bytes = rows.assign(kv_bytes_kept=None, kv_bytes_peak=None)
    assert "MB" not in markdown(compare_cells(no_bytes))


def test_forced_answers_show_agreement_and_divergence() -> None:
    rows = pd.concat(
        make_rows({"policy": policy, "kl_mean": kl}, {"policy": policy, "kl_mean": 3 * kl})
        for policy, kl in (("full", 0.0), ("h2o", 0.25))
    )
    summary = with_kl(compare_cells(rows), rows)
    for text in (printed(summary), printed(summary, Terminal())):
        assert "agreement %" in text
        assert "score" not in text
        assert "0.500" in text
        assert "in nats; lower is better" in text
    assert "| agreement % [95 %] | KL nats |" in markdown(summary)
    assert "KL" not in printed(compare_cells(rows))


def test_a_divergence_weighs_parts_as_the_score_does() -> None:
    rows = make_rows({"part": "a", "kl_mean": 1.0}, *[{"part": "b", "kl_mean": 2.0}] * 3)
    assert with_kl(compare_cells(rows), rows)["kl_mean"].tolist() == [1.5]
    lost = rows.assign(status=["error", "ok", "ok", "ok"])
    assert with_kl(compare_cells(lost), lost)["kl_mean"].isna().all()
    assert with_kl(compare_cells(lost, allow_partial=True), lost)["kl_mean"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345678, "12.3"),
        (0.000123456, "0.000123"),
        (0.5, "0.500"),
        (9.996, "10.0"),
        (999.6, "1000"),
        (123456.7, "123457"),
        (0.0, "0.00"),
        (math.nan, "-"),
    ],
)
def test_times_have_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text
    if value:
        line = printed(compare_cells(cells({"ttft_sec": value, "policy": "h2o"}))).splitlines()[3]
        assert text in line.split() or math.isnan(value)


def test_rounding_never_contradicts() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.0006, 0.5, 0.9994, 0.9996, 1)] == [
        "0.0",
        "<0.1",
        "0.1",
        "50.0",
        "99.9",
        ">99.9",
        "100.0",
    ]
    assert percent_limits(1.0, 0.83, 1.0) == "[83, 100]"
    assert percent_limits(0.504, 0.5037, 0.5043) == "[50, 51]"  # not [50, 50]
    assert percent_limits(0.836, 0.8355, 0.95) == "[83, 95]"  # not [84, 95]
    assert percent_limits(-0.003, -0.004, 0.02) == "[-1, 2]"  # not [-0, 2]
    assert percent_limits(0.5, math.nan, math.nan) == ""


def test_one_is_singular() -> None:
    assert [counted(number, "sample") for number in (0, 1, 2)] == [
        "0 samples",
        "1 sample",
        "2 samples",
    ]
    assert "of 1 sample;" not in printed(evicted(("keydiff", "512", 1, 1)))


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
