"""Figures that papers published, checked line by line, and put beside this project's own cells.

The figures are CSV files in ``results/published/``, whose README describes columns and grades. A
figure stands beside a cell only where task, parts, model, policy and budget are the same; in what
its protocol differs is told in its line, and nothing is corrected for it.
"""

import csv
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.comparison import Line
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import choices, load_choice, named_class, one_of
from kvarena.tasks.base import Task

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"
# Those with True must not be empty.
COLUMNS = {
    "paper": True, "url": True, "table": True, "model": True, "task": True, "part": False,
    "metric": True, "policy": True, "budget": False, "chunk": False, "value": True, "unit": True,
    "protocol": True, "confidence": True, "note": False,
}  # fmt: skip
GRADES = ("P", "A", "S", "K")  # best first: paper, abstract or caption, summary, knowledge
UNITS = ("percent", "share", "points", "x", "tokens/s")
SCORE_SCALE = {"percent": 0.01, "share": 1.0}  # what makes a score 0 to 1
# No two lines agree in all of these.
ONCE = ("paper", "table", "model", "task", "part", "metric", "policy", "budget")
UNKNOWN = "not stated"  # a model or task that the source does not name; it equals no other

# What must be equal for two scores to be comparable.
Identity = tuple[str, frozenset[str], str, str, str]


def load_published(folder: Path = PUBLISHED) -> pd.DataFrame:
    """All figures in ``folder``: ``COLUMNS`` as text, but ``value`` as a float in its own unit.

    Raises UsageError that names file and line for a line that breaks a rule of the README, and for
    a figure that a paper's table has twice.
    """
    figures: list[dict[str, str | float]] = []
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream)
            if next(lines, None) != list(COLUMNS):
                raise UsageError(f"{path} line 1 must name the columns {','.join(COLUMNS)}")
            for cells in lines:
                where = f"{path} line {lines.line_num}"
                if len(cells) != len(COLUMNS):
                    raise UsageError(f"{where} has {len(cells)} cells, {len(COLUMNS)} are needed")
                figure = dict(zip(COLUMNS, cells, strict=True))
                value = _checked(where, figure)
                key = tuple(figure[name] for name in ONCE)
                if key in seen:
                    raise UsageError(f"{where} is the figure of {seen[key]} again; keep one")
                seen[key] = where
                figures.append({**figure, "value": value})
    if not figures:
        raise UsageError(f"no figures in {folder}; take results/published of kvarena's repository")
    return pd.DataFrame(figures)


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


def _checked(where: str, figure: Mapping[str, str]) -> float:
    """The value of one line. Raises UsageError that begins with ``where``."""
    for name, text in figure.items():
        if text != text.strip() or (COLUMNS[name] and not text):
            raise UsageError(f"{where}: {name} must be a text without spaces around, got {text!r}")
    try:
        one_of("confidence", figure["confidence"], GRADES)
        one_of("unit", figure["unit"], UNITS)
        if figure["budget"]:
            parse_budget(figure["budget"])
        parts = _parts(figure["task"], figure["part"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if not figure["url"].startswith("https://"):
        raise UsageError(f"{where}: url must begin with https://, got {figure['url']!r}")
    if figure["chunk"] and not (figure["chunk"].isascii() and figure["chunk"].isdigit()):
        raise UsageError(f"{where}: chunk must be tokens or empty, got {figure['chunk']!r}")
    if figure["task"] == "longbench" and not parts:
        raise UsageError(f"{where}: part must say which LongBench tasks the figure is over")
    try:
        value = float(figure["value"])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: value must be a number, got {figure['value']!r}")
    if figure["metric"] == "score":
        scale = SCORE_SCALE.get(figure["unit"], math.nan)
        if not 0 <= value * scale <= 1:
            raise UsageError(
                f"{where}: a score must be 0 to 100 percent or a share of 0 to 1, "
                f"got {figure['value']} {figure['unit']}"
            )
    return value
