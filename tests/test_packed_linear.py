"""Packed linear layers give the same numbers to the last bit, and are there once."""

import weakref

import pytest
import torch
from torch import nn

from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.models import load_model, packed_linear
from kvarena.harness.models.packed_linear import PackedLinear, _can_pack, pack_linear_layers
from kvarena.harness.registry import build, load_choice
from toy_folder import save_model_folder
from toys import toy_model, toy_prompt

needs_bfloat16 = pytest.mark.skipif(
    not _can_pack(torch.empty(1, 1, dtype=torch.bfloat16)),
    reason="this processor or this torch has no bfloat16 by oneDNN",
)


def packed(linear: nn.Linear) -> PackedLinear:
    holder = nn.Sequential(linear)
    pack_linear_layers(holder)
    assert type(holder[0]) is PackedLinear
    return holder[0]


@needs_bfloat16
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 129])
@pytest.mark.parametrize(("wide", "bias"), [((576, 1536), False), ((64, 49), True), ((7, 3), True)])
def test_products_are_the_same_to_the_last_bit(rows, wide, bias):
    torch.manual_seed(rows)
    linear = nn.Linear(*wide, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(1, rows, wide[0], dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(packed(linear)(inputs), linear(inputs))


@needs_bfloat16
def test_weights_come_out_as_they_went_in_and_are_held_once():
    linear = nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
    layer = packed(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert not list(layer.parameters())


@needs_bfloat16
def test_a_layer_is_let_go_before_the_layers_that_follow_are_packed(monkeypatch):
    blocks = [nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)) for _ in range(5)]
    model = nn.Sequential(*blocks)
    originals = [weakref.ref(block[0]) for block in blocks]
    alive = []

    def counted(linear):
        alive.append(sum(original() is not None for original in originals))
        return PackedLinear(linear)

    monkeypatch.setattr(packed_linear, "PackedLinear", counted)
    pack_linear_layers(model)
    # The one that has just been packed may still be held.
    assert all(count <= 5 - place + 1 for place, count in enumerate(alive))
    assert len(alive) == 5


@needs_bfloat16
def test_a_packed_model_is_not_moved_or_converted():
    model = toy_model().bfloat16()
    pack_linear_layers(model)
    with pytest.raises(UsageError, match="load it again"):
        model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_stay_as_they_are(dtype):
    holder = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
    pack_linear_layers(holder)
    assert type(holder[0]) is nn.Linear


@needs_bfloat16
@pytest.mark.parametrize("policy", ["keydiff", "h2o", "critical"])
def test_a_loaded_model_answers_as_the_one_that_transformers_loads(tmp_path, policy):
    folder = str(save_model_folder(tmp_path / "toy"))
    answers = []
    for is_packed in (True, False):
        model, _ = load_model(folder, dtype="bfloat16", packed=is_packed)
        kinds = {type(layer) for layer in model.modules() if hasattr(layer, "in_features")}
        assert kinds == {PackedLinear if is_packed else nn.Linear}
        engine = Engine(model, build(load_choice("policy", policy)), budget_tokens=40, slots=2)
        prompts = [toy_prompt(70), toy_prompt(50, seed=1)]
        answers.append(
            list(engine.generate(prompts, max_new_tokens=12, record_kept=True, record_logits="all"))
        )
    for one, other in zip(*answers, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logits, other.logits)
        for kept, expected in zip(one.kept_positions, other.kept_positions, strict=True):
            assert torch.equal(kept, expected)
