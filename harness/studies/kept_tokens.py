"""What each policy keeps of a few prompts, token by token, recorded in small tables.

``python -m kvarena.harness.studies.kept_tokens results/anatomy`` (``make anatomy``) reads needle
prompts with the small default model and writes, for the notebooks what_survives and
keydiff_geometry:

samples.csv: the prompts, where their needle stands, and the full cache's answer.
kept.parquet: the positions every policy holds at the end of a prompt, in each layer and KV head.
needle_held.parquet: how many of the needle's tokens it holds after every pass.
agreement.parquet, keys.parquet: the geometry of the full cache's keys (key_geometry.py),
per head, and every fourth key of the first prompt.
manifest.json: settings, commit and package versions.

Every policy reads a prompt twice. ``chunked`` is the engine's normal way: the budget holds after
every chunk. ``whole`` is the way of harnesses that prefill with the full cache and prune once: the
same engine with one chunk as long as the prompt.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from kvarena.harness.engine import Engine, KeptTokens
from kvarena.harness.entry import on_folder
from kvarena.harness.files import replacing
from kvarena.harness.models import load_model
from kvarena.harness.provenance import provenance
from kvarena.harness.registry import build, load_choice, ready_policies
from kvarena.harness.studies.key_geometry import KeyProbe, agreement
from kvarena.tasks.base import Sample, Tokenizer
from kvarena.tasks.needle import Needle

MODEL = "smollm2-135m"
BUDGET_TOKENS = 256
CHUNK_TOKENS = 128
SEED = 0
LENGTHS_AND_DEPTHS = ((1000, (0, 25, 50, 75, 100)), (2000, (50,)))  # tokens, percent
KEYS_STEP = 4


def main() -> None:
    """The argument is the folder to write."""
    on_folder(record_into, __doc__)


def record_into(folder: Path) -> None:
    """All tables and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told now
    origin = provenance()
    model, tokenizer = load_model(MODEL, dtype="float32")
    samples = [
        sample
        for length, depths in LENGTHS_AND_DEPTHS
        for sample in Needle(lengths=(length,), depths=depths).samples(tokenizer, SEED)
    ]
    for name, table in record(model, tokenizer, samples).items():
        write_table(table, folder / name)
    manifest = {
        "settings": {
            "model": MODEL,
            "dtype": "float32",
            "budget_tokens": BUDGET_TOKENS,
            "chunk_tokens": CHUNK_TOKENS,
            "seed": SEED,
            "policies": {name: load_choice("policy", name) for name in evicting_policies()},
        },
        **origin,
        # As anyone would type it: the interpreter's own list names folders of this machine.
        "argv": ["python", "-m", "kvarena.harness.studies.kept_tokens", "results/anatomy"],
    }
    with replacing(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n")


def record(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    budget_tokens: int = BUDGET_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, pd.DataFrame]:
    """The tables by file name; samples: of the needle task, with one needle."""
    geometry, answers = [], []
    points = pd.DataFrame()
    for sample in samples:
        print(f"full cache, {len(sample.prompt_token_ids)} tokens", flush=True)
        answer, keys = probe(model, sample, chunk_tokens)
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
        geometry.append(agreement(keys, budget_tokens))
        if points.empty:
            points = keys[keys["position"] % KEYS_STEP == 0]
    prompts = describe(tokenizer, samples).assign(answer=answers)

    kept, held = [], []
    longest_tokens = int(prompts["prompt_tokens"].max())
    for policy, (prefill, chunk) in product(
        evicting_policies(), (("chunked", chunk_tokens), ("whole", longest_tokens))
    ):
        print(f"{policy}, {prefill}", flush=True)
        engine = Engine(
            model,
            build(load_choice("policy", policy)),
            budget_tokens=budget_tokens,
            chunk_tokens=chunk,
            slots=1,
        )
        generations = engine.generate(
            [sample.prompt_token_ids for sample in samples],
            max_new_tokens=1,  # never fed, so the last pass is the prompt's
            record_history=True,
        )
        for sample_id, first, num, generation in zip(
            prompts["sample_id"],
            prompts["needle_first_token"],
            prompts["num_needle_tokens"],
            generations,
            strict=True,
        ):
            assert generation.kept_history is not None, "recorded"
            cell = {"sample_id": sample_id, "policy": policy, "prefill": prefill}
            kept.append(positions_table(generation.kept_history[-1]).assign(**cell))
            held += [
                needle_table(after, first, num).assign(**cell) for after in generation.kept_history
            ]
    return {
        "samples.csv": prompts,
        "kept.parquet": pd.concat(kept, ignore_index=True),
        "needle_held.parquet": pd.concat(held, ignore_index=True),
        "agreement.parquet": pd.concat(geometry, ignore_index=True),
        "keys.parquet": points,
    }


def evicting_policies() -> list[str]:
    """Names of all policies but those that keep everything, and those that need a trained file.

    The study must not depend on which trained files a place happens to have.
    """
    return [name for name in ready_policies() if build(load_choice("policy", name)).evicts]


def probe(model: PreTrainedModel, sample: Sample, window: int) -> tuple[list[int], pd.DataFrame]:
    """The full cache's answer, and ``KeyProbe.table`` of the sample."""
    num_tokens = len(sample.prompt_token_ids)
    keys = KeyProbe(num_tokens, window)
    engine = Engine(model, keys, chunk_tokens=num_tokens, slots=1)
    run = next(engine.generate([sample.prompt_token_ids], max_new_tokens=sample.max_new_tokens))
    return run.token_ids, keys.table(sample.id)


def describe(tokenizer: Tokenizer, samples: Sequence[Sample]) -> pd.DataFrame:
    """One line per sample; the needle's tokens are those up to the last digit of its number."""
    lines = []
    for sample in samples:
        first, number = sample.meta["needle_token_index"], sample.references[0]
        rest = sample.prompt_token_ids[first:]
        lines.append(
            {
                "sample_id": sample.id,
                "length_target": sample.meta["length_target"],
                "depth_target": sample.meta["depth_target"],
                "prompt_tokens": len(sample.prompt_token_ids),
                "needle_first_token": first,
                "num_needle_tokens": next(
                    num for num in range(1, len(rest) + 1) if number in tokenizer.decode(rest[:num])
                ),
                "number": number,
            }
        )
    return pd.DataFrame(lines)


def positions_table(kept: KeptTokens) -> pd.DataFrame:
    """One line per layer, KV head and token held."""
    return _by_head(kept.stacked, "position")


def needle_table(kept: KeptTokens, first: int, num: int) -> pd.DataFrame:
    """One line per layer and KV head: how many of the needle's ``num`` tokens are held."""
    positions = kept.stacked  # [L, K, T]
    held = ((positions >= first) & (positions < first + num)).sum(dim=-1)
    return _by_head(held, "num_held").assign(seen_tokens=kept.seen_tokens)


def _by_head(values: Tensor, name: str) -> pd.DataFrame:
    """[L, K, ...] as a column, in int16, beside those of layer and head."""
    layers, heads, *_ = np.indices(values.shape, dtype=np.int16)
    column = values.numpy().astype(np.int16).ravel()
    return pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel(), name: column})


def write_table(table: pd.DataFrame, path: Path) -> None:
    """CSV or Parquet, as the name ends; positions ascend within a head, so deltas are small."""
    with replacing(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
            return
        others = [name for name in table.columns if name != "position"]
        deltas = {"position": "DELTA_BINARY_PACKED"} if "position" in table else {}
        table.to_parquet(
            temporary,
            index=False,
            compression="zstd",
            use_dictionary=others,
            column_encoding=deltas,
        )


if __name__ == "__main__":
    main()
