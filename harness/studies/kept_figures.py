"""Figures of what policies keep and of where keys point, as PNG, from the tables of kept_tokens.py.

Colours are those of harness/report/policy_styles.py. The same tables give the same bytes.
"""

import io
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvarena.harness.report.budget_charts import default_settings
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies.kept_overlap import masks

WIDTH_IN = 7.6
BIN_TOKENS = 8  # of a prompt to one place of a map
QUERIES = {"prompt": "queries: end of the prompt", "answer": "queries: the answer"}


def kept_map(kept: pd.DataFrame, samples: pd.DataFrame, sample_id: str) -> bytes:
    """One map per policy: heads, by layer, against the position in the prompt (chunked)."""
    own = kept[(kept["sample_id"] == sample_id) & (kept["prefill"] == "chunked")]
    sample = samples.set_index("sample_id").to_dict("index")[sample_id]
    cells = {policy: mask for (_, policy, _), mask in masks(own, samples).items()}
    with default_settings():
        figure, panels = _panels(len(cells), per_line=3, height_in=2.0, sharex=True, sharey=True)
        for axes, (policy, mask) in zip(panels, cells.items(), strict=True):
            num_layers, num_heads, num_tokens = mask.shape
            starts = np.arange(0, num_tokens, BIN_TOKENS)
            sizes = np.diff(np.append(starts, num_tokens))
            share = np.add.reduceat(mask.astype(float), starts, axis=-1) / sizes
            image = axes.imshow(
                share.reshape(num_layers * num_heads, -1),
                extent=(0, num_tokens, num_layers, 0),
                aspect="auto",
                interpolation="nearest",
                cmap="Greys",
                vmin=0,
                vmax=1,
            )
            end = sample["needle_first_token"] + sample["num_needle_tokens"]
            for place in (sample["needle_first_token"], end):
                axes.axvline(place, color="#D55E00", lw=0.8)
            axes.set_title(policy, loc="left")
        figure.colorbar(image, ax=panels, shrink=0.6, label="share of tokens kept")
        return _finish(figure, "position in the prompt (tokens)", "layer (one line per KV head)")


def overlap_map(overlap: pd.DataFrame) -> bytes:
    """Mean Jaccard index of each two policies (lines) in each layer (columns)."""
    names = overlap["policy"] + " / " + overlap["other"]
    grid = overlap.assign(pair=names).pivot_table(index="pair", columns="layer", values="jaccard")
    grid = grid.loc[grid.mean(axis=1).sort_values(ascending=False).index]
    with default_settings():
        figure, [axes] = _panels(1, per_line=1, height_in=0.6 + 0.19 * len(grid))
        image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axes.set_yticks(
            range(len(grid)),
            [f"{pair}  {mean:.2f}" for pair, mean in grid.mean(axis=1).items()],
        )
        axes.set_title("kept tokens in common, by layer", loc="left")
        bar = figure.colorbar(image, ax=axes, label="Jaccard index (mean over heads)")
        bar.ax.axhline(overlap["chance"].mean(), color="white", lw=2)
        return _finish(figure, "layer", "two policies, mean over layers")


def prefill_lines(overlap: pd.DataFrame) -> bytes:
    """Share of tokens in common between true chunks and one late pruning, by layer."""
    with default_settings():
        figure, [axes] = _panels(1, per_line=1, height_in=2.8)
        for policy, lines in overlap.groupby("policy"):
            _line(axes, str(policy), 100 * lines.groupby("layer")["shared"].mean())
        chance = 100 * overlap["chance"].mean()
        axes.axhline(chance, color="black", ls=":", lw=1, label="picked at random")
        axes.set_ylim(0, 103)
        axes.set_title("budget held after every chunk, and pruned once at the end", loc="left")
        _legend(figure, axes)
        return _finish(figure, "layer", "kept tokens in common (%)")


def needle_lines(shares: pd.DataFrame) -> bytes:
    """What is left of the needle after each chunk, one panel per prompt (chunked)."""
    chunked = shares[shares["prefill"] == "chunked"]
    prompts = chunked.groupby(["length_target", "depth_target"])
    with default_settings():
        figure, panels = _panels(prompts.ngroups, per_line=3, height_in=1.7, sharey=True)
        for axes, ((length, depth), prompt) in zip(panels, prompts, strict=True):
            for policy, lines in prompt.groupby("policy"):
                _line(axes, str(policy), 100 * lines.set_index("seen_tokens")["share"])
            axes.axvline(prompt["needle_first_token"].iloc[0], color="#777777", lw=1, ls="--")
            axes.set_title(f"{length} tokens, needle at {depth:.0f} %", loc="left")
            axes.set(xlim=(0, 1.03 * prompt["prompt_tokens"].max()), ylim=(0, 105))
        _legend(figure, panels[0])
        return _finish(figure, "tokens read", "needle tokens held (%)")


def correlation_dots(agreement: pd.DataFrame) -> bytes:
    """Spearman correlation of cosine and attention: a dot per head and prompt, means joined."""
    with default_settings():
        figure, panels = _panels(2, per_line=2, height_in=2.4, sharey=True)
        for axes, (queries, title) in zip(panels, QUERIES.items(), strict=True):
            own = agreement[agreement["queries"] == queries]
            # Heads stand side by side within their layer.
            x = own["layer"] + 0.22 * (own["head"] - own["head"].max() / 2)
            axes.scatter(x, own["correlation"], s=4, color="#0072B2", alpha=0.45, lw=0)
            means = own.groupby("layer")["correlation"].mean()
            axes.plot(means.index, means, color="#D55E00", lw=1.2, label="mean of a layer")
            axes.axhline(0, color="black", lw=0.8)
            axes.set_title(title, loc="left")
            axes.set_ylim(-1, 1)
        _legend(figure, panels[0])
        return _finish(figure, "layer", "Spearman correlation\nof cosine and attention")


def share_lines(agreement: pd.DataFrame) -> bytes:
    """Attention on the most distinct keys, the best possible choice and chance, by layer."""
    names = {
        "top_share": ("most attended keys", "#000000"),
        "distinct_share": ("lowest cosine to the mean key", "#D55E00"),
        "chance_share": ("picked at random", "#777777"),
    }
    with default_settings():
        figure, panels = _panels(2, per_line=2, height_in=2.2, sharey=True)
        for axes, (queries, title) in zip(panels, QUERIES.items(), strict=True):
            own = agreement[agreement["queries"] == queries]
            for name, (label, colour) in names.items():
                by_layer = 100 * own.groupby("layer")[name].agg(["mean", "min", "max"])
                axes.plot(by_layer.index, by_layer["mean"], color=colour, lw=1.3, label=label)
                axes.fill_between(
                    by_layer.index, by_layer["min"], by_layer["max"], color=colour, alpha=0.1, lw=0
                )
            axes.set_title(title, loc="left")
            axes.set_ylim(0, 103)
        _legend(figure, panels[0])
        return _finish(figure, "layer", "attention on the kept keys (%)\nfirst token left out")


def key_dots(keys: pd.DataFrame, heads: Iterable[tuple[int, int]]) -> bytes:
    """Attention by cosine, a dot per key, in a few (layer, head)."""
    chosen = list(heads)
    with default_settings():
        figure, panels = _panels(len(chosen), per_line=len(chosen), height_in=2.2)
        for axes, (layer, head) in zip(panels, chosen, strict=True):
            own = keys[(keys["layer"] == layer) & (keys["head"] == head)]
            axes.scatter(own["cosine"], own["answer_attention"], s=5, color="#0072B2", alpha=0.5)
            first = own[own["position"] == 0]
            axes.plot(first["cosine"], first["answer_attention"], "*", color="#D55E00", ms=9)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
            axes.set_title(f"layer {layer}, head {head}", loc="left")
        return _finish(figure, "cosine to the mean key", "attention from the answer")


def _panels(
    num: int, *, per_line: int, height_in: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """``num`` axes, ``per_line`` of them side by side, each ``height_in`` high."""
    num_lines = -(-num // per_line)
    figure = Figure(figsize=(WIDTH_IN, height_in * num_lines + 0.5), layout="constrained")
    grid = figure.subplots(num_lines, per_line, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in grid.flat[num:]:
        axes.remove()
    return figure, list(grid.flat[:num])


def _line(axes: Axes, policy: str, values: pd.Series) -> None:
    style = policy_style(policy)
    axes.plot(
        values.index, values, color=style.colour, marker=style.marker, ms=3, lw=1, label=policy
    )


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _finish(figure: Figure, xlabel: str, ylabel: str) -> bytes:
    """The figure as a file, its axes labelled once."""
    figure.supxlabel(xlabel, fontsize=8)
    figure.supylabel(ylabel, fontsize=8)
    stream = io.BytesIO()
    # Without the version of the program, the drawn data are all that counts.
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
