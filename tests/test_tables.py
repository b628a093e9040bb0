"""Summaries: the numbers, their order, and how they print."""

import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.harness.errors import UsageError
from kvarena.harness.tables import print_summary, summarise, write_csv

BASE = {
    "task": "needle",
    "model": "toy",
    "policy": "keydiff",
    "budget": "512",
    "status": "ok",
    "score": 1.0,
    "kv_bytes_kept": 2_000_000,
    "kv_bytes_peak": 3_000_000,
    "ttft_sec": 0.5,
    "decode_tokens_per_sec": 40.0,
    "slots": 4,
    "seed": 0,
    "run_id": "run",
}


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


def test_summary_matches_hand_computed_numbers() -> None:
    rows = make_rows(
        {"score": 1.0, "kv_bytes_kept": 10, "kv_bytes_peak": 50, "ttft_sec": 1.0},
        {"score": 0.0, "kv_bytes_kept": 30, "kv_bytes_peak": 70, "ttft_sec": 4.0},
        {"score": 0.5, "kv_bytes_kept": 20, "kv_bytes_peak": 60, "ttft_sec": 2.0, "slots": 8},
    )
    line = summarise(rows).iloc[0]
    assert (line.num_samples, line.num_ok, line.slots) == (3, 3, 8)
    assert line.score_mean == pytest.approx(0.5)
    assert line.score_se == pytest.approx(0.5 / math.sqrt(3))  # the sample deviation is 0.5
    assert (line.kv_bytes_kept, line.kv_bytes_peak, line.ttft_sec) == (20, 70, 2.0)
    assert line.decode_tokens_per_sec == 40.0


def test_a_failed_row_counts_only_as_a_sample() -> None:
    failed = {"status": "error", "score": 0.0, "kv_bytes_peak": 9e9, "ttft_sec": 99.0}
    line = summarise(make_rows({}, {}, failed)).iloc[0]
    assert (line.num_samples, line.num_ok) == (3, 2)
    assert (line.score_mean, line.score_se) == (1.0, 0.0)
    assert (line.kv_bytes_peak, line.ttft_sec) == (3_000_000, 0.5)


def test_missing_values_of_json_become_nan() -> None:
    nothing = dict.fromkeys(("score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec"))
    rows = make_rows({"status": "error", "decode_tokens_per_sec": None, **nothing})
    line = summarise(rows).iloc[0]
    assert line.num_ok == 0
    assert line[["score_mean", "score_se", "kv_bytes_peak", "ttft_sec"]].isna().all()


def test_one_short_answer_has_no_error_and_no_decode_speed() -> None:
    line = summarise(make_rows({"decode_tokens_per_sec": None})).iloc[0]
    assert line.score_mean == 1.0
    assert math.isnan(line.score_se)
    assert math.isnan(line.decode_tokens_per_sec)


def test_decode_speed_skips_rows_without_one() -> None:
    rows = make_rows({"decode_tokens_per_sec": 10.0}, {"decode_tokens_per_sec": math.nan})
    assert summarise(rows).decode_tokens_per_sec.item() == 10.0


def test_budgets_ascend_with_percentages_after_tokens_and_full_last() -> None:
    labels = ["full", "25%", "2k", "512", "12.5%", "1024", "10000"]
    summary = summarise(cells(*[{"budget": label} for label in labels]))
    assert list(summary.budget) == ["512", "1024", "2k", "10000", "12.5%", "25%", "full"]


def test_inside_a_budget_the_best_score_comes_first_then_the_name() -> None:
    scores = {"tova": 0.2, "h2o": 0.9, "snapkv": 0.2, "l2norm": None}
    rows = cells(*[{"policy": name, "score": score} for name, score in scores.items()])
    assert list(summarise(rows).policy) == ["h2o", "snapkv", "tova", "l2norm"]


def test_tasks_and_models_come_before_budgets() -> None:
    rows = cells({"model": "b", "budget": "1"}, {"model": "a", "budget": "9"}, {"task": "aaa"})
    assert list(summarise(rows).model) == ["toy", "a", "b"]


def test_budgets_read_as_numbers_are_labels_again() -> None:
    assert list(summarise(cells({"budget": 512}, {"budget": 64})).budget) == ["64", "512"]


@pytest.mark.parametrize("label", ["", "many", "-5", "5 %%", "k"])
def test_an_unknown_budget_is_named(label: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        summarise(cells({"budget": label}))


def test_missing_columns_and_empty_frames_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="ttft_sec"):
        summarise(make_rows({}).drop(columns="ttft_sec"))
    with pytest.raises(UsageError, match="no rows"):
        summarise(make_rows({}).iloc[:0])


def test_a_sample_that_appears_twice_in_a_cell_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="keydiff 512"):
        summarise(cells({}, {"run_id": "other"}))


def test_the_same_sample_under_another_seed_is_no_repeat() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summarise(cells({}, {"seed": 1}, {"budget": "1k"}))


def test_plain_output_is_narrow_and_free_of_escape_codes() -> None:
    long = {"policy": "a_policy_with_a_name_" * 6, "model": "model/" * 40, "kv_bytes_kept": 9e12}
    text = printed(summarise(cells(long, long | {"policy": "h2o", "status": "error"})))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "..." in text


def test_plain_columns_line_up() -> None:
    rows = cells({}, {"policy": "streaming_llm", "score": 0.0, "kv_bytes_kept": 123_456_789})
    header, rule, *lines = printed(summarise(rows)).splitlines()[1:5]
    assert len({len(header), len(rule), *map(len, lines)}) == 1


def test_printed_numbers_carry_the_units_of_the_header() -> None:
    text = printed(summarise(make_rows({"score": 1.0}, {"score": 0.0})))
    assert "KV kept MB" in text
    assert "50.0 ± 50.0" in text
    numbers = text.splitlines()[3].split()
    assert numbers == ["keydiff", "512", "50.0", "±", "50.0", "2.0", "3.0", "0.500", "40.0"]


def test_failures_show_only_when_there_are_some() -> None:
    assert "ok/n" not in printed(summarise(make_rows({}, {})))
    text = printed(summarise(make_rows({}, {"status": "error"})))
    assert "ok/n" in text
    assert "1/2" in text


def test_a_cell_without_scores_prints_dashes() -> None:
    text = printed(summarise(make_rows({"status": "error"})))
    assert text.splitlines()[3].split() == ["keydiff", "512", "-", "0/1", *"----"]


def test_the_footnote_says_how_many_sequences_ran_side_by_side() -> None:
    assert "among 4 (slots)" in printed(summarise(cells({})))
    assert "alone" in printed(summarise(cells({"slots": 1})))
    assert "among 1 to 4 (slots)" in printed(summarise(cells({"slots": 1}, {"policy": "h2o"})))


def test_an_ascii_stream_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(summarise(make_rows({}, {})), stream)
    stream.flush()
    assert b"100.0 ?  0.0" in raw.getvalue()


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_terminal_of_any_width_gets_every_number(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    names = {"policy": "streaming_llm", "model": "a[bold]b"}
    rows = cells(names, names | {"seed": 1, "status": "error"}, names | {"seed": 2, "score": 0.0})
    text = printed(summarise(rows), Terminal())
    assert "a[bold]b" in text
    for number in ("streaming_llm", "50.0 ± 50.0", "2/3", "2.0", "3.0", "0.500", "40.0"):
        assert number in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[:-1]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_an_empty_summary_says_so() -> None:
    assert printed(summarise(cells({})).iloc[:0]) == "no results\n"


def test_csv_round_trip_keeps_text_and_numbers(tmp_path: Path) -> None:
    awkward = 'two\nlines, a "quote", a carriage\rreturn, ü ± 語'
    rows = make_rows({"prediction": awkward, "ttft_sec": 0.1 + 0.2}, {"prediction": "x"})
    path = write_csv(rows, tmp_path / "new" / "needle.csv")
    back = pd.read_csv(path, dtype={"budget": str}, float_precision="round_trip")
    pd.testing.assert_frame_equal(back, rows, check_exact=True)
    again = summarise(back)
    pd.testing.assert_frame_equal(again, summarise(rows))


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
