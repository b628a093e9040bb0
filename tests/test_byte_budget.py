"""A budget in bytes: the most tokens that fit, or a coarser codec, on the longest sample."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.budget import parse_budget
from kvarena.harness.cells import run_cell as cell_runs
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.errors import UsageError
from kvarena.harness.models.kv_size import values_per_token
from kvarena.harness.models.loading import load_config
from kvarena.harness.registry import choice_label, load_choice
from toy_folder import save_haystack, save_model_folder, toy_cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_model_folder(folder / "toy")
    save_haystack(folder / "hay")
    cell_runs._held_model.cache_clear()
    return folder


def small(codec: str, **changes: Any) -> dict[str, Any]:
    """A codec's settings with a window that suits prompts of a few hundred tokens."""
    return load_choice("codec", codec) | {"window": 16, "block": 16} | changes


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("text", ["12MB", "1.5GB", "800kb"])
def test_bytes_are_read_in_decimal_units(text: str) -> None:
    budget = parse_budget(text)
    assert budget.bytes == {"12MB": 12 * 10**6, "1.5GB": 1500 * 10**6, "800kb": 800 * 10**3}[text]
    assert parse_budget(budget.label) == budget
    assert (budget.tokens, budget.ratio, budget.for_prompt(1000)) == (None, None, None)


@pytest.mark.parametrize("policy", ["keydiff", "h2o", "streaming_llm"])
def test_without_a_codec_the_bytes_are_used_to_the_last_token(
    policy: str, folder: Path, tmp_path: Path
) -> None:
    cell = toy_cell(folder, policy, budget="100kB")
    rows = rows_in(run_cell(cell, tmp_path).path)
    per_token = rows[0]["kv_bytes_kept"] / rows[0]["budget_tokens"]
    for row in rows:
        assert row["budget"] == "100kB"
        assert 100_000 - 2 * per_token < row["kv_bytes_kept"] <= 100_000


@pytest.mark.parametrize(("codec", "kilobytes"), [("kivi", 50), ("kvcomp", 50), ("zipcache", 90)])
def test_a_codec_keeps_more_tokens_in_the_same_bytes(
    codec: str, kilobytes: int, folder: Path, tmp_path: Path
) -> None:
    budget = f"{kilobytes}kB"
    plain = rows_in(run_cell(toy_cell(folder, budget=budget), tmp_path).path)
    cell = toy_cell(folder, codec=small(codec), budget=budget)
    coded = rows_in(run_cell(cell, tmp_path).path)
    for before, after in zip(plain, coded, strict=True):
        assert after["budget_tokens"] > 1.3 * before["budget_tokens"]
        assert after["bits_per_value"] < before["bits_per_value"]
    # The longest sample is the one it was measured on, with more tokens to write.
    longest = max(coded, key=lambda row: row["prompt_tokens"])
    assert 0.8 < longest["kv_bytes_kept"] / (1000 * kilobytes) <= 1


@pytest.mark.parametrize(("policy", "codec", "budget"), [
    ("keydiff", "none", "100kB"), ("keydiff", "kvcomp", "60kB"), ("full", "kivi", "80kB"),
])  # fmt: skip
def test_a_part_first_and_the_rest_later_give_the_rows_of_the_whole(
    policy: str, codec: str, budget: str, folder: Path, tmp_path: Path
) -> None:
    options = small(codec) | ({"bits": 4} if codec == "kivi" else {}) if codec != "none" else codec

    def rows_of(results: Path, **changes: Any) -> list[dict[str, Any]]:
        cell = toy_cell(folder, policy, options, budget=budget, **changes)
        times = ("ttft_sec", "decode_tokens_per_sec", "slots")
        rows = rows_in(run_cell(cell, results).path)
        return [{k: v for k, v in row.items() if k not in times} for row in rows]

    # The first sample is the shorter one: alone, more tokens or finer codes would fit.
    (first,) = rows_of(tmp_path / "parts", limit=1)
    parts = rows_of(tmp_path / "parts")
    whole = rows_of(tmp_path / "whole")
    assert parts[0] == first
    assert sorted(parts, key=lambda row: row["sample_id"]) == sorted(
        whole, key=lambda row: row["sample_id"]
    )
    assert first["prompt_tokens"] < max(row["prompt_tokens"] for row in whole)
    assert all(row["kv_bytes_kept"] <= 1000 * int(budget[:-2]) for row in whole)


def test_a_fit_says_what_it_does_while_it_measures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cell(toy_cell(folder, budget="100kB"), tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "MB" in line or "find" in line]
    assert told[0].startswith("needle keydiff 100kB: finding how many tokens fit on the longest")
    assert re.fullmatch(r"needle keydiff 100kB: \d+ tokens take 0\.\d\d MB", told[1])


def too_generous(path: Path, **changes: Any) -> None:
    """Make the kept fit allow more than its measurement did."""
    found = json.loads((path / "fit.json").read_text())
    (path / "fit.json").write_text(json.dumps(found | changes))
    (path / "samples.jsonl").unlink()


def test_a_sample_over_its_bytes_runs_again_with_fewer_tokens(folder: Path, tmp_path: Path) -> None:
    cell = toy_cell(folder, budget="100kB")
    path = run_cell(cell, tmp_path).path
    tokens = rows_in(path)[0]["budget_tokens"]
    too_generous(path, budget_tokens=tokens + 40)
    run_cell(cell, tmp_path)
    for row in rows_in(path):
        assert row["kv_bytes_kept"] <= 100_000
        assert row["budget_tokens"] == tokens
    assert len(rows_in(path)) == 2


def test_a_sample_over_its_bytes_runs_again_under_a_coarser_codec(
    folder: Path, tmp_path: Path
) -> None:
    settings = small("kivi", bits=4)
    cell = toy_cell(folder, "full", settings, budget="80kB")
    path = run_cell(cell, tmp_path).path
    before = rows_in(path)
    too_generous(path, times_coarser=0)
    run_cell(cell, tmp_path)
    after = rows_in(path)
    coarse = choice_label("codec", settings | {"bits": 2})
    long_ones = [row for row in after if row["codec"] == coarse]
    assert long_ones  # both, or the longer one
    assert all(row["kv_bytes_kept"] <= 80_000 for row in [*before, *after])
    assert all(row["policy"] == f"full+{row['codec']}" for row in after)


def test_a_fit_on_another_length_is_measured_again(folder: Path, tmp_path: Path) -> None:
    cell = toy_cell(folder, budget="100kB")
    path = run_cell(cell, tmp_path).path
    before = json.loads((path / "fit.json").read_text())
    too_generous(path, budget_tokens=999, text_tokens=17)
    run_cell(cell, tmp_path)
    assert json.loads((path / "fit.json").read_text()) == before


def test_an_answer_longer_than_its_prompt_counts_in_full(folder: Path, tmp_path: Path) -> None:
    task = toy_cell(folder).settings.task | {"lengths": [240], "max_new_tokens": 300}
    path = run_cell(toy_cell(folder, task=task, budget="60kB"), tmp_path).path
    fit = json.loads((path / "fit.json").read_text())
    assert fit["text_tokens"] > 500
    assert all(row["kv_bytes_kept"] <= 60_000 for row in rows_in(path))


def test_a_policy_that_keeps_everything_takes_a_coarser_codec(folder: Path, tmp_path: Path) -> None:
    needed = {}
    for bits in (4, 2):
        settings = small("kivi", bits=bits)
        cell = toy_cell(folder, "full", settings, budget="full")
        rows = rows_in(run_cell(cell, tmp_path).path)
        needed[bits] = max(row["kv_bytes_kept"] for row in rows)
    between = f"{(needed[4] + needed[2]) // 2000}kB"
    cell = toy_cell(folder, "full", small("kivi", bits=4), budget=between)
    rows = rows_in(run_cell(cell, tmp_path).path)
    ran = choice_label("codec", small("kivi", bits=2))
    assert {row["codec"] for row in rows} == {ran}
    assert {row["policy"] for row in rows} == {f"full+{ran}"}
    assert {row["codec_asked"] for row in rows} == {choice_label("codec", small("kivi", bits=4))}
    assert max(row["kv_bytes_kept"] for row in rows) <= 1000 * int(between[:-2])


def test_what_cannot_fit_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"budget=20kB: policy full keeps everything, which takes"):
        run_cell(toy_cell(folder, "full", budget="20kB"), tmp_path)


def test_bits_and_ratio_count_everything_that_is_held(folder: Path, tmp_path: Path) -> None:
    cell = toy_cell(folder, budget="64")
    values = values_per_token(load_config(cell.model))
    assert values == 2 * 3 * 2 * 16  # keys and values, layers, heads, head dim
    for row in rows_in(run_cell(cell, tmp_path).path):
        assert row["kept_tokens"] == 64
        assert row["bits_per_value"] == 32 + 8 * 4 / (2 * 16)  # float32, and positions
        fp16 = 2 * values * row["prompt_tokens"]
        assert row["compression_ratio"] == fp16 / row["kv_bytes_kept"]
