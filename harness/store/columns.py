"""Every column of rows and of their summary, declared once: name, type, unit, meaning.

To add one: a line here, and the code that measures it (harness/cells/sample_rows.py, or
fidelity_measures.py for forced answers). What a task tells of its own samples it declares itself,
in ``row_columns``. Lines of result files are checked against these declarations, Parquet and CSV
have their types, and ``make dictionary`` (``python -m kvarena.harness.store.columns``) writes the
tables of results/README.md from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from kvarena.harness.budget import parse_budget
from kvarena.harness.column import Column
from kvarena.harness.entry import one_line_errors
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.registry import choices, load_choice, named_class
from kvarena.tasks.base import READ_BY_REPORTS, Task

DICTIONARY = Path(__file__).resolve().parents[2] / "results" / "README.md"

# ---- every row ----

ROWS = (
    Column("task", str, "name", "what ran; options that change the questions are in the name"),
    Column("model", str, "name", "what ran"),
    Column(
        "policy",
        str,
        "name",
        "what ran, with its codec if there is one: `keydiff+kivi(bits=2)`; `keydiff@3fa9` where "
        "one name stands for several codes",
    ),
    Column(
        "budget",
        str,
        "label",
        "the budget as asked: `512`, `2k` (k = 1024 tokens), `25%` (of the prompt), `12MB` (10^6 "
        "bytes), `full`",
        check=parse_budget,
    ),
    Column(
        "variant",
        str,
        "",
        "settings besides those four in which cells of one task and model differ (`chunk=64`); "
        "cells of different variants are never averaged. Empty if nothing differs. Not stored: "
        "worked out when rows are read",
    ),
    Column("task_version", str, "", "version of the task's prompts and scorer"),
    Column(
        "shape",
        str,
        "name",
        "how layers and heads shared the budget: `uniform`, `pyramid`, `ada`, `global`, with "
        "options that differ from its yaml in parentheses",
    ),
    Column(
        "protect",
        str,
        "",
        "which tokens stayed whatever their score: `paper` (as the policy's authors have it), "
        "`none`, or so many first and newest ones: `4+64`",
    ),
    Column(
        "evict_every",
        int,
        "tokens",
        "answer tokens between two evictions; a head then holds up to so many more than the budget",
        low=1,
    ),
    Column(
        "codec",
        str,
        "name",
        "how kept tokens were stored, observed: `none`, `kivi`, `zipcache`, `kvcomp`, with "
        "options that differ from its yaml in parentheses, and in brackets what a budget in bytes "
        "settled",
    ),
    Column(
        "codec_asked",
        str,
        "name",
        "the codec as asked for; under a budget in bytes a policy that keeps everything may have "
        "gone to a coarser one",
    ),
    Column(
        "question",
        str,
        "",
        "whether the context was compressed with the question in sight, alone, or with the "
        "question before it as well",
        choices=("inside", "after", "first"),
    ),
    Column(
        "turns",
        str,
        "",
        "whether each question of a context was asked after the context alone, or after the "
        "questions and answers before it",
        choices=("independent", "dialogue"),
    ),
    Column(
        "sample_id",
        str,
        "name",
        "the sample; the same for every policy and budget, so samples can be paired",
    ),
    Column(
        "document",
        str,
        "name",
        "what samples share that are not independent: the document their questions are about, the "
        "problem of several answers; else the sample itself",
    ),
    Column(
        "part",
        str,
        "name",
        "the sub-benchmark (LongBench's `qasper`, RULER's `vt-4096`); scores are macro averages "
        "over parts. Empty where there is one only",
    ),
    Column(
        "turn",
        int,
        "",
        "which question about its context this is, 1 being the first; empty where a context has "
        "one question",
        low=1,
    ),
    Column(
        "status",
        str,
        "",
        "`oom`: out of memory; `invalid`: the model's logits or a policy's scores were NaN or "
        "infinite (`error` says which, for a policy with layer and pass); `score_error`: "
        "answered, but the scorer failed (`make rescore`). Only `ok` rows count in scores, sizes "
        "and times, and the same command runs all others again",
        choices=("ok", "oom", "error", "invalid", "score_error"),
    ),
    Column("error", str, "", "what happened, where it is not `ok`"),
    Column(
        "num_planned",
        int,
        "samples",
        "how many the cell was asked for; below that there is no headline score unless "
        "`allow_partial=true`. Not stored: worked out when rows are read",
        low=0,
    ),
    Column("chunk", int, "tokens", "prompt tokens per pass and sequence", low=1),
    Column("sampling", str, "`greedy`, ...", "how tokens were chosen"),
    Column("dtype", str, "", "data type in which the model ran"),
    Column("device", str, "", "where the model ran"),
    Column("kv_dtype", str, "", "data type of the cached tokens that no codec holds"),
    Column(
        "attention",
        str,
        "`sdpa`, `flash`, `reference`, `triton`",
        "the kernels that computed attention outputs, observed; several with `+`. `reference` "
        "writes weights out: H2O on a CPU, evicting decode steps of TOVA and SnapKV. What was "
        "asked for is in the manifest",
    ),
    Column("commit", str, "12 digits", "of kvarena's code; `+`: with uncommitted changes"),
    Column(
        "score",
        float,
        "",
        "the task's headline score of the prediction; of forced answers the share of tokens where "
        "the policy's first choice is the full cache's",
        low=0,
        high=1,
    ),
    Column("rescored", str, "time", "when `make rescore` scored the answer, where it did"),
    Column("prediction", str, "", "what the model wrote"),
    Column("references", list[str], "", "the right answers"),
    Column(
        "reference",
        str,
        "",
        "all of them in one text, for people who read tables. Not stored: worked out when rows "
        "are read",
    ),
    Column(
        "prompt_tokens",
        int,
        "tokens",
        "length of the prompt, chat template and earlier turns included",
        low=0,
    ),
    Column(
        "prefill_tokens_computed",
        int,
        "tokens",
        "how many of them were computed for this row: a context that is read once for many "
        "questions counts with the one that is asked first, earlier turns with theirs",
        low=0,
    ),
    Column(
        "generated_tokens", int, "tokens", "length of the answer, the stop token included", low=0
    ),
    Column(
        "finish_reason",
        str,
        "",
        "whether the model ended the answer, the token limit did, or its logits were no numbers",
        choices=("stop", "length", "invalid"),
    ),
    Column(
        "budget_tokens",
        int,
        "tokens",
        "the budget this sample ran under, per KV head on average over all heads; empty for "
        "`full`. For a budget in bytes, the most tokens that fit with this policy and codec, "
        "measured on the task's longest sample; fewer for a sample that held too many bytes with "
        "them",
        low=0,
    ),
    Column(
        "protected_tokens",
        int,
        "tokens",
        "first and newest tokens of this sample's budget that stayed whatever their score; empty "
        "for `full`",
        low=0,
    ),
    Column(
        "bounded",
        bool,
        "",
        "whether memory was bounded at all times; false for a reference that looks at the whole "
        "text first, whose bytes here are those of its second reading",
    ),
    Column(
        "compressed",
        bool,
        "",
        "whether anything was evicted; false where prompt and answer fit the budget",
    ),
    Column(
        "kept_tokens",
        int,
        "tokens",
        "the most a head held between passes, on average over all heads",
        low=0,
    ),
    Column(
        "kv_bytes_kept",
        int,
        "bytes",
        "the most the sequence held between passes: keys, values and side state (positions, "
        "per-token columns, saved sink keys; of a codec also scales, maps, streams and probe "
        "queries), all layers",
        low=0,
    ),
    Column(
        "kv_bytes_peak",
        int,
        "bytes",
        "the most it held at any moment, the chunk being processed included, and the one layer "
        "that a codec has decoded for it",
        low=0,
    ),
    Column(
        "bits_per_value",
        float,
        "bits",
        "8 times `kv_bytes_kept` over the numbers in keys and values of `kept_tokens`",
        low=0,
    ),
    Column(
        "compression_ratio",
        float,
        "",
        "bytes of the whole prompt in fp16 over `kv_bytes_kept`",
        low=0,
    ),
    Column(
        "ttft_sec",
        float,
        "s",
        "wall time from getting a slot to the first token, with other sequences running beside "
        "it; waiting for a slot is not in it",
        low=0,
    ),
    Column(
        "decode_tokens_per_sec",
        float,
        "tokens/s",
        "tokens after the first over the time they took, likewise; empty when there are fewer "
        "than two tokens",
        low=0,
    ),
    Column(
        "slots",
        int,
        "sequences",
        "how many ran side by side at most (no more than there were samples). Compare times "
        "between equal `slots` only",
        low=1,
    ),
    Column("graphs", bool, "", "whether decoding steps ran as CUDA graphs where they could"),
    Column("seed", int, "", "seed of the run"),
    Column("run_id", str, "name", "the run folder that the row comes from"),
)

# ---- rows of forced answers besides; a model that rules tokens out has infinite distances ----

FORCED = (
    Column("kl_mean", float, "nats", "mean of KL(full || policy) over the tokens", finite=False),
    Column("kl_max", float, "nats", "the largest of them", finite=False),
    Column(
        "nll_full", float, "nats/token", "negative log-likelihood with the full cache", finite=False
    ),
    Column("nll_policy", float, "nats/token", "the same with the policy's cache", finite=False),
    Column("nll_difference", float, "nats/token", "policy minus full", finite=False),
    Column("num_reference_tokens", int, "tokens", "length of the answer that was forced", low=0),
    Column("kl_per_token", list[float], "nats", "KL(full || policy) of each token", finite=False),
    Column(
        "agrees_per_token",
        list[int],
        "",
        "1 where the policy's first choice is the full cache's, else 0",
        low=0,
        high=1,
    ),
    Column(
        "nll_difference_per_token",
        list[float],
        "nats",
        "policy minus full, each token",
        finite=False,
    ),
    Column(
        "attention_recall",
        float,
        "0 to 1",
        "with `task.attention_recall=true`: share of the full cache's attention of the answer's "
        "queries that falls on tokens the policy still held",
        finite=False,
    ),
    Column(
        "attention_recall_by_layer_head",
        list[list[float]],
        "0 to 1",
        "the same for each of [layers][query heads]",
        finite=False,
    ),
)

# What lines of result files are checked against. What only a task knows is not: whoever reads rows
# need not have its code.
CHECKED = (*ROWS, *FORCED, *READ_BY_REPORTS)

# ---- summary: a line per task, model, variant, policy and budget ----

SUMMARY = (
    Column("num_planned", int, "samples", "samples asked for", low=0),
    Column("num_ok", int, "samples", "rows that count", low=0),
    Column("num_documents", int, "", "independent documents in them", low=0),
    Column(
        "num_compressed",
        int,
        "samples",
        "rows that count in which something was evicted (`compressed`). 0: the budget never "
        "bound. Empty where some do not say",
        low=0,
    ),
    Column(
        "bounded",
        bool,
        "",
        "whether memory was bounded in all rows that count; false for a reference such as "
        "`oracle`, which looks at the whole text first and competes for nothing",
    ),
    Column(
        "score",
        float,
        "",
        "mean score, over `part`s where there are some, each weighing the same. Empty while "
        "samples are missing",
        low=0,
        high=1,
    ),
    Column("score_low", float, "", "lower end of its 95 % interval", low=0, high=1),
    Column("score_high", float, "", "upper end of its 95 % interval", low=0, high=1),
    Column("score_se", float, "", "its standard error", low=0),
    Column("kv_bytes_kept", float, "bytes", "median", low=0),
    Column("kv_bytes_peak", int, "bytes", "the largest", low=0),
    Column("ttft_sec", float, "s", "median", low=0),
    Column("decode_tokens_per_sec", float, "tokens/s", "median", low=0),
    Column("slots", int, "sequences", "the largest", low=1),
    Column(
        "difference",
        float,
        "",
        "policy minus full cache of the same task, model and variant, on the samples that both "
        "have. Empty for the full cache itself, and where its run is missing or there are two "
        "versions of it",
        low=-1,
        high=1,
    ),
    Column(
        "difference_low",
        float,
        "",
        "lower end of its 95 % interval, which leaves 0 out exactly where `p_value` < 0.05",
        low=-1,
        high=1,
    ),
    Column("difference_high", float, "", "upper end of that interval", low=-1, high=1),
    Column("p_value", float, "", "sign-flip test of that difference", low=0, high=1),
    Column(
        "p_holm",
        float,
        "",
        "`p_value` corrected for all policies compared with full at that budget (Holm)",
        low=0,
        high=1,
    ),
    Column(
        "detectable",
        float,
        "",
        "the smallest true difference that so many samples would show four times in five (80 % "
        "power at the 5 % level). Empty with fewer than six documents, which can show none",
        low=0,
    ),
    Column("num_pairs", int, "samples", "samples compared", low=0),
    Column(
        "is_best",
        bool,
        "",
        "the highest score at that budget among its rivals: cells that hold less than the full "
        "cache (evicted in at least one sample, or the rows do not say, or with a codec). Nobody "
        "is where the rivals did not answer the same samples",
    ),
    Column(
        "ties_best",
        bool,
        "",
        "another of them that is not significantly below a best one (uncorrected p >= 0.05)",
    ),
)
SUMMARY_OF_FORCED = (
    Column(
        "kl_mean",
        float,
        "nats",
        "of forced answers only: mean KL from the full cache per token, over `part`s as `score`, "
        "which is the agreement there",
        finite=False,
    ),
)

# ---- by turn: a line per cell whose samples ask several questions of one context ----

TURNS = (
    Column("question", str, "", "of the rows", choices=("inside", "after", "first")),
    Column("turns", str, "", "of the rows", choices=("independent", "dialogue")),
    Column("num_turns", int, "", "questions of the context that has the most", low=1),
    Column(
        "num_documents",
        int,
        "",
        "contexts of which the first and the last question count; all but `prefill_saved` is about "
        "these two",
        low=0,
    ),
    Column("score_first", float, "", "mean score of the question asked first", low=0, high=1),
    Column("score_first_low", float, "", "lower end of its 95 % interval", low=0, high=1),
    Column("score_first_high", float, "", "upper end of its 95 % interval", low=0, high=1),
    Column("score_last", float, "", "mean score of the question asked last", low=0, high=1),
    Column("score_last_low", float, "", "lower end of its 95 % interval", low=0, high=1),
    Column("score_last_high", float, "", "upper end of its 95 % interval", low=0, high=1),
    Column("difference", float, "", "last minus first, of the same contexts", low=-1, high=1),
    Column("difference_low", float, "", "lower end of its 95 % interval", low=-1, high=1),
    Column("difference_high", float, "", "upper end of its 95 % interval", low=-1, high=1),
    Column("p_value", float, "", "sign-flip test of that difference, by context", low=0, high=1),
    Column(
        "prefill_saved",
        float,
        "",
        "share of all `prompt_tokens` that were not computed: 1 minus the sum of "
        "`prefill_tokens_computed` over theirs. Empty where rows do not say",
        low=0,
        high=1,
    ),
)

# ---- all of them ----


def columns_of_tasks() -> dict[Column, list[str]]:
    """The columns that tasks declare, in order, each with the names of its tasks."""
    found: dict[Column, list[str]] = {}
    for name in choices("task"):
        kind = named_class(load_choice("task", name)["_target_"], Task)
        for column in kind.row_columns:  # type: ignore[attr-defined]
            found.setdefault(column, []).append(name)
    return found


def all_columns() -> dict[str, Column]:
    """Every column that a row may have, by name."""
    return {column.name: column for column in (*ROWS, *FORCED, *columns_of_tasks())}


# ---- the dictionary in results/README.md ----


def with_tables(readme: str) -> str:
    """The text with the tables between its marks made anew.

    Raises UsageError for a mark that is missing.
    """
    tasks = columns_of_tasks()
    tables = {
        "rows": _table(ROWS),
        "forced answers": _table(FORCED),
        "tasks": _table(tasks, {"task": [", ".join(names) for names in tasks.values()]}),
        "summary": _table([*SUMMARY, *SUMMARY_OF_FORCED]),
        "turns": _table(TURNS),
    }
    for name, table in tables.items():
        begin, end = (f"<!-- columns of {name}: {mark} -->" for mark in ("begin", "end"))
        if begin not in readme or end not in readme:
            raise UsageError(f"{DICTIONARY} lacks the marks {begin} and {end}; put them back")
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{table}{end}{rest.split(end)[1]}"
    return readme


def _table(columns: Iterable[Column], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """Markdown, one line per column. more: what to say of each beside its name, by heading."""
    columns = list(columns)
    fields = {
        "column": [f"`{column.name}`" for column in columns],
        **(more or {}),
        "type": [_kind(column.dtype) for column in columns],
        "unit or values": [_values(column) for column in columns],
        "meaning": [column.meaning for column in columns],
    }
    lines = [list(fields), ["---"] * len(fields), *zip(*fields.values(), strict=True)]
    bar = r"\|"  # within a cell of a table
    rows = ["| " + " | ".join(text.replace("|", bar) for text in line) + " |\n" for line in lines]
    return "".join(rows)


def _kind(dtype: type, ending: str = "") -> str:
    if items := get_args(dtype):
        return f"list{ending} of {_kind(items[0], 's')}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names[dtype] + ending


def _values(column: Column) -> str:
    if column.choices:
        return ", ".join(f"`{choice}`" for choice in column.choices)
    if column.unit or column.low is None or column.high is None:
        return column.unit
    return f"{column.low} to {column.high}"


def main() -> None:
    """Write the tables of results/README.md anew."""
    with one_line_errors():
        if not DICTIONARY.exists():
            raise UsageError(f"{DICTIONARY} is not there; run this in a checkout of kvarena")
        text = with_tables(DICTIONARY.read_text(encoding="utf-8"))
        with replacing(DICTIONARY) as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
