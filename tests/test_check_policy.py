"""Checking a policy: each broken promise is told in one line by one check, and ours break none."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.testing import check_policy as command
from kvarena.harness.testing import contract
from kvarena.harness.testing.contract import CHECKS, Finding, check_policy
from kvarena.harness.testing.trial import Trial
from kvarena.policies.base import LayerView, Needs, Policy
from toys import save_policy_files


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the check that compares times, whose ratio no test can rely on."""
    monkeypatch.setattr(contract, "_COST_ROUNDS", 1)


@pytest.fixture
def fitting_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random files of the default model's shape, which the toy model of the checks has."""
    save_policy_files(tmp_path, num_heads=9, num_kv_heads=3, head_dim=64, num_layers=3)
    monkeypatch.chdir(tmp_path)


def line_of(text: str) -> int:
    """The line of this file that starts with ``text``."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.strip() == text]
    return found


# ---- policies that break one promise each ----


class Newest(Policy):
    """Breaks none."""

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


class Forgetful(Newest):
    def score(self, view: LayerView) -> Tensor:
        view.positions.float()  # and no return


class PerHead(Newest):
    def score(self, view: LayerView) -> Tensor:
        return view.keys.mean(dim=(2, 3))


class Whole(Newest):
    def score(self, view: LayerView) -> Tensor:
        return view.positions


class Clumsy(Newest):
    def score(self, view: LayerView) -> Tensor:
        missing = view.positions + "1"
        return missing


class Unasked(Newest):
    def score(self, view: LayerView) -> Tensor:
        return view.attention.sum(dim=-2)


class Undecided(Newest):
    def num_recent(self, budget_tokens: int) -> int:
        return budget_tokens


class NotANumber(Newest):
    def score(self, view: LayerView) -> Tensor:
        return (view.positions - view.positions.amin(dim=-1, keepdim=True)).float().log().sqrt()


class Endless(Newest):
    def score(self, view: LayerView) -> Tensor:
        return view.positions.float().masked_fill(view.positions < 4, float("inf"))


class ByPlace(Newest):
    """Takes storage order for age."""

    def score(self, view: LayerView) -> Tensor:
        return torch.arange(view.positions.shape[-1]).float().expand(view.positions.shape)


class Unprotected(Newest):
    def num_recent(self, budget_tokens: int) -> int:
        return 0

    def score(self, view: LayerView) -> Tensor:
        return -view.positions.float()


class Sinkless(Newest):
    def __post_init__(self) -> None:
        if self.sinks:
            raise ValueError(f"sinks must be 0, got {self.sinks}")


class Writing(Newest):
    def score(self, view: LayerView) -> Tensor:
        view.stored_keys.mul_(0.9)
        return view.positions.float()


class Scattered(Newest):
    """Ranks as positions, but not an unbroken run of newest tokens."""

    @property
    def needs(self) -> Needs:
        return Needs(rank_positions=True)

    def score(self, view: LayerView) -> Tensor:
        return torch.sin(view.positions.double())


@dataclass(kw_only=True)
class Counting(Newest):
    """Changes its mind with every sample it has seen."""

    seen: list[int] = field(default_factory=list, init=False)

    def score(self, view: LayerView) -> Tensor:
        if int(view.positions.max()) < 120:
            self.seen.append(1)
        return torch.sin(view.positions.double() * len(self.seen))


class Mixing(Newest):
    """Compares keys with the mean key of all sequences beside it."""

    def score(self, view: LayerView) -> Tensor:
        return (view.keys - view.keys.mean(dim=(0, 2), keepdim=True)).norm(dim=-1)


@dataclass(kw_only=True)
class Hoarding(Newest):
    log: list[Tensor] = field(default_factory=list, init=False)

    def score(self, view: LayerView) -> Tensor:
        self.log.append(view.positions.double())
        return view.positions.float()


HERE = re.escape(Path(__file__).name)
FAULTY: dict[type[Policy], tuple[str, str]] = {
    Forgetful: ("scores", r"score returned NoneType in layer 0, pass 3; wanted: a float tensor"),
    PerHead: (
        "scores",
        r"score returned a tensor \[2, 3\] in layer 0, pass 3; wanted: a float tensor "
        r"\[S, K, T\] = \[2, 3, 72\], one score for each token; look at",
    ),
    Whole: ("scores", r"score returned a tensor of torch.int64 in layer 0, pass 3"),
    Clumsy: ("scores", r"TypeError: .* in layer 0, pass 3; wanted: no exception; look at"),
    Unasked: ("scores", r"AttributeError: 'NoneType' .* unless `needs` asks for them"),
    Undecided: ("scores", r"of a budget of 512 tokens, .* protect 0 \+ 512; wanted: at least 16"),
    NotANumber: (
        "finite",
        r"score gave NaN for 6 of 432 tokens in layer 0, pass 3; wanted: finite",
    ),
    Endless: ("finite", r"score gave infinity for 24 of 432 tokens in layer 0, pass 3"),
    ByPlace: ("storage order", r"the token at position \d+ scored \d+, and \d+ when the same"),
    Unprotected: ("protection", r"with sinks=3 and recent=5, position \d+ was gone from head 0 of"),
    Sinkless: (
        "protection",
        r"with sinks=3 and recent=5: sinks must be 0, got 3; wanted: both can",
    ),
    Writing: ("replay oracle", r"logits are .* off .*; score wrote into view.stored_keys in layer"),
    Scattered: ("replay oracle", r"rank_positions=True, but ranks as positions need the first 0"),
    Counting: ("samples", r"after other samples, prompt 1 kept \d+ other tokens of 64 in head 0"),
    Mixing: ("neighbours", r"among 5 prompts, prompt 0 kept \d+ other tokens of 64 in head"),
    Hoarding: ("memory", r"tensors that stay took \d{5} bytes more after 15 decoded tokens, under"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_broken_promise_fails_its_check_alone(kind: type[Policy]) -> None:
    check, text = FAULTY[kind]
    found = {finding.check: finding for finding in check_policy(kind)}
    failed = [finding for finding in found.values() if finding.verdict == "FAILED"]
    assert [finding.check for finding in failed] == [check]
    assert re.match(text, failed[0].text), failed[0].text
    assert "\n" not in failed[0].text
    assert re.search(rf"; look at \S*{HERE}:\d+$", failed[0].text), failed[0].text
    # What rests on the failed check is not run, everything else is well.
    resting = {name for name, (_, needs) in CHECKS.items() if check in needs}
    assert {name for name, finding in found.items() if finding.verdict == "not run"} == resting
    assert all(found[name].text == f"mend {check} first" for name in resting)


def test_every_check_but_the_cost_has_a_policy_that_fails_it() -> None:
    assert {check for check, _ in FAULTY.values()} == set(CHECKS) - {"cost"}


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (Clumsy, 'missing = view.positions + "1"'),
        (Unasked, "return view.attention.sum(dim=-2)"),
    ],
)
def test_an_exception_is_told_with_the_line_that_raised_it(kind: type[Policy], line: str) -> None:
    first = next(iter(check_policy(kind)))
    assert first.text.endswith(f"{Path(__file__).name}:{line_of(line)}")


def test_the_place_of_a_method_is_where_it_is_defined() -> None:
    (failed,) = [f for f in check_policy(Unprotected) if f.verdict == "FAILED"]
    # The method of Unprotected, not the one of the same name in Undecided above it.
    own = line_of("class Unprotected(Newest):") + 1
    assert failed.text.endswith(f"{Path(__file__).name}:{own}")


@pytest.mark.usefixtures("fitting_heads")
@pytest.mark.parametrize("name", choices("policy"))
def test_every_policy_of_ours_keeps_every_promise(name: str) -> None:
    settings = load_choice("policy", name)
    found = list(check_policy(lambda **options: build({**settings, **options})))
    assert [finding.check for finding in found] == list(CHECKS)
    assert [finding.text for finding in found if finding.verdict != "ok"] == []


@pytest.mark.parametrize(("window", "expected"), [(32, 64), (200, 256)])
def test_a_policy_that_protects_most_of_a_budget_gets_a_larger_one(
    window: int, expected: int
) -> None:
    settings = {**load_choice("policy", "snapkv"), "window": window}
    assert Trial(lambda **options: build({**settings, **options})).budget_tokens == expected


# ---- the command ----


@dataclass
class Check:
    """The command in this process: its exit code, what it said, and its lines by check."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["check_policy", *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = self.capsys.readouterr()
        return int(stop.value.code or 0), out, err


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(monkeypatch, capsys)


def test_a_line_per_check_and_a_count(check: Check) -> None:
    code, out, err = check("keydiff", "policy.recent=8", "policy.anchor=median")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line[9:23].strip() for line in lines[:-1]] == ["import", "options", *CHECKS]
    assert all(line.startswith("ok       ") for line in lines[:-1])
    assert re.fullmatch(r"ok +import +KeyDiff of \S*policies/keydiff.py", lines[0])
    assert lines[-1] == "11 ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a policy: make check-policy POLICY=mine. Available: caote, corm, "),
        (["keydif"], "unknown policy 'keydif'. Did you mean keydiff? Available: "),
        (["base"], "policies/base.py is there, conf/policy/base.yaml is not; write it, with "),
        (["keydiff", "recent=8"], "options have the form policy.recent=8, got 'recent=8'"),
        (["keydiff", "policy.recnet=8"], "unknown option 'recnet'. Did you mean recent? Avail"),
        (["keydiff", "policy.recent=-1"], "KeyDiff: recent must be >= 0 tokens, got -1"),
    ],
)
def test_what_cannot_be_checked_is_told_in_one_line(
    check: Check, arguments: list[str], message: str
) -> None:
    code, out, err = check(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def one_finding(verdict: str) -> Callable[..., Any]:
    return lambda *_: iter([Finding(check="scores", verdict=verdict, text="so it is")])


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("FAILED", 1)])
def test_the_exit_code_tells_whether_a_check_failed(
    check: Check, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    monkeypatch.setattr(command, "findings", one_finding(verdict))
    said = f"{verdict:<8} scores         so it is\n1 {verdict}\n"
    assert check("keydiff") == (code, said, "")


@dataclass(kw_only=True)
class Optioned(Newest):
    ANY: ClassVar[int] = 1

    layers: tuple[int, ...] = (0, 1)


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        ({"sinks": 0, "recent": 0, "layers": [0, 1]}, None),
        ({"sinks": 0, "layers": [0, 1]}, "lacks recent; wanted: recent: 0, as in Optioned"),
        ({"sinks": 4, "recent": 0, "layers": [0, 1]}, "has sinks: 4; wanted: sinks: 0, as in Opti"),
        ({"sinks": 0, "recent": 0, "layers": [0]}, r"has layers: \[0\]; wanted: layers: \[0, 1\]"),
    ],
)
def test_the_yaml_must_list_every_option_with_its_default(listed: dict, text: str | None) -> None:
    found = command._options_in(listed, Optioned, "mine")
    assert found.verdict == ("FAILED" if text else "ok")
    assert re.match(f"conf/policy/mine.yaml {text or 'has all'}", found.text)
