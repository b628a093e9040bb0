"""What is recorded of policies and keys: checked against the model's own attention and by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from kvarena.harness.engine import Engine, KeptTokens
from kvarena.harness.models import load_model
from kvarena.harness.studies import kept_figures, kept_tokens
from kvarena.harness.studies.kept_overlap import needle_shares, policy_overlap, prefill_overlap
from kvarena.harness.studies.key_geometry import KeyProbe, agreement
from kvarena.harness.studies.reference import REPOSITORY
from kvarena.policies.full import Full
from kvarena.tasks.base import Sample, Tokenizer
from kvarena.tasks.needle import Needle
from toy_folder import save_haystack, save_model_folder
from toys import toy_model, toy_prompt

BUDGET, CHUNK = 80, 48
RECORDED = REPOSITORY / "results" / "anatomy"
Setting = tuple[PreTrainedModel, Tokenizer, list[Sample]]
Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("anatomy")
    model, tokenizer = load_model(str(save_model_folder(folder / "toy")))
    haystack = str(save_haystack(folder / "hay"))
    task = Needle(lengths=(400,), depths=(0, 50), haystack=haystack, max_new_tokens=5)
    return model, tokenizer, task.samples(tokenizer, 0)


@pytest.fixture(scope="module")
def tables(setting: Setting) -> Tables:
    return kept_tokens.record(*setting, budget_tokens=BUDGET, chunk_tokens=CHUNK)


# ---- what is kept ----


def test_every_policy_keeps_the_budget_in_every_head_whichever_way_it_reads(
    setting: Setting, tables: Tables
) -> None:
    heads = tables["kept.parquet"].groupby(["sample_id", "policy", "prefill", "layer", "head"])
    assert len(heads) == 2 * len(kept_tokens.evicting_policies()) * 2 * 3 * 2
    assert set(heads.size()) == {BUDGET} == set(heads["position"].nunique())
    assert heads["position"].apply(lambda held: held.is_monotonic_increasing).all()


def test_streaming_llm_keeps_the_same_sinks_and_newest_tokens_both_ways(
    setting: Setting, tables: Tables
) -> None:
    kept = tables["kept.parquet"]
    own = kept[kept["policy"] == "streaming_llm"]
    for sample in setting[2]:
        end = len(sample.prompt_token_ids)
        expected = [*range(4), *range(end - BUDGET + 4, end)]
        cells = own[own["sample_id"] == sample.id].groupby(["prefill", "layer", "head"])
        assert len(cells) == 12
        assert all(cell["position"].tolist() == expected for _, cell in cells)


def test_pruned_once_keydiff_keeps_the_keys_the_probe_finds_least_similar(
    setting: Setting, tables: Tables
) -> None:
    """Two recordings that share no code beyond the engine: only a full prefill gives this."""
    sample = setting[2][1]
    _, keys = kept_tokens.probe(setting[0], sample, CHUNK)
    kept = tables["kept.parquet"]
    own = kept[(kept["policy"] == "keydiff") & (kept["sample_id"] == sample.id)]
    same = {"whole": 0, "chunked": 0}
    for prefill in same:
        for head, cell in own[own["prefill"] == prefill].groupby(["layer", "head"]):
            lowest = keys.set_index(["layer", "head"]).loc[head].nsmallest(BUDGET, "cosine")
            same[prefill] += set(lowest["position"]) == set(cell["position"])
    assert same["whole"] == 6 > same["chunked"]


def test_the_needle_is_counted_after_every_pass(setting: Setting, tables: Tables) -> None:
    samples, held = tables["samples.csv"], tables["needle_held.parquet"]
    for line, sample in zip(samples.to_dict("records"), setting[2], strict=True):
        start, num = line["needle_first_token"], line["num_needle_tokens"]
        text = setting[1].decode(sample.prompt_token_ids[start : start + num])
        assert text.strip().startswith("The special magic number for ")
        assert text.endswith(sample.references[0])
        own = held[(held["sample_id"] == sample.id) & (held["policy"] == "streaming_llm")]
        chunked = own[own["prefill"] == "chunked"].groupby("seen_tokens")["num_held"].mean()
        end = len(sample.prompt_token_ids)
        # The short chunk is first or last, as the engine likes; the needle is lost either way.
        assert len(chunked) == -(-end // CHUNK)
        assert chunked.iloc[-1] == 0
        assert chunked.max() > 0
    everything = KeptTokens(seen_tokens=30, positions=[torch.arange(30).expand(2, 30)] * 3)
    assert (kept_tokens.needle_table(everything, 10, 7)["num_held"] == 7).all()
    assert (kept_tokens.needle_table(everything, 28, 7)["num_held"] == 2).all()


# ---- the keys ----


def test_the_probe_sees_the_attention_that_the_model_computes() -> None:
    model, prompt, window = toy_model("llama"), toy_prompt(90), 16
    probe = KeyProbe(len(prompt), window)
    engine = Engine(model, probe, chunk_tokens=len(prompt), slots=1)
    answer = next(engine.generate([prompt], max_new_tokens=6)).token_ids
    table = probe.table("sample").set_index(["layer", "head"])

    eager = toy_model("llama")
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        fed = eager(torch.tensor([prompt + answer[:-1]]), output_attentions=True, use_cache=True)
    for layer, weights in enumerate(fed.attentions):
        by_head = weights[0].unflatten(0, (2, 2)).mean(dim=1)  # [K, Q, T]
        from_prompt = by_head[:, 90 - window : 90, : 90 - window].mean(dim=1)
        from_answer = by_head[:, 89:, :90].mean(dim=1)
        keys = fed.past_key_values.layers[layer].keys[0, :, :90]
        cosine = torch.cosine_similarity(keys, keys.mean(dim=1, keepdim=True), dim=-1)
        for head in range(2):
            own = table.loc[layer, head]
            assert own["position"].tolist() == list(range(90))
            assert own["cosine"].to_numpy() == pytest.approx(cosine[head].numpy(), abs=1e-5)
            assert own["answer_attention"].to_numpy() == pytest.approx(
                from_answer[head].numpy(), abs=1e-6
            )
            assert own["prompt_attention"].to_numpy()[: 90 - window] == pytest.approx(
                from_prompt[head].numpy(), abs=1e-6
            )
            assert own["prompt_attention"].isna().sum() == window


def test_the_recorded_answer_is_that_of_the_full_cache(setting: Setting, tables: Tables) -> None:
    model, tokenizer, samples = setting
    prompts = [sample.prompt_token_ids for sample in samples]
    runs = Engine(model, Full(), chunk_tokens=CHUNK).generate(prompts, max_new_tokens=5)
    expected = [tokenizer.decode(run.token_ids, skip_special_tokens=True) for run in runs]
    assert tables["samples.csv"]["answer"].tolist() == expected


def test_correlation_is_spearmans_and_shares_leave_out_the_first_token() -> None:
    keys = pd.DataFrame(
        {
            "sample_id": "a",
            "layer": 0,
            "head": 0,
            "position": range(6),
            "cosine": [0.1, 0.9, 0.2, 0.8, 0.3, 0.7],
            "prompt_attention": [0.5, 0.05, 0.2, 0.25, np.nan, np.nan],
            "answer_attention": [0.6, 0.2, 0.1, 0.05, 0.04, 0.01],
        }
    )
    lines = agreement(keys, num_kept=2).set_index("queries")
    prompt, answer = lines.loc["prompt"], lines.loc["answer"]
    assert answer["correlation"] == pytest.approx(
        spearmanr(keys["cosine"], keys["answer_attention"]).statistic
    )
    assert prompt["correlation"] == pytest.approx(
        spearmanr(keys["cosine"][:4], keys["prompt_attention"][:4]).statistic
    )
    assert answer["first_share"] == pytest.approx(0.6)
    assert answer["distinct_share"] == pytest.approx(0.14 / 0.4)  # cosines 0.2 and 0.3
    assert answer["top_share"] == pytest.approx(0.3 / 0.4)
    assert answer["chance_share"] == pytest.approx(2 / 5)
    assert prompt["chance_share"] == pytest.approx(2 / 3)
    assert prompt["top_share"] == pytest.approx(0.45 / 0.5)


# ---- overlaps ----


def hand_made() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A prompt of 10 tokens, one layer and head, 4 kept."""
    cells = {
        ("a", "chunked"): [0, 1, 2, 3],
        ("a", "whole"): [0, 1, 8, 9],
        ("b", "chunked"): [2, 3, 4, 5],
        ("b", "whole"): [2, 3, 4, 5],
    }
    kept = pd.DataFrame(
        [
            {"sample_id": "s", "policy": policy, "prefill": prefill, "position": position}
            for (policy, prefill), positions in cells.items()
            for position in positions
        ]
    )
    samples = pd.DataFrame({"sample_id": ["s"], "prompt_tokens": [10]})
    return kept.assign(layer=0, head=0), samples


def test_overlaps_of_hand_made_sets() -> None:
    (pair,) = policy_overlap(*hand_made()).to_dict("records")
    assert (pair["policy"], pair["other"]) == ("a", "b")
    assert pair["jaccard"] == pytest.approx(2 / 6)
    assert pair["chance"] == pytest.approx(4 / 16)
    shared = prefill_overlap(*hand_made()).set_index("policy")
    assert shared["shared"].to_dict() == {"a": 0.5, "b": 1.0}
    assert set(shared["chance"]) == {0.4}


def test_needle_shares_begin_once_the_needle_is_read() -> None:
    held = pd.DataFrame(
        {"seen_tokens": [12, 16, 24], "num_held": [3, 6, 2], "sample_id": "s", "policy": "a"}
    ).assign(prefill="chunked", layer=0, head=0)
    samples = pd.DataFrame(
        {"sample_id": ["s"], "needle_first_token": [5], "num_needle_tokens": [8]}
    )
    shares = needle_shares(held, samples).set_index("seen_tokens")["share"]
    assert shares.to_dict() == {16: 0.75, 24: 0.25}


# ---- files and figures ----


def test_tables_come_back_from_their_files(tables: Tables, tmp_path: Path) -> None:
    for name, table in tables.items():
        kept_tokens.write_table(table, tmp_path / name)
    kept = pd.read_parquet(tmp_path / "kept.parquet")
    pd.testing.assert_frame_equal(kept, tables["kept.parquet"])
    samples = pd.read_csv(tmp_path / "samples.csv")
    assert samples["sample_id"].tolist() == tables["samples.csv"]["sample_id"].tolist()


@pytest.mark.slow
def test_the_same_tables_give_the_same_figures(tables: Tables) -> None:
    samples, kept, keys = (tables[name] for name in ("samples.csv", "kept.parquet", "keys.parquet"))
    shares = needle_shares(tables["needle_held.parquet"], samples)

    def draw() -> list[bytes]:
        return [
            kept_figures.kept_map(kept, samples, samples["sample_id"][0]),
            kept_figures.overlap_map(policy_overlap(kept, samples)),
            kept_figures.prefill_lines(prefill_overlap(kept, samples)),
            kept_figures.needle_lines(shares),
            kept_figures.correlation_dots(tables["agreement.parquet"]),
            kept_figures.share_lines(tables["agreement.parquet"]),
            kept_figures.key_dots(keys, [(0, 0), (2, 1)]),
        ]

    first = draw()
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert len(set(first)) == 7
    assert draw() == first


def test_the_recorded_tables_are_small_whole_and_name_no_machine() -> None:
    assert sum(path.stat().st_size for path in RECORDED.iterdir()) < 2e6
    manifest = (RECORDED / "manifest.json").read_text()
    assert re.fullmatch("[0-9a-f]{40}", json.loads(manifest)["git"]["commit"])
    assert not re.search(r'"/|\b(home|tmp|work)/', manifest)
    kept = pd.read_parquet(RECORDED / "kept.parquet")
    # Recorded before there were more policies, which `make anatomy` takes in.
    assert (
        {"keydiff", "snapkv", "h2o"} < set(kept["policy"]) <= set(kept_tokens.evicting_policies())
    )
    samples = pd.read_csv(RECORDED / "samples.csv", dtype={"number": str})
    assert set(kept["sample_id"]) == set(samples["sample_id"])
    assert all(
        number in answer
        for number, answer in zip(samples["number"], samples["answer"], strict=True)
    )
