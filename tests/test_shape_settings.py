"""shape=, protect= and evict_every= as they are typed: what rows say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from faulty import Kvarena
from kvarena.harness.analysis.cell_labels import policy_labels
from kvarena.harness.analysis.comparison import has_codec
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.registry import load_choice
from toy_folder import save_haystack, save_model_folder, toy_cell, toy_overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    save_model_folder(folder / "toy")
    save_haystack(folder / "hay")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = (path / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "h2o"),
        ({"shape": "ada"}, "h2o(shape=ada)"),
        ({"protect": "4+8", "shape": "global"}, "h2o(shape=global,protect=4+8)"),
        ({"protect": "none", "evict_every": 4}, "h2o(protect=none,evict_every=4)"),
        (
            {"shape": {**load_choice("shape", "ada"), "alpha": 0.5}, "codec": "kivi"},
            "h2o(shape=ada[alpha=0.5])+kivi",
        ),
    ],
)
def test_a_row_says_what_decided_which_tokens_stayed(
    changes: dict[str, Any], label: str, folder: Path, tmp_path: Path
) -> None:
    cell = toy_cell(folder, **{"policy": "h2o"} | changes)
    for row in rows_of(run_cell(cell, tmp_path).path):
        assert row["policy"] == label
        assert row["shape"] == cell.shape_label
        assert row["protect"] == changes.get("protect", "paper")
        assert row["evict_every"] == changes.get("evict_every", 1)
        assert row["protected_tokens"] == {"4+8": 12, "none": 0, "paper": 32}[row["protect"]]
        assert row["compressed"]
    assert has_codec(label) == ("codec" in changes)
    assert policy_labels([cell.identity], [set()]) == [label]


def test_what_keeps_everything_has_no_protection_and_evicts_never(folder: Path) -> None:
    plain = toy_cell(folder, policy="full", budget="full")
    asked = toy_cell(folder, policy="full", budget="full", protect="4+8", evict_every=16)
    assert asked.identity == plain.identity
    assert asked.method_label() == "full"
    unbound = toy_cell(folder, budget="full", protect="4+8", evict_every=16)
    assert unbound.method_label() == "keydiff"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["policy=full", "shape=ada"], "has no shape; leave shape=uniform"),
        (
            ["policy=full", "budget=9MB", "shape=ada"],
            "keeps everything, so its budget has no shape",
        ),
        (["budget=full", "shape=ada"], "budget=full evicts nothing and has no shape; leave"),
        (["shape=ada", "shape.alpha=1.5"], "alpha must be a number from 0 to 1, got 1.5"),
        (["shape=ada", "shape.alfa=0.5"], "alpha"),
        (["shape=adda"], "unknown shape 'adda'. Did you mean ada?"),
        (["shape=pyramid", "shape.beta=0"], "beta must be a number of at least 1"),
        (["shape=ada", "policy=streaming_llm"], "set policy.reindex=false"),
        (["protect=4"], "protect=4: give paper (what each method's authors protect), none, or"),
        (["protect=4+60"], "a budget of 64 tokens leaves nothing to choose: 64 tokens"),
        (["protect=4+56", "shape=pyramid", "shape.beta=100"], "of which this shape gives 60 in"),
        (["evict_every=0"], "evict_every must be >= 1 token, got 0"),
        (["evict_every=often"], "evict_every"),
    ],
)
def test_what_does_not_go_together_is_one_line_before_the_model_loads(
    overrides: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kvarena = Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kvarena.harness.models.loading.load_weights", load)
    outcome = kvarena(*overrides)
    assert outcome.code == 2
    assert told in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
