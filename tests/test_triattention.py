"""TriAttention: its score is what the formula says, its file holds means of queries."""

import cmath
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_locret import projections
from torch import Tensor

from faulty import Kvarena, no_model_loads
from kvarena.harness.cells.fingerprints import code_fingerprint
from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.training import triattention
from kvarena.harness.training.triattention import Calibration
from kvarena.policies.base import LayerView, Policy
from kvarena.policies.triattention import TriAttention
from toy_folder import save_model_folder, toy_overrides
from toys import ARCHITECTURES, kernel_for, save_random_statistics, toy_model, toy_prompt

S, K, G, T, D = 2, 2, 2, 21, 16
F = D // 2
LAYER = 1


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    return str(save_random_statistics(tmp_path / "statistics.safetensors"))


def policy_of(statistics: str | Path) -> TriAttention:
    return TriAttention(statistics=str(statistics))


def turned(keys: Tensor, positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """Keys [S, K, T, D] as a rotary embedding leaves them, one pair of dimensions at a time."""
    result = torch.empty_like(keys)
    for s in range(keys.shape[0]):
        for k in range(keys.shape[1]):
            for t in range(keys.shape[2]):
                for f in range(F):
                    angle = float(positions[s, k, t] * frequencies[f])
                    first, second = float(keys[s, k, t, f]), float(keys[s, k, t, f + F])
                    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
                    result[s, k, t, f] = first * cos - second * sin
                    result[s, k, t, f + F] = second * cos + first * sin
    return result


def random_view(statistics: str, scale: float = 1.0) -> tuple[LayerView, Tensor]:
    """Tokens in scrambled storage order with gaps in the text, and their keys before positions."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(S, K, T, D, generator=generator, dtype=torch.float64)
    orders = [torch.randperm(3 * T, generator=generator)[:T] for _ in range(S * K)]
    positions = torch.stack(orders).view(S, K, T)
    frequencies = load_file(statistics)[f"layers.{LAYER}.frequencies"].double()
    stored = turned(keys, positions, frequencies, scale)
    view = LayerView(
        layer=LAYER,
        stored_keys=stored,
        stored_values=keys.clone(),
        positions=positions,
        layer_heads=(K * G, K),
    )
    return view, keys


def of_one_head(
    mean: Tensor, norms: Tensor, frequencies: Tensor, keys: Tensor, positions: Tensor
) -> list[float]:
    """The paper's score of each key [T, D] before positions, by one query head; z-scores."""
    newest, scores = int(positions.max()), []
    for key, position in zip(keys.tolist(), positions.tolist(), strict=True):
        total = 0.0
        for distance in (2**power for power in range(17)):
            for f in range(F):
                q, k = complex(mean[f], mean[f + F]), complex(key[f], key[f + F])
                angle = float(frequencies[f]) * (newest - position + distance)
                phase = cmath.phase(q) - cmath.phase(k)
                total += abs(q) * abs(k) * math.cos(angle + phase)
                total += (float(norms[f]) - abs(q)) * abs(k)
        scores.append(total / 17)
    average = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - average) ** 2 for score in scores) / len(scores))
    return [(score - average) / deviation for score in scores]


# ---- the policy ----


def test_the_score_is_the_mean_over_distances_and_the_largest_of_the_group(statistics: str) -> None:
    view, keys = random_view(statistics)
    tensors = load_file(statistics)
    means, norms, frequencies = (
        tensors[f"layers.{LAYER}.{name}"].double()
        for name in ("mean_queries", "mean_norms", "frequencies")
    )
    scores = policy_of(statistics).score(view)
    assert scores.dtype == torch.float64
    for s in range(S):
        for k in range(K):
            heads = [
                of_one_head(means[k, g], norms[k, g], frequencies, keys[s, k], view.positions[s, k])
                for g in range(G)
            ]
            expected = torch.tensor([max(of_token) for of_token in zip(*heads, strict=True)])
            torch.testing.assert_close(scores[s, k].float(), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_of_the_embedding_changes_no_score(statistics: str) -> None:
    """YaRN stores keys longer than they were projected."""
    plain, scaled = (random_view(statistics, scale)[0] for scale in (1.0, 1.3))
    policy = policy_of(statistics)
    torch.testing.assert_close(policy.score(scaled), policy.score(plain))


def test_scores_do_not_depend_on_where_the_text_begins(statistics: str) -> None:
    view, keys = random_view(statistics)
    frequencies = load_file(statistics)[f"layers.{LAYER}.frequencies"].double()
    later = view.positions + 1000
    moved = replace(view, positions=later, stored_keys=turned(keys, later, frequencies))
    policy = policy_of(statistics)
    torch.testing.assert_close(policy.score(moved), policy.score(view))


def test_a_head_by_itself_has_the_scores_it_has_among_others(statistics: str) -> None:
    view, _ = random_view(statistics)
    policy = policy_of(statistics)
    scores = policy.score(view)
    for s in range(S):
        for k in range(K):
            alone = replace(
                view,
                stored_keys=view.stored_keys[s : s + 1, k : k + 1],
                stored_values=view.stored_values[s : s + 1, k : k + 1],
                positions=view.positions[s : s + 1, k : k + 1],
                text_tokens=10_000,  # of another sequence, which is longer
                kv_heads=slice(k, k + 1),
            )
            torch.testing.assert_close(policy.score(alone), scores[s : s + 1, k : k + 1])


def test_few_or_equal_tokens_have_finite_scores(statistics: str) -> None:
    view, _ = random_view(statistics)
    policy = policy_of(statistics)
    for stored in (view.stored_keys[:, :, :1], torch.zeros(S, K, T, D), torch.ones(S, K, T, D)):
        few = replace(view, stored_keys=stored, positions=view.positions[:, :, : stored.shape[2]])
        assert policy.score(few).isfinite().all()


def test_half_precision_is_scored_in_float32(statistics: str) -> None:
    view, _ = random_view(statistics)
    half = replace(view, stored_keys=view.stored_keys.bfloat16())
    wide = replace(half, stored_keys=half.keys)
    policy = policy_of(statistics)
    assert policy.score(half).dtype == torch.float32
    assert torch.equal(policy.score(half), policy.score(wide))


# ---- its file ----


def test_what_cannot_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not tensors")
    for name in ("none.safetensors", "text", "."):
        engine = Engine(toy_model(), policy_of(tmp_path / name), budget_tokens=40)
        with pytest.raises(
            UsageError, match=r"statistics: cannot read .*; run `make calibrate-triattention`"
        ):
            next(engine.generate([toy_prompt(60)], max_new_tokens=1))


def test_a_run_without_the_file_is_one_line_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kvarena = Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))
    with no_model_loads():
        outcome = kvarena("policy=triattention", "policy.statistics=none")
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert outcome.err == (
        "error: TriAttention: statistics: cannot read 'none' (No such file or directory); run "
        "`make calibrate-triattention`, or name the statistics of your model\n"
    )
    save_random_statistics(tmp_path / "none")
    assert kvarena("policy=triattention", "policy.statistics=none").code == 0


@pytest.mark.parametrize(
    "other",
    [
        {"head_dim": 32},
        {"num_heads": 6},
        {"num_heads": 2, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 4},
        {"num_layers": 2},
    ],
)
def test_statistics_of_another_model_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    path = save_random_statistics(tmp_path / "other.safetensors", **other)
    engine = Engine(toy_model(), policy_of(path), budget_tokens=40)
    with pytest.raises(
        UsageError, match=r"is of another model: in layer \d .*needs \[\(2, 2, 16\), "
    ):
        next(engine.generate([toy_prompt(60)], max_new_tokens=1))


def test_a_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"layers.0.w1": torch.zeros(3)}, tmp_path / "heads")
    engine = Engine(toy_model(), policy_of(tmp_path / "heads"), budget_tokens=40)
    with pytest.raises(UsageError, match=r"is of another model: in layer 0 .* are \[\], this"):
        next(engine.generate([toy_prompt(60)], max_new_tokens=1))


def test_other_statistics_make_another_cell(statistics: str) -> None:
    before = code_fingerprint(policy_of(statistics), Policy)
    save_random_statistics(Path(statistics), num_layers=5)
    assert before != code_fingerprint(policy_of(statistics), Policy)


# ---- how it is made ----


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_statistics_are_means_over_the_queries_that_the_layer_projected(
    architecture: str,
) -> None:
    """Two texts of different lengths; each token counts alike. Qwen 3 norms its queries."""
    model = toy_model(architecture, dtype=torch.float64)
    calibration, seen, queries = Calibration(model), {}, []
    projections(model.model.layers[LAYER].self_attn, seen)
    for length in (30, 11):
        calibration.read(toy_prompt(length, seed=length))
        queries += seen["q"].reshape(length, K * G, D).tolist()
    tensors = calibration.tensors()
    assert calibration.num_tokens == 41
    for head in range(K * G):
        for f in range(F):
            pairs = [complex(token[head][f], token[head][f + F]) for token in queries]
            mean, norm = sum(pairs) / 41, sum(abs(pair) for pair in pairs) / 41
            of_head = tensors[f"layers.{LAYER}.mean_queries"][head // G, head % G]
            assert complex(of_head[f], of_head[f + F]) == pytest.approx(mean, abs=1e-5)
            found = tensors[f"layers.{LAYER}.mean_norms"][head // G, head % G, f]
            assert float(found) == pytest.approx(norm, abs=1e-5)
    assert set(tensors) == {
        f"layers.{layer}.{name}"
        for layer in range(3)
        for name in ("mean_queries", "mean_norms", "frequencies")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_measured_and_then_evicts(
    architecture: str, tmp_path: Path
) -> None:
    """Its frequencies are those that turn its keys: unturned, equal tokens have equal keys."""
    model = toy_model(architecture)
    calibration = Calibration(model)
    calibration.read(toy_prompt(60))
    save_file(calibration.tensors(), tmp_path / "made")
    engine = Engine(
        model, policy_of(tmp_path / "made"), budget_tokens=40, attention=kernel_for(architecture)
    )
    prompt = [7] * 50
    batch = engine.batch([prompt[:30]], max_new_tokens=1)
    batch.step()
    keys, positions = batch.layers[0].keys[0, :, :30].double(), torch.arange(30)
    back = turned(
        keys[None],
        -positions.expand(1, keys.shape[0], -1),
        calibration.tensors()["layers.0.frequencies"],
    )
    torch.testing.assert_close(back, back[:, :, :1].expand_as(back), atol=1e-4, rtol=1e-4)
    assert next(engine.generate([toy_prompt(90)], max_new_tokens=2)).token_ids


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", **SCALED}}),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * F,
                    "long_factor": [2.0] * F,
                    **SCALED,
                },
                "original_max_position_embeddings": 512,
            },
        ),
    ],
)
def test_a_model_whose_pairs_turn_otherwise_is_refused(architecture: str, changes: dict) -> None:
    calibration = Calibration(toy_model(architecture, **changes))
    with pytest.raises(UsageError, match=r"does not turn every dimension i with i \+ 8 by one"):
        calibration.read(toy_prompt(20))


def test_the_command_writes_what_the_policy_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triattention, "NUM_TEXTS", 2)
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "toy")
    monkeypatch.setattr(sys, "argv", ["triattention", f"--model={tmp_path / 'toy'}"])
    triattention.main()
    said = capsys.readouterr().out
    assert said.startswith("results/triattention/toy.safetensors: written, 3 layers, ")
    assert said.endswith(" tokens of 2 texts\n")
    policy = policy_of("results/triattention/toy.safetensors")
    engine = Engine(toy_model(), policy, budget_tokens=40)
    assert next(engine.generate([toy_prompt(90)], max_new_tokens=2)).token_ids
