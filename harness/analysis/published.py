"""Figures that papers published, put beside this project's own cells.

The figures are CSV files in ``results/published/``, whose README describes columns and grades. A
figure stands beside a cell only where task, parts, model, policy and budget are the same; in what
its protocol differs is told in its line, and nothing is corrected for it.
"""

import math
from functools import cache
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.comparison import Line
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import choices, load_choice, named_class
from kvarena.tasks.base import Task

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"
COLUMNS = [
    "paper", "url", "table", "model", "task", "part", "metric", "policy", "budget", "chunk",
    "value", "unit", "protocol", "confidence", "note",
]  # fmt: skip
GRADES = ("P", "A", "S", "K")  # best first: paper, abstract or caption, summary, knowledge
SCORE_SCALE = {"percent": 0.01, "share": 1.0}  # what makes a score 0 to 1
UNKNOWN = "not stated"  # a model or task that the source does not name; it equals no other

# What must be equal for two scores to be comparable.
Identity = tuple[str, frozenset[str], str, str, str]


def load_published(folder: Path = PUBLISHED) -> pd.DataFrame:
    """All figures in ``folder``: ``COLUMNS`` as text, but ``value`` as a float in its own unit.

    None where there is no such folder, as in an installed wheel.
    """
    tables = [
        pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS].astype({"value": float})
        for path in sorted(folder.glob("*.csv"))
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def with_parts(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``cells`` with a column ``part``: the parts that each score is over, with commas between.

    rows: the samples behind the cells; those with status "ok" count. "" for a task without parts,
    and for sample data, which is no benchmark's.
    """
    cell = ["task", "model", "variant", "policy", "budget"]
    rows = rows[rows["status"] == "ok"]
    rows = rows.assign(**{name: "" for name in ("variant", "part") if name not in rows})
    if "meta_is_sample" in rows:
        rows = rows.assign(part=rows["part"].mask(rows["meta_is_sample"].eq(True), ""))
    parts = rows.groupby(cell)["part"].agg(lambda names: ",".join(sorted(set(names) - {""})))
    joined = cells.drop(columns="part", errors="ignore").join(parts, on=cell)
    return joined.fillna({"part": ""})


def beside(cells: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """``cells`` with what was published for the same thing, empty where nothing was.

    cells: one line per cell with task, model, policy, budget and score (0 to 1), and ``part`` as
    ``with_parts`` adds it; without it a LongBench average has no equal. published: as loaded; None:
    all that comes with kvarena. Adds ``published`` (0 to 1), ``published_source`` (paper and
    table), ``published_confidence`` (one of ``GRADES``; of several papers' figures the best graded
    is taken) and ``published_difference`` (score minus published). Raises UsageError for a missing
    column, a budget outside the grammar and a part that LongBench does not have.
    """
    missing = [name for name in ("task", "model", "policy", "budget", "score") if name not in cells]
    if missing:
        raise UsageError(f"cells lack the columns {', '.join(missing)} (see results/README.md)")
    figures = load_published() if published is None else published
    scores = figures[(figures["metric"] == "score") & (figures["budget"] != "")]
    ranked = scores.sort_values("confidence", key=lambda grades: grades.map(GRADES.index))
    best: dict[Identity, Line] = {}
    for figure in ranked.to_dict("records"):
        if UNKNOWN not in (figure["model"], figure["task"]):
            best.setdefault(_identity(figure), figure)
    found = [best.get(_identity(cell)) for cell in cells.to_dict("records")]
    values = [f["value"] * SCORE_SCALE[f["unit"]] if f else math.nan for f in found]
    return cells.assign(
        published=values,
        published_source=[f"{f['paper']}, {f['table']}" if f else "" for f in found],
        published_confidence=[f["confidence"] if f else "" for f in found],
        published_difference=cells["score"].astype(float) - values,
    )


def _identity(line: Line) -> Identity:
    task, model = str(line["task"]), _model(str(line["model"]))
    budget = parse_budget(str(line["budget"])).label  # one label for 2k and 2048
    return task, _parts(task, str(line.get("part", ""))), model, str(line["policy"]), budget


def _parts(task: str, part: str) -> frozenset[str]:
    read = Task.parts
    if task in choices("task"):
        read = named_class(load_choice("task", task)["_target_"], Task).parts  # type: ignore[attr-defined]
    try:
        return read(part)
    except ValueError as error:
        raise UsageError(f"part: {error}") from error


@cache
def _presets() -> dict[str, str]:
    """Names of models without owner and in small letters, with the preset of each."""
    sources = {name: str(load_choice("model", name)["source"]) for name in choices("model")}
    return {source.rpartition("/")[2].casefold(): name for name, source in sources.items()}


def _model(name: str) -> str:
    """One name for a preset and for the model on the hub that it stands for."""
    plain = name.rpartition("/")[2].casefold()
    return _presets().get(plain, plain)
