"""A budget in bytes: the most tokens that fit, or a coarser codec, on the longest sample."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness import run_cell as cell_runs
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.kv_bytes import values_per_token
from kvarena.harness.models import load_config
from kvarena.harness.registry import load_choice
from kvarena.harness.run_cell import run_cell
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
    cell = toy_cell(folder, codec=codec, codec_settings=small(codec), budget=budget)
    coded = rows_in(run_cell(cell, tmp_path).path)
    for before, after in zip(plain, coded, strict=True):
        assert after["budget_tokens"] > 1.3 * before["budget_tokens"]
        assert after["bits_per_value"] < before["bits_per_value"]
    # The longest sample is the one it was measured on, with more tokens to write.
    longest = max(coded, key=lambda row: row["prompt_tokens"])
    assert 0.8 < longest["kv_bytes_kept"] / (1000 * kilobytes) <= 1


def test_a_later_command_goes_on_with_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    first = run_cell(toy_cell(folder, budget="100kB", limit=1), tmp_path)
    (tokens,) = {row["budget_tokens"] for row in rows_in(first.path)}
    second = run_cell(toy_cell(folder, budget="100kB"), tmp_path)
    assert second.path == first.path
    assert [row["budget_tokens"] for row in rows_in(second.path)] == [tokens, tokens]


def test_a_policy_that_keeps_everything_takes_a_coarser_codec(folder: Path, tmp_path: Path) -> None:
    needed = {}
    for bits in (4, 2):
        settings = small("kivi", bits=bits)
        cell = toy_cell(folder, "full", "kivi", codec_settings=settings, budget="full")
        rows = rows_in(run_cell(cell, tmp_path).path)
        needed[bits] = max(row["kv_bytes_kept"] for row in rows)
    between = f"{(needed[4] + needed[2]) // 2000}kB"
    cell = toy_cell(folder, "full", "kivi", codec_settings=small("kivi", bits=4), budget=between)
    rows = rows_in(run_cell(cell, tmp_path).path)
    assert {row["codec"] for row in rows} == {"kivi[bits=2]"}
    assert {row["policy"] for row in rows} == {"full+kivi"}
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
