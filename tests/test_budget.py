"""The grammar of ``budget=`` and how a share of the prompt becomes tokens."""

from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvarena.harness.budget import parse_budget
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.errors import UsageError
from kvarena.policies.base import Policy
from kvarena.policies.h2o import H2O
from kvarena.policies.keydiff import KeyDiff
from kvarena.policies.snapkv import SnapKV

no_deadline = settings(deadline=None)  # a busy machine is no reason to fail
prompt_lengths = st.integers(1, 200_000)
# Percentages with up to two digits after the point, as text: 0.01 to 100.
percents = st.integers(1, 10_000).map(lambda hundredths: f"{Decimal(hundredths) / 100}")
few = st.integers(0, 40)
policies = st.one_of(
    st.builds(KeyDiff, sinks=few, recent=few),
    st.builds(SnapKV, sinks=few, window=st.integers(1, 40)),
    st.builds(H2O, sinks=few, recent=few, heavy_ratio=st.floats(0.1, 1)),
)


def protected(policy: Policy, budget_tokens: int) -> int:
    return policy.sinks + policy.num_recent(budget_tokens)


@no_deadline
@given(st.integers(1, 10**9))
def test_tokens_are_what_was_written(number: int) -> None:
    budget = parse_budget(number)
    label = f"{number // 1024}k" if number % 1024 == 0 else str(number)
    assert (budget.tokens, budget.ratio, budget.label) == (number, None, label)
    assert parse_budget(str(number)) == budget
    assert parse_budget(f"{number}k").tokens == 1024 * number
    assert parse_budget(f" {number}K ") == parse_budget(f"{number}k")


def test_the_five_spellings() -> None:
    read = [parse_budget(text) for text in ("512", "2k", "8K", "25%", "full")]
    assert [budget.tokens for budget in read] == [512, 2048, 8192, None, None]
    assert [budget.ratio for budget in read] == [None, None, None, 0.25, None]
    assert [budget.label for budget in read] == ["512", "2k", "8k", "25%", "full"]


@pytest.mark.parametrize(
    "text",
    [
        *["0", "-1", "8kk", "1.5", "nan", "inf", "8 k", "101%", "0%", "0.0%", "-5%", "100.01%"],
        *["", "k", "%", "1e3", "0k", "1.5k", "1,000", "0x10", "٣", "٣%", "²", "5%%", ".5%", "5.%"],
        *["fulll", "none", "None", "2m", "25 %", "2\nk"],
        *[0, -1, 1.5, None, True],
    ],
)
def test_anything_else_is_refused_with_the_grammar(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"^budget=(.|\n)* is not a number of tokens \(512\), of"):
        parse_budget(text)


@no_deadline
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        budget = parse_budget(text)
    except UsageError:
        return
    assert parse_budget(budget.label) == budget


@no_deadline
@given(percents, prompt_lengths)
@example("7", 100)  # 0.07 * 100 is over 7 in binary
def test_a_share_is_rounded_up_exactly(percent: str, prompt_tokens: int) -> None:
    exact = Decimal(percent) * prompt_tokens / 100
    rounded_up = int(exact.to_integral_value("ROUND_CEILING"))
    assert parse_budget(f"{percent}%").for_prompt(prompt_tokens) == max(1, rounded_up)


@no_deadline
@given(percents, percents, prompt_lengths)
def test_a_larger_share_never_gives_fewer_tokens(one: str, other: str, prompt_tokens: int) -> None:
    small, large = sorted(
        (parse_budget(f"{text}%") for text in (one, other)), key=lambda b: b.ratio
    )
    assert small.for_prompt(prompt_tokens) <= large.for_prompt(prompt_tokens)


@no_deadline
@given(percents, prompt_lengths, prompt_lengths)
def test_a_longer_prompt_never_gives_fewer_tokens(percent: str, one: int, other: int) -> None:
    budget, lengths = parse_budget(f"{percent}%"), sorted((one, other))
    small, large = (budget.for_prompt(length) for length in lengths)
    assert small <= large


@no_deadline
@given(percents, prompt_lengths, policies)
def test_a_share_that_protection_fills_is_refused_and_not_raised(
    percent: str, prompt_tokens: int, policy: Policy
) -> None:
    tokens = parse_budget(f"{percent}%").for_prompt(prompt_tokens)
    if tokens > protected(policy, tokens):
        Eviction(policy=policy, num_layers=1).check(tokens)
    else:
        with pytest.raises(UsageError, match="leaves nothing to choose"):
            Eviction(policy=policy, num_layers=1).check(tokens)


@no_deadline
@given(st.integers(1, 10**6), prompt_lengths)
def test_tokens_do_not_depend_on_the_prompt(number: int, prompt_tokens: int) -> None:
    assert parse_budget(number).for_prompt(prompt_tokens) == number
    assert parse_budget("full").for_prompt(prompt_tokens) is None


@no_deadline
@given(st.lists(st.integers(1, 10**9), max_size=5), st.lists(percents, max_size=5))
def test_shares_sort_after_tokens_and_before_full(numbers: list[int], shares: list[str]) -> None:
    labels = ["full", *(f"{share}%" for share in shares), *map(str, numbers)]
    ordered = sorted(labels, key=lambda label: parse_budget(label).sort_key)
    by_tokens, by_share = ordered[: len(numbers)], ordered[len(numbers) : -1]
    assert [int(label) for label in by_tokens] == sorted(numbers)
    assert [Decimal(label[:-1]) for label in by_share] == sorted(map(Decimal, shares))
    assert ordered[-1] == "full"


def test_k_sorts_by_its_tokens() -> None:
    ordered = sorted(["2k", "2047", "1k", "2049"], key=lambda text: parse_budget(text).sort_key)
    assert ordered == ["1k", "2047", "2k", "2049"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("12MB", "12MB"),
        ("12.0mb", "12MB"),
        ("1500000MB", "1500000MB"),
        ("12.3456789MB", "12.3456789MB"),
        ("0.000001GB", "0.000001GB"),
        (f"{10**30}MB", f"{10**30}MB"),
    ],
)
def test_a_label_of_bytes_says_one_amount_and_can_be_read_again(text: str, label: str) -> None:
    budget = parse_budget(text)
    assert budget.label == label
    assert parse_budget(label) == budget
