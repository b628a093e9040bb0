"""A new policy, shape, codec or task is one file and one yaml: the proof, on a copy with more.

The copy is tried in a process of its own, since kvarena is already imported in this one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import kvarena.codecs
import kvarena.conf
import kvarena.harness
import kvarena.policies
import kvarena.shapes
import kvarena.tasks
from toy_folder import toy_overrides

TESTS = Path(__file__).parent
COPIED_TESTS = ("test_policies", "test_engine", "test_replay", "test_check_policy")
POLICY = '''
"""Middle out: tokens in the middle of the kept text go first.

Paper: none, https://example.org. Differs from the paper: nothing.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Policy


@dataclass(kw_only=True)
class MiddleOut(Policy):
    """centre: share of the kept text that the rule calls its middle."""

    centre: float = 0.5

    def score(self, view: LayerView) -> Tensor:
        first, last = view.positions.aminmax(dim=-1, keepdim=True)
        return (view.positions - (first + self.centre * (last - first))).abs()
'''
YAML = """
_target_: kvarena.policies.middle_out.MiddleOut
sinks: 0      # first tokens of the text that are never evicted
recent: 0     # newest tokens that are never evicted
centre: 0.5   # 0: the first kept token, 1: the last
"""
SHAPE = '''
"""Bottom: the first layer keeps half as much again, and the others pay for it.

Paper: none, https://example.org. Differs from the paper: nothing.
"""

from dataclasses import dataclass

from kvarena.shapes.base import Shape


@dataclass(kw_only=True)
class Bottom(Shape):
    """extra: share of the budget that the first layer gets on top."""

    extra: float = 0.5

    def layer_tokens(self, budget_tokens, protected_tokens, layer, num_layers):
        more = round(self.extra * budget_tokens / (num_layers - 1)) * (num_layers - 1)
        return budget_tokens + (more if layer == 0 else -more // (num_layers - 1))
'''
SHAPE_YAML = """
_target_: kvarena.shapes.bottom.Bottom
extra: 0.5   # share of the budget that the first layer gets on top
"""
CODEC = (TESTS / "lossless.py").read_text()
CODEC_YAML = """
_target_: kvarena.codecs.lossless.Lossless
window: 16   # newest tokens of each head that stay as they are
block: 16    # tokens coded at once
weighs: false
"""
TASK = '''
"""Recall: say the word that stands between many others.

Benchmark: none, https://example.org.
"""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from kvarena.harness.column import Column
from kvarena.tasks.base import Sample, Task, content_id


@dataclass(kw_only=True)
class Recall(Task):
    """num_words: how many stand before the question."""

    name: ClassVar[str] = "recall"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = (Column("meta_place", int, "", "of the word"),)

    num_words: int = 40

    def samples(self, tokenizer, seed, limit=None):
        words = [f"w{seed + n}" for n in range(self.num_words)]
        prompt = tuple(tokenizer.encode(" ".join(words) + ". Which one?"))
        return [
            Sample(
                id=content_id("recall", seed, place),
                prompt_token_ids=prompt,
                references=(words[place],),
                max_new_tokens=4,
                meta={"place": place},
            )
            for place in (0, self.num_words // 2)[:limit]
        ]

    def score(self, sample, text, *, finished=True):
        return {"score": float(sample.references[0] in text)}

    @classmethod
    def summaries(cls, rows):
        return {"by-place": rows.groupby("meta_place", as_index=False)["score"].mean()}
'''
TASK_YAML = """
_target_: kvarena.tasks.recall.Recall
num_words: 40
"""
# A file that does not even import.
BROKEN = """
from kvarena.policies.base import Policy


class Broken(Polcy):
    pass
"""
SCRIPT = """
import json, sys
from contextlib import redirect_stdout
from pathlib import Path
import pytest
from hydra.core.global_hydra import GlobalHydra
from kvarena.harness import registry
from kvarena.harness.bench import sizes
from kvarena.harness.command import run
from kvarena.harness.command.overrides import prepare_arguments
from kvarena.harness.report.html_page import write_report
from kvarena.harness.store.columns import columns_of_tasks
from kvarena.harness.studies import kept_tokens
from kvarena.harness.testing import check_policy

here = Path(sys.argv[1])
arguments = sys.argv[2:]


def said(name, command):
    with (here / f"{name}.txt").open("w") as text, redirect_stdout(text):
        try:
            command()
        except SystemExit as stop:
            print("exit code", stop.code)


def kvarena(*arguments):
    GlobalHydra.instance().clear()
    sys.argv = ["kvarena", *arguments]
    run.main()

built = registry.build(registry.load_choice("policy", "middle_out"))
known = {"choices": registry.choices("policy"), "class": type(built).__name__,
         "file": registry.__file__, "options": vars(built),
         "benches": sizes.DEFAULT.with_policies("middle_out").evicting(see_attention=False),
         "studies": kept_tokens.evicting_policies(),
         "policy=all": prepare_arguments(["-m", "policy=all"])[1],
         "columns": [column.name for column in columns_of_tasks()]}
(here / "known.json").write_text(json.dumps(known))
said("list", registry.main)
new = [next(text for text in arguments if text.startswith("model=")), "task=recall", "budget=64",
       "policy=middle_out", "shape=bottom", "codec=lossless",
       f"results_dir={here / 'new'}"]
said("plan", lambda: kvarena("mode=plan", *new))
said("run", lambda: kvarena(*new))
write_report(here / "new")
broken = next(here.glob("site/kvarena/conf/policy/broken.*"))
broken.rename(broken.with_suffix(".yaml"))
for name in ("middle_out", "broken"):
    sys.argv = ["check_policy", name]
    said(name, check_policy.main)
kvarena("-m", *arguments, "policy=glob(m*)", "policy.centre=0.5,0.6")
sys.exit(pytest.main([str(here / "tests"), "-k", "middle_out", "-p", "no:cacheprovider",
                      f"--junitxml={here / 'tests.xml'}"]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy, used once: listed, built, planned, run and tested, with the outcomes in files."""
    folder = tmp_path_factory.mktemp("add_policy")
    package = folder / "site" / "kvarena"
    no_caches = shutil.ignore_patterns("__pycache__")
    kinds = (kvarena.policies, kvarena.shapes, kvarena.codecs, kvarena.tasks)
    for module in (kvarena.harness, kvarena.conf, *kinds):
        name = module.__name__.removeprefix("kvarena.")
        shutil.copytree(module.__path__[0], package / name, ignore=no_caches)
    for place, text in {
        "policies/middle_out.py": POLICY,
        "conf/policy/middle_out.yaml": YAML,
        "shapes/bottom.py": SHAPE,
        "conf/shape/bottom.yaml": SHAPE_YAML,
        "codecs/lossless.py": CODEC,
        "conf/codec/lossless.yaml": CODEC_YAML,
        "tasks/recall.py": TASK,
        "conf/task/recall.yaml": TASK_YAML,
    }.items():
        (package / place).write_text(text.lstrip())
    (package / "policies" / "broken.py").write_text(BROKEN.lstrip())
    broken = "_target_: kvarena.policies.broken.Broken\n"
    (package / "conf" / "policy" / "broken.later").write_text(broken)

    (folder / "tests").mkdir()
    for name in (*COPIED_TESTS, "toys", "conftest"):
        shutil.copy(TESTS / f"{name}.py", folder / "tests")
    shutil.copy(TESTS.parent / "pyproject.toml", folder)

    overrides = [*toy_overrides(folder), f"results_dir={folder / 'results'}"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def known(site: Path) -> dict[str, Any]:  # Any: JSON values
    return json.loads((site / "known.json").read_text())


def test_it_is_listed_and_built(site: Path) -> None:
    assert Path(known(site)["file"]).is_relative_to(site)
    assert "middle_out" in known(site)["choices"]
    assert known(site)["class"] == "MiddleOut"
    assert known(site)["options"] == {"sinks": 0, "recent": 0, "centre": 0.5}


def test_benches_studies_and_all_policies_take_it_in(site: Path) -> None:
    for place in ("benches", "studies", "policy=all"):
        assert "middle_out" in known(site)[place], place


def test_the_list_names_each_of_them_with_their_first_lines(site: Path) -> None:
    listed = dict(line.split(maxsplit=1) for line in (site / "list.txt").open() if line[0] == " ")
    assert listed["middle_out"].startswith("Middle out: tokens in the middle")
    assert listed["bottom"].startswith("Bottom: the first layer keeps half as much again")
    assert listed["lossless"].startswith("A codec that loses nothing")
    assert listed["recall"].startswith("Recall: say the word")


def test_a_plan_and_a_run_take_all_of_them_together(site: Path) -> None:
    plan, ran = ((site / f"{name}.txt").read_text() for name in ("plan", "run"))
    assert re.search(
        r"recall, toy\n(.*\n)*middle_out\(shape=bottom\)\+lossless +64 +missing +0/2 ", plan
    ), plan
    assert re.search(r"recall, toy\n(.*\n)*middle_out\(shape=bottom\)\+lossless +64 ", ran), ran
    assert "exit code" not in plan + ran
    (path,) = site.glob("new/runs/recall/toy/*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert {(row["policy"], row["codec"]) for row in rows} == {
        ("middle_out(shape=bottom)+lossless", "lossless")
    }
    assert {row["shape"] for row in rows} == {"bottom"}
    assert sorted(row["meta_place"] for row in rows) == [0, 20]


def test_tables_columns_and_report_have_what_the_task_adds(site: Path) -> None:
    table = (site / "new" / "tables" / "recall-by-place.csv").read_text().splitlines()
    assert table[0].startswith("meta_place,score")
    assert len(table) == 3
    assert "meta_place" in known(site)["columns"]
    page = (site / "new" / "report.html").read_text()
    assert "recall, toy" in page
    assert "middle_out(shape=bottom)+lossless" in page


def test_it_keeps_what_the_engine_relies_on(site: Path) -> None:
    lines = (site / "middle_out.txt").read_text().splitlines()
    assert [line for line in lines[:-2] if not line.startswith("ok ")] == []
    assert lines[-2:] == ["11 ok", "exit code 0"]


def test_a_file_that_does_not_import_is_told_with_its_line(site: Path) -> None:
    first, *others = (site / "broken.txt").read_text().splitlines()
    assert first == (
        "FAILED   import         NameError: name 'Polcy' is not defined; wanted: a file that "
        "imports; look at site/kvarena/policies/broken.py:4"
    )
    assert others == ["1 FAILED", "exit code 1"]


def test_the_command_line_sweeps_it_and_its_option(site: Path) -> None:
    rows = [
        json.loads(line)
        for path in site.glob("results/runs/needle/toy/*/samples.jsonl")
        for line in path.read_text().splitlines()
    ]
    found = sorted((row["policy"], row["budget"], row["status"]) for row in rows)
    assert found == [("middle_out", "64", "ok")] * 2 + [("middle_out(centre=0.6)", "64", "ok")] * 2
    assert {row["budget_tokens"] for row in rows} == {64}
    assert (site / "results" / "plots" / "needle" / "toy" / "middle_out-64.png").exists()


def test_the_tests_for_all_policies_test_it(site: Path) -> None:
    cases = ElementTree.parse(site / "tests.xml").getroot().iter("testcase")
    outcomes = {
        (case.get("classname").rpartition(".")[2], case.get("name")): [child.tag for child in case]
        for case in cases
    }
    assert {module for module, _ in outcomes} == set(COPIED_TESTS)
    assert all("middle_out" in name for _, name in outcomes)
    assert len(outcomes) >= 20
    assert not any(outcomes.values()), "failed, in error or skipped"
