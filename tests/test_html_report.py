"""The HTML report: self-contained, everything escaped, and silent about what is not known."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.harness.analysis.comparison import compare_cells
from kvarena.harness.analysis.distances import with_kl
from kvarena.harness.report import html_page
from kvarena.harness.report.html_page import render, write_report
from kvarena.harness.report.html_provenance import describe_cells

EVIL = "</td><script>alert(1)</script>&$x$\"'"
NOTHING: dict[str, Any] = {"header": [], "lines": [], "environments": {}, "commands": {}}


class Page(HTMLParser):
    """What a browser makes of the page: elements, links, texts by element, tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_rows(task: str = "qa", **columns: Any) -> pd.DataFrame:
    """Four samples under the full cache and under h2o and tova at 256 and 512; tova is better."""
    cells = [("full", "full"), *((p, b) for p in ("h2o", "tova") for b in ("256", "512"))]
    rows = [
        {
            "task": task,
            "model": "toy",
            "variant": "",
            "policy": policy,
            "budget": budget,
            "seed": 0,
            "sample_id": f"s{number}",
            "status": "ok",
            "score": {"full": 1.0, "tova": 0.75, "h2o": 0.5}[policy] - 0.1 * number,
            "prediction": f"{policy} says {number}",
            "reference": f"right {number}",
            "kv_bytes_kept": 4e6 if budget == "full" else 1e4 * int(budget),
            "kv_bytes_peak": 5e6,
            "ttft_sec": 1.5,
            "decode_tokens_per_sec": 20.0,
            "slots": 2,
            "num_planned": 4,
        }
        for policy, budget in cells
        for number in range(4)
    ]
    return pd.DataFrame(rows).assign(**columns)


def page_of(rows: pd.DataFrame, **more: Any) -> Page:
    cells = with_kl(compare_cells(rows), rows)
    return Page(render(rows, cells, more.pop("provenance", NOTHING), **more))


def line_of(page: Page, policy: str, budget: str, table: int = 0) -> dict[str, str]:
    header, *lines = page.tables[table]
    found = [line for line in lines if line[:2] == [policy, budget]]
    assert len(found) == 1
    return dict(zip(header, found[0], strict=True))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words and tables: drawing takes most of the time."""
    monkeypatch.setattr(html_page, "section_pictures", lambda rows, cells: [])


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return make_rows()


@pytest.fixture(scope="module")
def page(rows: pd.DataFrame) -> Page:
    return page_of(rows)


def test_the_page_loads_nothing(page: Page) -> None:
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "background", "poster")
    ]
    assert len(links) > 5
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not page.all("link")
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def test_style_and_script_load_nothing_either(rows: pd.DataFrame) -> None:
    text = render(rows, compare_cells(rows), NOTHING)
    for block in re.findall(r"<(style|script)>(.*?)</\1>", text, re.DOTALL):
        assert not re.search(r"url\(|@import|http|fetch|import\(|innerHTML", block[1])


def test_every_link_inside_the_page_has_a_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in page.all("a")}
    labelled = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert targets | labelled <= set(ids)


@pytest.mark.parametrize(
    "column", ["task", "model", "variant", "prediction", "reference", "sample_id", "policy"]
)
def test_markup_in_a_row_is_shown_and_not_run(page: Page, column: str) -> None:
    rows, plain = make_rows(), page
    if column == "policy":
        rows["policy"] = rows["policy"].replace("h2o", EVIL)
    else:
        rows[column] = rows[column] + EVIL
    evil = page_of(rows)
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in plain.elements]
    assert len(evil.all("script")) == 1
    assert EVIL in evil.text


@pytest.mark.usefixtures("no_pictures")
def test_markup_in_a_manifest_is_shown_and_not_run(rows: pd.DataFrame) -> None:
    provenance = {
        "header": ["cell"],
        "lines": [[EVIL]],
        "environments": {EVIL: "E1"},
        "commands": {EVIL: "C1"},
    }
    page = page_of(rows, provenance=provenance, empty_cells=[EVIL])
    assert len(page.all("script")) == 1
    assert page.text.count(EVIL) == 4


def test_every_picture_says_in_words_what_it_shows(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == 5
    assert "h2o: 256 35.0, 512 35.0; tova: 256 60.0, 512 60.0" in pictures[0]["alt"]
    assert "full: full 85.0" in pictures[0]["alt"]
    assert "h2o: 256 2.56, 512 5.12" in pictures[1]["alt"]
    titles = ["Score by budget (tokens)", "Score by memory kept", "Time to first token"]
    assert all(title in page.text for title in [*titles, "Decoding speed", "KV cache memory"])


def test_the_table_holds_score_interval_difference_and_standing(page: Page) -> None:
    line = line_of(page, "tova", "256")
    assert re.fullmatch(r"60\.0 \[\d+, \d+\]", line["score % [95 % interval]"])
    assert line["difference to full, points [95 % interval]"].startswith("-25.0")
    assert line["best at its budget"] == "best"
    assert line["samples ok / planned"] == "4 / 4"
    assert line["KV kept, MB"] == "2.6"
    assert line["TTFT, s"] == "1.50"
    assert line["decode, tokens/s"] == "20.0"
    assert 0 < float(line["p (Holm)"]) <= 1
    full = line_of(page, "full", "full")
    assert full["difference to full, points [95 % interval]"] == full["p (Holm)"] == "-"


@pytest.mark.usefixtures("no_pictures")
def test_a_published_figure_stands_beside_the_cell_it_matches(rows: pd.DataFrame) -> None:
    cells = compare_cells(rows).assign(
        published=float("nan"), published_source="", published_confidence=""
    )
    tova = (cells["policy"] == "tova") & (cells["budget"] == "256")
    cells.loc[tova, ["published", "published_source", "published_confidence"]] = [
        0.512,
        "P, 1",
        "A",
    ]
    page = Page(render(rows, cells, NOTHING))
    assert line_of(page, "tova", "256")["published, %"] == "51.2 (P, 1, grade A)"
    assert line_of(page, "tova", "512")["published, %"] == "-"
    assert "Published: what a paper reports" in page.text


def test_a_column_without_any_value_is_left_out(page: Page) -> None:
    header = page.tables[0][0]
    assert "published, %" not in header
    assert "Published" not in page.text
    alone = make_rows()
    alone = page_of(alone[alone["policy"] == "tova"].assign(decode_tokens_per_sec=None))
    left_out = {"p (Holm)", "decode, tokens/s"}
    assert not left_out & set(alone.tables[0][0])
    assert left_out < set(header)
    assert "p (Holm)" in page.text
    assert "p (Holm)" not in alone.text


def test_the_table_sorts_by_numbers_and_budgets_by_size(page: Page) -> None:
    cells = [a["data-sort"] for tag, a in page.elements if tag in ("td", "th") and "data-sort" in a]
    width = len(page.tables[0][0])
    lines = [cells[i : i + width] for i in range(0, len(cells), width)]
    assert [line[1] for line in lines] == ["0", "0", "1", "1", "2"]
    assert [float(line[2]) for line in lines] == pytest.approx([0.6, 0.35, 0.6, 0.35, 0.85])
    assert lines[-1][6] == ""  # unknown, which the script puts last


@pytest.mark.usefixtures("no_pictures")
def test_the_best_policy_of_a_budget_is_named_with_those_it_cannot_be_told_from() -> None:
    rows = make_rows()
    tie = rows["policy"].eq("h2o") & rows["budget"].eq("512")
    rows.loc[tie, "score"] = [0.7, 0.7, 0.5, 0.4]
    text = page_of(rows).text
    assert re.search(
        r"budget 512: tova 60\.0 \[.*?\]; no significant difference to h2o 57\.5", text
    )


def test_an_incomplete_cell_is_named_and_has_no_score_anywhere() -> None:
    rows = make_rows()
    cell = rows["policy"].eq("tova") & rows["budget"].eq("256")
    rows.loc[rows.index[cell][0], ["status", "score", "prediction"]] = ["oom", None, None]
    rows = rows.drop(index=rows.index[cell][-1])
    page = page_of(rows, empty_cells=["toy/snapkv-256-0"])
    assert "tova, budget 256: 2 of 4 samples (1 oom, 1 not run)" in page.text
    assert "toy/snapkv-256-0: begun, no samples yet" in page.text
    line = line_of(page, "tova", "256")
    assert line["score % [95 % interval]"] == "incomplete"
    assert line["best at its budget"] == ""
    assert "budget 256: h2o" in page.text
    assert "tova: 256 no value, 512 60.0" in page.all("img")[0]["alt"]
    assert "no answer: oom" in page.text


def test_a_complete_run_has_no_warning(page: Page) -> None:
    assert "ncomplete" not in page.text
    assert "Sample data" not in page.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("is_sample", [True, False])
def test_sample_data_are_called_that_in_a_banner(is_sample: bool) -> None:
    rows = pd.concat([make_rows("longbench", meta_is_sample=is_sample), make_rows("needle")])
    text = page_of(rows).text
    assert ("The rows of longbench come from kvarena's own sample" in text) == is_sample
    assert text.count("sample data") == is_sample  # the tag of the section


def test_cells_of_another_task_model_or_variant_stand_apart() -> None:
    parts = [make_rows(), make_rows("math"), make_rows(model="big"), make_rows(variant="chunk=64")]
    page = page_of(pd.concat(parts))
    headings = ["math, toy", "qa, big", "qa, toy", "qa, toy (chunk=64)"]
    assert [text for text in page.texts if text in headings] == headings * 2  # contents and titles
    assert len(page.all("img")) == 4 * 5


@pytest.mark.usefixtures("no_pictures")
def test_examples_are_the_same_samples_for_every_policy_and_are_cut() -> None:
    rows = make_rows()
    rows.loc[rows["policy"] == "tova", "prediction"] = "x" * 1000
    tables = page_of(rows).tables[1:]
    assert len(tables) == 2 * 3 + 1  # budgets times samples, and the provenance
    first = tables[0]
    assert [line[0] for line in first] == ["asked for", "full", "h2o", "tova"]
    assert first[0][2] == "right 0"
    assert first[2][1:] == ["50", "h2o says 0"]
    assert first[3][2] == "x" * 240 + "..."


def test_fidelity_shows_distances_and_no_answers() -> None:
    rows = make_rows("fidelity-qa")
    rows["kl_mean"] = 2 * (1 - rows["score"])
    rows["attention_recall"] = rows["score"] ** 2
    page = page_of(rows)
    assert "Top-1 agreement by budget" in page.text
    words = " ".join(picture["alt"] for picture in page.all("img"))
    assert "h2o: 256 1.30, 512 1.30" in words  # 2 * (1 - 0.35) nats
    line = line_of(page, "h2o", "256")
    assert line["agreement % [95 % interval]"].startswith("35.0 [")
    assert line["KL, nats"] == "1.300"
    assert "Best policy at each budget (agreement in %)" in page.text
    assert "score" not in page.text.split("All cells")[1]
    assert "Attention recall by budget" in page.text
    assert "Example answers" not in page.text


def test_recall_is_not_shown_where_it_was_not_measured() -> None:
    rows = make_rows("fidelity-qa", kl_mean=0.5, attention_recall=None)
    assert "Attention recall" not in page_of(rows).text


def test_needle_rows_get_heat_maps_of_complete_cells_only() -> None:
    short = make_rows("needle", meta_length_target=1000)
    short["meta_depth_target"] = short["sample_id"].map({"s0": 0, "s1": 50, "s2": 100, "s3": 100})
    longer = short.assign(meta_length_target=2000, sample_id=short["sample_id"] + "-2000")
    rows = pd.concat([short, longer], ignore_index=True).assign(num_planned=8)
    rows = rows.drop(index=rows.index[rows["policy"].eq("h2o") & rows["budget"].eq("256")][0])
    page = page_of(rows)
    by_depth = [p["alt"] for p in page.all("img") if "at depths 0, 50, 100 %" in p["alt"]]
    assert len(by_depth) == 2
    assert by_depth[0].endswith("full: 100, 90, 75; tova: 75, 65, 50.")
    assert by_depth[1].endswith("full: 100, 90, 75; h2o: 50, 40, 25; tova: 75, 65, 50.")
    by_length = [p["alt"] for p in page.all("img") if "depth 50 %, 2000 tokens:" in p["alt"]]
    assert len(by_length) == 4


def test_heat_maps_of_forced_answers_say_agreement() -> None:
    short = make_rows("fidelity-needle", meta_length_target=1000, kl_mean=0.5)
    short["meta_depth_target"] = short["sample_id"].map({"s0": 0, "s1": 50, "s2": 100, "s3": 100})
    longer = short.assign(meta_length_target=2000, sample_id=short["sample_id"] + "-2000")
    page = page_of(pd.concat([short, longer], ignore_index=True).assign(num_planned=8))
    maps = [picture["alt"] for picture in page.all("img") if "Heat map" in picture["alt"]]
    assert len(maps) == 2 + 5
    assert all("mean agreement" in alt for alt in maps)
    assert "Agreement by needle depth, budget 256" in page.text
    assert "high agreement" in page.text
    assert "high score" not in page.text


NEVER = "nothing was evicted: the budget never bound"


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_that_never_bound_is_marked_and_has_no_best_policy() -> None:
    rows = make_rows()
    rows["compressed"] = ~rows["budget"].isin(["512", "full"])
    page = page_of(rows)
    assert line_of(page, "tova", "512 (a)")["best at its budget"] == ""
    assert line_of(page, "tova", "256")["best at its budget"] == "best"
    assert f"budget 512: none, since {NEVER}" in page.text
    assert f"(a) {NEVER}." in page.text
    assert "budget full" not in page.text


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_that_bound_in_some_samples_says_in_how_many() -> None:
    rows = make_rows()
    rows["compressed"] = rows["sample_id"].isin(["s0", "s1", "s2"]) & (rows["budget"] != "full")
    page = page_of(rows)
    assert line_of(page, "h2o", "256 (a)")
    assert re.search(r"budget 256: tova 60\.0 \[.*?\] \(evicted in 3 of 4 samples\)", page.text)
    assert "(a) evicted in 3 of 4 samples." in page.text
    assert NEVER not in page.text


@pytest.mark.usefixtures("no_pictures")
def test_where_every_sample_lost_something_nothing_is_marked() -> None:
    rows = make_rows()
    text = page_of(rows.assign(compressed=rows["policy"] != "full")).text
    assert "(a)" not in text
    assert "evicted" not in text
    coded = rows.assign(compressed=False, policy=rows["policy"].replace("h2o", "full+kivi(bits=2)"))
    assert line_of(page_of(coded), "full+kivi(bits=2)", "256")


@pytest.mark.usefixtures("no_pictures")
def test_one_cell_and_one_sample_are_singular() -> None:
    rows = make_rows()
    page = page_of(rows[rows["policy"] == "full"].head(1).assign(num_planned=1))
    assert "1 cell, 1 sample." in page.text


def rules_of(css: str, selector: str) -> str:
    """The declarations of all rules whose selectors include this one."""
    found = re.findall(r"([^{}]+)\{([^{}]*)\}", css)
    return ";".join(
        rule for names, rule in found if selector in re.split(r"\s*,\s*", names.strip())
    )


def test_no_rule_lets_a_policys_name_break() -> None:
    css = (Path(html_page.__file__).parent / "report_page" / "style.css").read_text()
    screen = css.partition("@media print")[0]
    for selector in (".sortable th:first-child", ".sortable", ".answers th"):
        assert "anywhere" not in rules_of(screen, selector)
    for selector in (".sortable", ".answers th"):
        assert "white-space: nowrap" in rules_of(screen, selector)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_keeps_names_on_one_line(tmp_path: Path, width: int) -> None:
    names = {"h2o": "streaming_llm+kivi(window=64,bits=4)", "tova": "streaming_llm"}
    rows = make_rows().replace({"policy": names})
    page = render(rows, compare_cells(rows), NOTHING).replace("<details>", "<details open>")
    # A window is never as narrow as a telephone; a frame is.
    frame = f'<iframe id="frame" width="{width}" height="900" srcdoc="{escape(page)}"></iframe>'
    (tmp_path / "page.html").write_text(f"<body>{frame}<script>{COUNT_LINES}</script>")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'browser'}"),
        *("--dump-dom", (tmp_path / "page.html").as_uri()),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    lines = re.findall(r"([^\s>]+) on (\d+) lines", shown)
    assert {name for name, _ in lines} == {"full", "for", *names.values()}  # "asked for"
    assert {number for _, number in lines} == {"1"}


COUNT_LINES = """
onload = () => {
  const page = document.getElementById("frame").contentDocument;
  document.body.textContent = [...page.querySelectorAll("tbody th")].map((name) => {
    const range = page.createRange();
    range.selectNodeContents(name);
    const tops = new Set([...range.getClientRects()].map((box) => box.top));
    return `${name.textContent} on ${tops.size} lines`;
  }).join(", ");
};
"""


def test_budgets_in_shares_get_a_chart_of_their_own() -> None:
    shares = make_rows().replace({"budget": {"256": "10%", "512": "50%"}})
    rows = pd.concat([make_rows(), shares[shares["policy"] != "full"]])
    text = page_of(rows).text
    assert "Score by budget (tokens)" in text
    assert "Score by budget (% of the prompt)" in text


def test_times_taken_among_different_numbers_of_sequences_are_marked() -> None:
    rows = make_rows()
    rows.loc[rows["policy"] == "tova", "slots"] = 8
    assert "with at most 2 to 8 sequences side by side" in page_of(rows).text
    assert "with at most 1 sequence side by side" in page_of(rows.assign(slots=1)).text


def test_a_run_of_the_full_cache_alone_still_gives_a_page() -> None:
    rows = make_rows()
    page = page_of(rows[rows["policy"] == "full"])
    assert line_of(page, "full", "full")["score % [95 % interval]"].startswith("85.0")


def test_cells_that_only_failed_give_a_page() -> None:
    numbers = ["score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "decode_tokens_per_sec"]
    page = page_of(make_rows(status="error").assign(**dict.fromkeys(numbers)))
    assert "h2o, budget 256: 0 of 4 samples (4 error)" in page.text
    assert not page.all("img")


def test_the_same_rows_give_the_same_page(rows: pd.DataFrame) -> None:
    cells = compare_cells(rows)
    assert render(rows, cells, NOTHING) == render(rows.copy(), cells.copy(), NOTHING)


def write_cells(results_dir: Path, rows: pd.DataFrame) -> None:
    """The folders that runs of these rows would leave."""
    for (task, model, policy, budget), cell in rows.groupby(["task", "model", "policy", "budget"]):
        folder = results_dir / "runs" / task / model / f"{policy}-{budget}-0"
        folder.mkdir(parents=True)
        names = {"task": task, "model": model, "policy": policy, "budget": budget}
        manifest = {
            "identity": {key: {"name": name} for key, name in names.items()}
            | {"device": "cpu", "dtype": "float32", "attention": "sdpa"},
            "started": "2026-01-02T03:04:05+00:00",
            "argv": ["/home/someone/run.py", "-m", "policy=glob(*)"],
            "git": {"commit": "0123456789abcdef", "dirty": policy == "h2o"},
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "flash-attn": None},
            "machine": {"platform": "Linux", "cpus": 2 if policy == "full" else 4},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "status.json").write_text(json.dumps({"num_planned": 4}))
        with (folder / "samples.jsonl").open("w") as stream:
            for row in cell.assign(references=[["right"]] * len(cell)).to_dict("records"):
                stream.write(json.dumps(row) + "\n")


def test_provenance_names_commit_device_dates_versions_and_commands(tmp_path: Path) -> None:
    write_cells(tmp_path, make_rows())
    paths = sorted((tmp_path / "runs" / "qa" / "toy").iterdir())
    provenance = describe_cells(paths)
    full, h2o = provenance["lines"][0], provenance["lines"][1]
    assert full == [
        "qa/toy/full-full-0",
        "2026-01-02T03:04:05",
        "0123456789ab",
        "cpu",
        "float32",
        "sdpa",
        "E1",
        "C1",
    ]
    assert h2o[2:] == ["0123456789ab + changes", "cpu", "float32", "sdpa", "E2", "C1"]
    assert provenance["commands"] == {"kvarena -m 'policy=glob(*)'": "C1"}
    assert list(provenance["environments"].values()) == ["E1", "E2"]
    first = next(iter(provenance["environments"]))
    assert first == "Python 3.11.7, torch 2.13.0, no accelerator, 2 CPU cores, Linux"


@pytest.mark.usefixtures("no_pictures")
def test_the_page_is_written_beside_the_runs(tmp_path: Path) -> None:
    write_cells(tmp_path, make_rows())
    folder = tmp_path / "runs" / "qa" / "toy"
    (folder / "snapkv-256-0").mkdir()
    (folder / "snapkv-256-0" / "manifest.json").write_text("{}")
    assert write_report(tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "toy/snapkv-256-0: begun, no samples yet" in page.text
    assert str(tmp_path) not in text
    assert "/home/someone" not in text


def test_a_folder_without_rows_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["html_report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        html_page.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "no rows" in error
    assert error.count("\n") == 1


def test_pictures_are_whole_files(page: Page) -> None:
    for picture in page.all("img"):
        kind, _, data = picture["src"].partition(";base64,")
        start = {"data:image/svg+xml": b"<?xml", "data:image/png": b"\x89PNG"}[kind]
        assert base64.b64decode(data, validate=True).startswith(start)
