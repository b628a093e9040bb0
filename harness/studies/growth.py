"""A picture of what length costs: ``python -m kvarena.harness.studies.growth``.

Draws results/bench/growth.svg from growth.csv beside it, which ``make growth`` measures first.
"""

import argparse
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.harness.entry import one_line_errors
from kvarena.harness.files import replacing
from kvarena.harness.report import budget_charts
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies.reference import REPOSITORY

FOLDER = REPOSITORY / "results" / "bench"
LABELS = {
    ("kvarena", "keydiff"): "kvarena, keydiff",
    ("kvarena", "full"): "kvarena, full cache",
    ("generate", "full"): "generate",
    ("dynamic_cache", "full"): "model over a DynamicCache",
}
OTHERS = {"generate": "#3355aa", "dynamic_cache": "#888888"}
MARKERS = {"kvarena": "o", "generate": "s", "dynamic_cache": "^"}
PANELS = (
    ("ttft_sec", "time to first token, s"),
    ("peak_extra_bytes", "peak memory, MB"),
    ("pass_sec", "decoding step, ms"),
)


def main() -> None:
    """Draw it from the recorded file."""
    argparse.ArgumentParser(
        prog="python -m kvarena.harness.studies.growth", description=__doc__
    ).parse_args()
    with one_line_errors():
        drawn = picture(pd.read_csv(FOLDER / "growth.csv"))
        with replacing(FOLDER / "growth.svg") as path:
            path.write_bytes(drawn)


def picture(measured: pd.DataFrame) -> bytes:
    """Three panels with logarithmic axes: prompts in time and memory, then decoding steps."""
    with budget_charts.default_settings():
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        # What the engine has read, or what a cache that keeps everything holds.
        measured = measured.assign(
            tokens=measured["prompt_tokens"].fillna(measured["cache_tokens"])
        )
        measured = measured[measured["section"].isin(["length", "cache"])]
        for axes, (metric, name) in zip(panels, PANELS, strict=True):
            lines = measured[measured["metric"] == metric]
            scale = {"peak_extra_bytes": 1e-6, "pass_sec": 1e3}.get(metric, 1.0)
            for system, policy in LABELS:
                own = lines[(lines["system"] == system) & (lines["policy"] == policy)]
                if not own.empty:
                    _line(axes, system, policy, own.sort_values("tokens"), scale)
            axes.set(xscale="log", yscale="log", xlabel="tokens of text so far", title=name)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            axes.grid(color="#dddddd", lw=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        for system, policy in LABELS:  # one legend for all panels, which do not have the same lines
            panels[0].plot([], [], label=LABELS[system, policy], **_style(system, policy))
        return budget_charts.as_svg(figure)


def _line(axes: Axes, system: str, policy: str, own: pd.DataFrame, scale: float) -> None:
    """Medians, with the quartiles as a band."""
    style = _style(system, policy)
    axes.plot(own["tokens"], own["median"] * scale, **style)
    limits = own["q1"] * scale, own["q3"] * scale
    axes.fill_between(own["tokens"], *limits, color=style["color"], alpha=0.2, lw=0)


def _style(system: str, policy: str) -> dict[str, Any]:  # Any: matplotlib's own options
    colour = policy_style(policy).colour if system == "kvarena" else OTHERS[system]
    return {"color": colour, "marker": MARKERS[system], "ms": 4, "lw": 1}


if __name__ == "__main__":
    main()
