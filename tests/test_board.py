"""The board: links that lead to files, filters that know the lines, a front that nobody beats."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_html_report import EVIL, Page, make_rows
from test_rescore_and_status import cell, row

from kvarena.harness.analysis.row_frame import recorded_rows
from kvarena.harness.errors import UsageError
from kvarena.harness.report.board import write_board
from kvarena.harness.report.board_studies import find_studies
from kvarena.harness.report.board_tables import link_name
from kvarena.harness.report.budget_charts import on_front
from kvarena.harness.studies.reference import REPOSITORY

NEW = {"run_id": "run", "commit": "abcdef012345+", "codec": "none", "shape": "uniform"}


def recorded(results_dir: Path, name: str, rows: pd.DataFrame) -> None:
    """Rows as a study records them: with a summary beside them."""
    file = results_dir / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(file, index=False)
    file.with_name(f"{file.stem}-summary.csv").write_text("task\n")


def site_of(results_dir: Path) -> tuple[Path, dict[str, Page]]:
    """The folder of the board, and its pages by name."""
    site = write_board(results_dir).parent
    return site, {path.name: Page(path.read_text()) for path in sorted(site.glob("*.html"))}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies of one task, one of which says protection, and a task with a strange name."""
    folder = tmp_path_factory.mktemp("results")
    rows = make_rows(**NEW)
    protected = rows.replace({"policy": {"h2o": "h2o(protect=none)+kivi(bits=2)"}})
    codecs = protected["policy"].map(lambda name: "kivi(bits=2)" if "kivi" in name else "none")
    protect = protected["policy"].map(lambda name: "none" if "none" in name else "paper")
    recorded(folder, "ours/ours", rows)
    recorded(folder, "more/qa", protected.assign(codec=codecs, protect=protect, run_id="two"))
    recorded(folder, "evil/evil", make_rows(task=EVIL, **NEW).assign(run_id="three"))
    (folder / "lost").mkdir()
    (folder / "lost" / "lost-summary.csv").write_text("task\n")
    (folder / "recorded.yaml").write_text("ours/ours.csv: make ours\n")
    return folder


@pytest.fixture(scope="module")
def site(results: Path) -> tuple[Path, dict[str, Page]]:
    return site_of(results)


def test_every_link_leads_to_a_file_or_a_place_of_the_site(
    site: tuple[Path, dict[str, Page]],
) -> None:
    folder, pages = site
    assert len(pages) == 3
    for page in pages.values():
        places = {attributes.get("id") for _, attributes in page.elements}
        links = [attributes["href"] for attributes in page.all("a")]
        assert len(links) > 1
        for link in links:
            found = link[1:] in places if link.startswith("#") else (folder / link).is_file()
            assert found, link
        assert all(image["src"].startswith("data:image/") for image in page.all("img"))
        assert not page.all("link")


def test_the_numbers_of_a_line_come_from_the_rows_that_it_links_to(
    site: tuple[Path, dict[str, Page]],
) -> None:
    folder, pages = site
    cells = pd.read_csv(folder / "qa--toy.csv")
    assert len(cells) == 10
    files = set()
    for line in cells.to_dict("records"):
        rows = recorded_rows(folder / line["rows_file"])
        assert rows["score"].mean() == pytest.approx(line["score"])
        assert (len(rows), set(rows["policy"])) == (line["num_rows"], {line["policy"]})
        assert not {"prediction", "reference", "references"} & set(rows.columns)
        files.add(line["rows_file"])
    assert len(files) == 10
    assert files <= {link["href"] for link in pages["qa--toy.html"].all("a")}


def test_filters_name_the_values_of_lines(site: tuple[Path, dict[str, Page]]) -> None:
    page = site[1]["qa--toy.html"]
    lines = [attributes for attributes in page.all("tr") if "data-policy" in attributes]
    assert len(lines) == 10
    assert {line["data-policy"] for line in lines} == {"full", "h2o", "tova"}
    assert {line["data-codec"] for line in lines} == {"kivi", "none"}
    assert {line["data-protect"] for line in lines} == {"paper", "none", "-"}
    coded = [line for line in lines if line["data-codec"] == "kivi"]
    assert {(line["data-policy"], line["data-protect"]) for line in coded} == {("h2o", "none")}
    names = [choice["name"] for choice in page.all("select")]
    assert names == ["study", "policy", "protect", "codec", "budget", "front"]  # one shape only
    (form,) = page.all("form")
    assert form["data-table"] in {table.get("id") for table in page.all("table")}
    values = {option.get("value") for option in page.all("option")}
    assert {"256", "512", "full", "kivi", "tova", "ours", "more/qa"} <= values


def test_what_is_there_is_told_with_command_interval_and_commit(
    site: tuple[Path, dict[str, Page]],
) -> None:
    pages = site[1]
    page = pages["qa--toy.html"]
    assert "make ours makes ours" in page.text
    assert "not recorded makes more/qa" in page.text
    header, *lines = page.tables[0]
    line = dict(zip(header, lines[0], strict=True))
    assert line["score % [95 % interval]"].count("[") == 1
    assert line["commit"] == "abcdef012345 + changes"
    assert line["made by"] == "C1" or line["made by"] == "C2"
    index = pages["index.html"]
    assert "Not shown: lost/lost-summary.csv" in index.text
    assert "recorded in ours/ours.csv, without texts" in index.text


def test_a_budget_that_never_bound_and_missing_samples_are_told(tmp_path: Path) -> None:
    rows = make_rows(**NEW, compressed=False)
    recorded(tmp_path, "ours/ours", rows.drop(index=rows.index[-1]))
    page = site_of(tmp_path)[1]["qa--toy.html"]
    assert "nothing was evicted: the budget never bound" in page.text
    assert "tova, budget 512: 3 of 4 samples (1 not run)" in page.text


def test_names_are_escaped_and_lead_nowhere_else(site: tuple[Path, dict[str, Page]]) -> None:
    folder, pages = site
    (name,) = set(pages) - {"index.html", "qa--toy.html"}
    assert EVIL in "".join(pages["index.html"].texts)
    assert EVIL in "".join(pages[name].texts)
    assert (folder / name).parent == folder
    assert [len(page.all("script")) for page in pages.values()] == [1, 1, 1]


@pytest.mark.parametrize("text", ["../../etc/passwd", "a/b", "25%", "x" * 400, "é", "", "..", EVIL])
def test_a_name_of_a_file_is_one_name_that_a_link_can_hold(text: str) -> None:
    name = link_name(text, "512")
    assert name == Path(name).name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
    assert len(name) < 240
    assert name != link_name(text + "!", "512")


def test_the_front_is_what_no_other_cell_beats() -> None:
    points = [(10, 0.2), (20, 0.5), (20, 0.4), (30, 0.5), (40, 0.9), (5, 0.1), (1, 0.95)]
    cells = pd.DataFrame(points, columns=["kv_bytes_kept", "score"])
    cells["bounded"] = [True] * 6 + [False]  # a reference beats nobody
    cells.loc[7] = [1, float("nan"), True]
    assert on_front(cells).tolist() == [True, True, False, False, True, True, False, False]
    for place in cells.index[on_front(cells)]:
        others = cells[cells["bounded"].astype(bool)].drop(index=place)
        own = cells.loc[place]
        cheaper = others["kv_bytes_kept"] <= own["kv_bytes_kept"]
        assert not (cheaper & (others["score"] > own["score"])).any()


def test_cells_come_with_the_command_that_was_typed_and_count_once(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"slots": 1, "kv_bytes_kept": 10, "kv_bytes_peak": 10, "seed": 0}
    figures |= {"decode_tokens_per_sec": 1.0, "policy": "keydiff", "commit": "abc", "score": 1.0}
    folder = cell(tmp_path, rows=[row("a", "48213", **figures), row("b", "48213", **figures)])
    manifest = json.loads((folder.path / "manifest.json").read_text())
    manifest["argv"] = ["/bin/kvarena", "task=needle", "budget=64"]
    (folder.path / "manifest.json").write_text(json.dumps(manifest))
    (study,) = find_studies(tmp_path)
    recorded(tmp_path, "tables/needle", study.rows)
    assert [(one.name, len(one.rows)) for one in find_studies(tmp_path)] == [("runs", 2)]
    begun = cell(tmp_path, "tova")
    page, index = (site_of(tmp_path)[1][name] for name in ("needle--toy.html", "index.html"))
    assert f"Not shown: runs/needle/toy/{begun.path.name}, since" in index.text
    assert "kvarena task=needle budget=64 makes runs; Python" in page.text


def test_a_second_board_replaces_the_first_and_nothing_else(results: Path, tmp_path: Path) -> None:
    recorded(tmp_path, "ours/ours", make_rows(**NEW))
    site, _ = site_of(tmp_path)
    (site / "old.html").write_text("of a task that is gone")
    first = {path: path.read_bytes() for path in site.rglob("*.*") if path.name != "old.html"}
    site_of(tmp_path)
    assert {path: path.read_bytes() for path in site.rglob("*.*")} == first
    (site / "README.md").write_text("# mine\n")
    with pytest.raises(UsageError, match="is no board; move it away"):
        write_board(tmp_path)
    assert (site / "README.md").read_text() == "# mine\n"


def test_the_readme_is_what_a_static_space_asks_for(site: tuple[Path, dict[str, Page]]) -> None:
    _, front, _ = (site[0] / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["sdk"] == "static"
    assert yaml.safe_load(front)["app_file"] == "index.html"


def test_every_recorded_file_has_its_command_and_every_command_is_a_target() -> None:
    commands = yaml.safe_load((REPOSITORY / "results" / "recorded.yaml").read_text())
    summaries = (REPOSITORY / "results").glob("*/*-summary.csv")
    rows = [path.with_name(path.name.replace("-summary", "")) for path in summaries]
    assert set(commands) == {str(path.relative_to(REPOSITORY / "results")) for path in rows}
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands.values():
        make, target, *_ = command.split()
        assert make == "make"
        assert f"\n{target}: " in makefile, command
