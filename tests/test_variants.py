"""Cells that differ are told apart, those that do not are not."""

from typing import Any

import pytest

from kvarena.harness.analysis.cell_labels import method_label, policy_labels, variants


def identity(**changes: Any) -> dict[str, Any]:
    return {
        "task": {"name": "needle", "lengths": [300]},
        "model": {"name": "toy"},
        "policy": {"name": "keydiff", "sinks": 0},
        "budget": {"name": "64"},
        "chunk": 128,
        "seed": 0,
        "content": {"policy": "abcd1234", "data": "x"},
        **changes,
    }


def test_cells_that_differ_in_nothing_else_have_no_variant() -> None:
    cells = [
        identity(),
        identity(policy={"name": "h2o", "heavy_ratio": 0.5}),
        identity(budget={"name": "96"}),
        identity(seed=1),
    ]
    assert variants(cells) == [""] * 4
    assert policy_labels(cells, [()] * 4) == ["keydiff", "h2o", "keydiff", "keydiff"]


def test_a_setting_with_two_values_is_named_for_all_cells_of_its_task_and_model() -> None:
    other = {"name": "h2o", "heavy_ratio": 0.5}
    cells = [identity(), identity(chunk=64), identity(policy=other), identity(model={"name": "b"})]
    assert variants(cells) == ["chunk=128", "chunk=64", "chunk=128", ""]


def test_long_values_with_one_beginning_stay_apart() -> None:
    lengths = [300, 310, 320, 330, 340]
    cells = [
        identity(task={"name": "needle", "lengths": [*lengths, last]}) for last in (400, 450, 400)
    ]
    first, second, third = variants(cells)
    assert first.startswith("lengths=[300, 310, 320, 330, ...#")
    assert first == third != second


def test_one_name_for_two_codes_or_default_options_gets_a_hash() -> None:
    edited = identity(content={"policy": "ffff", "data": "x"})
    defaults = identity(policy={"name": "keydiff", "sinks": 4})
    labels = policy_labels([identity(), edited, defaults, identity()], [()] * 4)
    assert len(set(labels)) == 3
    assert labels[0] == labels[3]
    assert all(label.startswith("keydiff@") for label in labels)


def test_a_label_names_the_codec_that_ran_not_the_one_asked_for() -> None:
    asked = identity(codec={"name": "kivi", "bits": 4})
    used = [{"kivi(bits=2)"}, {"kivi", "kivi(bits=2)"}, set()]
    assert policy_labels([asked] * 3, used) == [
        "keydiff+kivi(bits=2)",
        "keydiff+kivi/kivi(bits=2)",
        "keydiff+kivi",
    ]


@pytest.mark.parametrize(
    ("codec", "label"),
    [
        ("none", "full"),
        ("kivi", "full+kivi"),
        ("kivi(window=64,bits=4)", "full+kivi(window=64,bits=4)"),
        ("kivi(window=64,bits=4)[bits=2]", "full+kivi(window=64,bits=2)"),
        ("kivi[bits=2]", "full+kivi(bits=2)"),
        ("kvcomp(window=64)[error=0.2]", "full+kvcomp(window=64,error=0.2)"),
        ("mine(levels=[1, 2],bits=4)[bits=2]", "full+mine(levels=[1, 2],bits=2)"),
    ],
)
def test_a_method_is_labelled_with_the_options_that_were_settled(codec: str, label: str) -> None:
    assert method_label("full", codec) == label
