"""What README, CONTRIBUTING and the pages beside results say is what the files say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from kvarena.harness.analysis.row_frame import recorded_rows, without_texts
from kvarena.harness.command import overrides
from kvarena.harness.studies import score_protection_shape as study
from kvarena.harness.studies.reference import REFERENCE, REPOSITORY, with_table

README = (REPOSITORY / "README.md").read_text()
RESULTS = REPOSITORY / "results"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(RESULTS.glob("README.md")),
    *sorted(RESULTS.glob("*/README.md")),
]
# Made by their studies alone, whose tests hold them to the rows.
OWN_TABLES = (
    "score-protection",
    "score-protection-shape",
    "shared-contexts",
    "needle-lengths",
    "needle-lengths pairs",
)
TABLES = [
    (page, task)
    for page in PAGES
    for task in re.findall(r"<!-- ([\w -]+) table: begin -->", page.read_text())
    if task not in OWN_TABLES
]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize(("page", "task"), TABLES)
def test_a_table_comes_from_the_committed_summary(page: Path, task: str) -> None:
    text = page.read_text()
    folder = RESULTS / task if task == "equal-bytes" else REFERENCE
    assert with_table(text, task, folder / f"{task}-summary.csv") == text
    section = text.split(f"<!-- {task} table: begin -->")[1].split("<!--")[0]
    assert section.count("| keydiff |") >= 1


def test_the_readme_has_one_measured_table_of_the_recorded_study() -> None:
    assert re.findall(r"<!-- (\S+) table: begin -->", README) == ["score-protection"]
    rows = recorded_rows(study.FOLDER / f"{study.NAME}.csv")
    table = README.split("table: begin -->\n")[1].split("<!--")[0]
    assert table == study.overview(study.summarise(rows))


def test_no_text_of_a_benchmark_is_in_the_reference_rows() -> None:
    for path in [*REFERENCE.glob("*.csv"), *(RESULTS / "equal-bytes").glob("*.csv")]:
        rows = pd.read_csv(path)
        assert without_texts(rows).columns.tolist() == rows.columns.tolist(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_links_or_names_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    folders = "harness|policies|codecs|tasks|conf|tests|notebooks"
    named = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w", text)
    for path in named:
        # NAME stands for what the reader adds, and so does the README's own example.
        if "NAME" not in path and "large_values" not in path:
            assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=name_of)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    dotted = r"kvarena\.((?:harness|policies|codecs|tasks)[\w.]*\w)"
    for module in set(re.findall(dotted, page.read_text())) - {"policies.large_values.LargeValues"}:
        path = REPOSITORY / module.replace(".", "/")
        of_attribute = path.parent.with_suffix(".py")
        assert path.is_dir() or path.with_suffix(".py").exists() or of_attribute.exists(), module


COMMANDS = sorted(
    {
        line
        for page in PAGES
        for line in re.findall(r"^(?:kvarena|make) \w.*", page.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kvarena ")])
def test_every_kvarena_command_is_one_that_is_accepted(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it names need not be installed here, nor lie where the README says.
    monkeypatch.setattr(overrides, "check_launcher", lambda name, **_: None)
    monkeypatch.setattr(overrides, "check_location", lambda source: None)
    arguments = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    assert overrides.prepare_arguments(arguments)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_every_make_command_is_one_that_is_accepted(line: str) -> None:
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [words[0], "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readmes_library_example_works_as_printed() -> None:
    code = re.search(r"As a library:\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([3, ") == 2


@pytest.mark.slow
def test_the_oracle_checks_another_engine_as_printed() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    code = re.search(r"cut by hand:\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    late = code.replace("del kept[SINKS]", "del kept[SINKS + 1]")  # told another token than goes
    for source, is_right in ((code, True), (late, False)):
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        difference, most, neighbours = map(float, done.stdout.split())
        assert (difference < 1e-3) is is_right
        assert (most, neighbours) == (24, 0)


def test_the_readmes_policy_works_as_printed(tmp_path: Path) -> None:
    """The ten lines of the README, run as a policy on a toy model."""
    code = re.search(r"`policies/large_values.py`:\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "large_values.py").write_text(code)
    script = (
        "from large_values import LargeValues\n"
        "from toys import toy_model, toy_prompt\n"
        "from kvarena.harness.engine import Engine\n"
        "engine = Engine(toy_model(), LargeValues(), budget_tokens=32, chunk_tokens=16)\n"
        "(g,) = engine.generate([toy_prompt(90)], max_new_tokens=5, record_kept=True)\n"
        "assert all(p.shape[1] == 32 for p in g.kept_positions)\n"
        "assert g.kept_positions[0].tolist() != g.kept_positions[1].tolist()\n"
        "from kvarena.harness.testing.contract import check_policy\n"
        "assert {finding.verdict for finding in check_policy(LargeValues)} == {'ok'}\n"
    )
    path = f"{tmp_path}:{Path(__file__).parent}"
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, check=True)
