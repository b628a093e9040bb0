"""The bench measures fairly, and what it says of a pass is true of that pass."""

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from kvarena.harness.bench import __main__ as bench
from kvarena.harness.bench import gpu, growth, phases
from kvarena.harness.bench.jobs import JobWatch
from kvarena.harness.bench.measure import Case, TimedCase, measure, select, summarise
from kvarena.harness.bench.memory import peak_bytes
from kvarena.harness.bench.peers import KvpressServer, dynamic_cache_decode
from kvarena.harness.bench.phases import PHASES, PhaseClock, clocks
from kvarena.harness.bench.roofline import pass_bytes, pass_flops, with_fractions
from kvarena.harness.bench.sections import Section, chosen, run_sections
from kvarena.harness.bench.sizes import QUICK
from kvarena.harness.bench.subjects import Subject, toy
from kvarena.harness.bench.targets import TARGET_COLUMNS, check, targets
from kvarena.harness.bench.timed_passes import full_slots, run_passes
from kvarena.harness.engine import Engine, Request
from kvarena.harness.engine.attention import KERNELS
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, load_choice
from kvarena.harness.studies.growth import picture


@pytest.fixture(scope="module")
def subject() -> Subject:
    return toy()


def fake(name: str, log: list[str], values: list[float]) -> TimedCase:
    """Notes each visit and gives the next of the values as seconds."""

    def run() -> dict[str, float]:
        log.append(name)
        return {"pass_sec": values.pop(0)}

    def warm() -> dict[str, float]:
        log.append(f"warm {name}")
        return {}

    return TimedCase(case=Case(section="test", what=name), run=run, warm=warm)


def test_rounds_visit_all_cases_in_turn_and_back_after_warming_all() -> None:
    log: list[str] = []
    measure([fake("a", log, [1.0] * 3), fake("b", log, [1.0] * 3)], rounds=3)
    # The very first work is done once more: it alone maps libraries, which is nobody's memory.
    assert log == ["warm a", "warm a", "warm b", "a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_formed_within_each_round_so_a_slower_machine_cancels_out() -> None:
    drift = [1.0, 2.0, 10.0]
    measured = measure(
        [fake("a", [], [3 * d for d in drift]), fake("b", [], list(drift))], rounds=3
    )
    line = check(
        "a over b",
        select(measured, "pass_sec", what="a") / select(measured, "pass_sec", what="b"),
        at_most=2.5,
    )
    assert (line["median"], line["q1"], line["q3"]) == (3.0, 3.0, 3.0)
    assert line["met"] == "no"


def test_a_figure_with_a_side_that_was_not_measured_is_left_out() -> None:
    measured = measure([fake("a", [], [1.0])], rounds=1)
    missing = select(measured, "pass_sec", what="b")
    assert check("a over b", select(measured, "pass_sec", what="a") / missing, at_most=1) == {}


def test_a_selection_of_several_cases_is_refused() -> None:
    measured = measure([fake("a", [], [1.0]), fake("b", [], [1.0])], rounds=1)
    with pytest.raises(AssertionError, match="several cases"):
        select(measured, "pass_sec", section="test")


def test_summary_holds_median_and_quartiles_in_the_order_of_measuring() -> None:
    cases = [fake("z", [], [4.0, 1.0, 2.0, 3.0, 5.0]), fake("a", [], [1.0] * 5)]
    summary = summarise(measure(cases, rounds=5))
    assert list(summary["what"]) == ["z", "a"]
    assert list(summary.loc[0, ["median", "q1", "q3", "rounds"]]) == [3.0, 2.0, 4.0, 5]


def test_policies_are_measured_by_what_they_say_of_themselves() -> None:
    free, seeing = (QUICK.evicting(see_attention=sees) for sees in (False, True))
    assert set(free) == {"keydiff", "l2norm", "streaming_llm"}
    assert set(seeing) == {"h2o", "snapkv", "tova"}
    assert set(QUICK.evicting()) == {*free, *seeing}
    more = QUICK.with_policies("caote,lagkv,keydiff")
    assert set(more.evicting()) == {*free, *seeing, "caote", "lagkv"}
    assert "caote" in more.evicting(see_attention=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [("keydif", "Did you mean keydiff"), ("full", "keeps everything"), ("locret", "locret")],
)
def test_a_policy_that_cannot_be_measured_is_refused(names: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QUICK.with_policies(names)


@pytest.mark.parametrize("policy", ["full", *QUICK.evicting()])
def test_a_full_slot_goes_on_as_if_it_had_read_its_text(subject: Subject, policy: str) -> None:
    batch = full_slots(subject, policy, slots=2, cache_tokens=40, passes=3)
    logits = []
    choose = batch._choose
    batch._choose = lambda deciding, found: (logits.append(found), choose(deciding, found))
    run_passes(batch, 1)
    # Its first pass attends to the whole text under any policy that does not move positions.
    engine = Engine(subject.model, build(load_choice("policy", "full")), slots=1)
    (expected,) = engine.generate([subject.text[:41]], max_new_tokens=1, record_logits="answer")
    torch.testing.assert_close(logits[0], expected.logits.expand(2, -1), atol=1e-4, rtol=1e-4)
    held = 41 if policy == "full" else 40
    assert all(layer.counts == [[held] * 2] * 2 for layer in batch.layers)


def test_passes_that_read_choose_no_token(subject: Subject) -> None:
    batch = full_slots(subject, "keydiff", slots=2, cache_tokens=40, passes=3, chunk_tokens=8)
    run_passes(batch, 3)
    assert [active.num_seen for active in batch.slots] == [64, 64]
    assert [active.token_ids for active in batch.slots] == [[], []]


def test_each_moment_counts_for_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PhaseClock(torch.device("cpu"))
    time = [0.0]
    monkeypatch.setattr(phases, "now_sec", lambda device: time[0])

    def spend(seconds: float) -> None:
        time[0] += seconds

    inner = clock.wrap("inner", lambda: spend(5))

    def outer() -> None:
        spend(1)
        inner()
        spend(2)

    clock.wrap("outer", outer)()
    spend(100)  # between passes: nobody's
    assert dict(clock.seconds) == {"outer": 3.0, "inner": 5.0}


def test_clocks_cover_every_phase_of_an_evicting_pass_and_come_off(subject: Subject) -> None:
    batch = full_slots(subject, "snapkv", slots=2, cache_tokens=48, passes=3)
    before = [getattr(owner, name) for _, owner, name in phases.FUNCTIONS]
    with clocks(batch) as clock:
        run_passes(batch, 2)
    assert {phase for phase in PHASES if clock.seconds[phase] > 0} == set(PHASES)
    assert [getattr(owner, name) for _, owner, name in phases.FUNCTIONS] == before
    assert "step" not in vars(batch)
    assert not any(hasattr(kernel, "__wrapped__") for kernel in KERNELS.values())


def test_an_empty_slot_counts_as_idle_only_while_requests_wait() -> None:
    watch = JobWatch()
    batch = SimpleNamespace(slots=[None, None], num_waiting=1, kv_bytes_allocated=1)
    watch.note(batch, 1)
    assert watch.idle_passes == 1
    watch.note(batch, 2)
    batch.num_waiting = 0  # nobody waits any more
    watch.note(batch, 1)
    assert (watch.idle_passes, watch.busy) == (1, [1, 2, 1])


def test_a_watched_batch_ends_with_every_request(subject: Subject) -> None:
    engine = Engine(
        subject.model, build(load_choice("policy", "keydiff")), budget_tokens=16, slots=2
    )
    lengths = [3, 9, 4, 2, 5]
    asked = [Request(prompt=subject.text[:20], max_new_tokens=n) for n in lengths]
    watch = JobWatch()
    finished = watch.drive(engine.batch(asked))
    assert sorted(one.index for one in finished) == [0, 1, 2, 3, 4]
    assert watch.idle_passes == 0
    assert set(watch.busy) == {1, 2}
    assert sum(watch.busy) == sum(lengths)  # a pass for each token, the first of a prompt's pass


def test_operations_of_a_decode_pass_are_those_that_torch_counts(subject: Subject) -> None:
    model = subject.model
    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(subject.keys_and_values(40)):
        cache.update(keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1), index)
    model.set_attn_implementation("eager")  # torch counts the products that it sees
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
    finally:
        model.set_attn_implementation("sdpa")
    # The rotary angles are a product as well: 8 frequencies for each of one shared position.
    assert counter.get_total_flops() - pass_flops(model, 2, 40, 1, True) == pytest.approx(
        0, abs=2 * 2 * 8
    )


def test_bytes_of_a_pass_are_those_of_the_weights_and_of_the_cache(subject: Subject) -> None:
    embedding = subject.model.get_input_embeddings().weight.nbytes  # looked up, not read through
    norms = sum(p.nbytes for p in subject.model.parameters() if p.dim() == 1)
    weights = sum(p.nbytes for p in subject.model.parameters()) - embedding - norms
    cache = 3 * sum(t.nbytes for pair in subject.keys_and_values(40) for t in pair)
    assert pass_bytes(subject.model, 3, 40) == weights + cache


def test_fractions_are_of_the_rates_in_the_same_round() -> None:
    lines = [
        ("machine", 1, "matmul_flops_per_sec", 10.0),
        ("machine", 1, "memory_bytes_per_sec", 4.0),
        ("machine", 2, "matmul_flops_per_sec", 20.0),
        ("machine", 2, "memory_bytes_per_sec", 8.0),
        ("kvarena", 1, "flops_per_sec", 5.0),
        ("kvarena", 2, "flops_per_sec", 5.0),
        ("kvarena", 2, "bytes_per_sec", 2.0),
    ]
    measured = pd.DataFrame(lines, columns=["system", "round", "metric", "value"])
    shares = with_fractions(measured)
    assert list(select(shares, "of_matmul_rate_ratio")) == [0.5, 0.25]
    assert list(select(shares, "of_bandwidth_ratio")) == [0.25]


def test_the_loop_over_a_dynamic_cache_holds_as_many_tokens_as_the_engine(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    forward = subject.stock.forward

    def spy(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        held.append(tuple(kwargs["past_key_values"].layers[0].keys.shape))  # type: ignore[index,attr-defined]
        return output

    subject.keys_and_values(40)
    monkeypatch.setattr(subject.stock, "forward", spy)
    timed = dynamic_cache_decode(subject, section="decode", slots=3, cache_tokens=40, passes=2)
    timed.run()
    assert held == [(3, 2, 41 + n, 16) for n in range(3)]


def test_a_whole_quick_run_writes_every_section_and_judges_every_target(
    subject: Subject, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        sections = bench.sections(subject, QUICK, stack)
        assert tuple(sections) == bench.SECTIONS
        text = run_sections(subject, sections, lambda m: targets(m, QUICK), tmp_path / "quick")
    table = pd.read_csv(tmp_path / "quick.csv")
    assert set(table["section"]) == set(bench.SECTIONS)
    assert table[["metric", "unit", "median", "rounds", "threads", "torch"]].notna().all(axis=None)
    timed = table[~table["metric"].isin(["clock_overhead_ratio", "idle_while_waiting_passes"])]
    assert (timed["median"] >= 0).all()
    assert set(table.loc[table["section"] == "phases", "policy"]) == {"full", *QUICK.evicting()}
    judged = pd.read_csv(tmp_path / "quick-targets.csv")
    figures = " ".join(judged["figure"])
    for name in (
        "prefill of 256 over 64",
        "generate over l2norm",
        "DynamicCache",
        "h2o over str",
        "evict_every 2, slots 2",
        "sample, kivi over none, keydiff, slots 1",
        "job, bfloat16 over float32",
        "beside a busy loop",
    ):
        assert name in figures
    assert judged.loc[judged["figure"].str.contains("idle slot"), "met"].tolist() == ["yes"] * 2
    assert (tmp_path / "quick.md").read_text() == text
    of_codecs = text.partition("## Codecs: time of a sample")[2].partition("## ")[0]
    assert "| 1 slot | 2 slots |" in of_codecs
    assert of_codecs.count("| zipcache |") == 2
    kept = table[table["metric"] == "kv_kept_bytes"].set_index(["policy", "codec", "slots"])[
        "median"
    ]
    assert kept["full", "kivi", 1] < kept["full", "none", 1], "the sample is long enough to code"
    of_dtypes = text.partition("## Data types: a pass")[2].partition("## ")[0]
    assert of_dtypes.count("| decode |") == of_dtypes.count("| prefill |") == 2


def test_a_section_measured_anew_takes_the_place_of_its_own_lines(
    subject: Subject, tmp_path: Path
) -> None:
    def write(name: str, seconds: float) -> str:
        timed = fake("work", [], [seconds])
        timed = replace(timed, case=replace(timed.case, section=name))

        def judge(measured: pd.DataFrame) -> pd.DataFrame:
            line = check(f"{name} figure", select(measured, "pass_sec"), at_most=2.0)
            return pd.DataFrame([line], columns=TARGET_COLUMNS)

        section = Section(cases=lambda: [timed], rounds=1)
        return run_sections(subject, {name: section}, judge, tmp_path / "bench")

    write("prefill", 1.0)
    write("decode", 2.0)
    text = write("prefill", 3.0)
    table, judged = (pd.read_csv(tmp_path / f"bench{end}.csv") for end in ("", "-targets"))
    assert table[["section", "median"]].values.tolist() == [["prefill", 3.0], ["decode", 2.0]]
    assert judged[["section", "met"]].values.tolist() == [["prefill", "no"], ["decode", "yes"]]
    assert text.index("prefill figure") < text.index("decode figure")


def test_growth_is_judged_and_drawn_from_what_was_measured(
    subject: Subject, tmp_path: Path
) -> None:
    sizes = growth.TOY
    stem = tmp_path / "growth"
    run_sections(subject, growth.sections(subject, sizes), lambda m: growth.targets(m, sizes), stem)
    table = pd.read_csv(stem.with_suffix(".csv"))
    assert tuple(dict.fromkeys(table["section"])) == growth.SECTIONS
    judged = pd.read_csv(tmp_path / "growth-targets.csv")["figure"]
    assert judged.str.contains("exponent of time in length, kvarena, 100 to 400").any()
    drawn = picture(table).decode()
    for name in ("generate", "model over a DynamicCache", "peak memory, MB", "decoding step, ms"):
        assert name in drawn


def test_an_exponent_is_the_slope_of_time_over_length() -> None:
    lengths = (100, 200, 400)
    times = [pd.Series([3.0 * n**2, 5.0 * n], index=[1, 2]) for n in lengths]
    assert list(growth._exponent(lengths, times)) == pytest.approx([2.0, 1.0])
    assert growth._exponent(lengths, times[:2]).empty


def test_the_gpu_bench_runs_the_same_on_a_toy_without_a_gpu(
    subject: Subject, tmp_path: Path
) -> None:
    sizes = gpu.TOY
    sections = chosen(gpu.sections(subject, sizes), "end_to_end")
    run_sections(subject, sections, lambda m: gpu.targets(m, sizes), tmp_path / "gpu")
    judged = pd.read_csv(tmp_path / "gpu-targets.csv")
    num_seeing = len(QUICK.evicting(see_attention=True))
    for kernel in ("reference", "sdpa"):
        told = judged["figure"].str.contains(f"attention={kernel} over keydiff")
        assert told.sum() == num_seeing


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_gpu_bench_without_a_gpu_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_peak_memory_is_what_the_work_took_and_gave_back() -> None:
    held = torch.ones(2**24)  # 64 MiB before the work, which do not count
    measured = peak_bytes(lambda: torch.ones(2**25).sum(), torch.device("cpu"))
    assert measured["peak_extra_bytes"] == pytest.approx(2**27, rel=0.1)
    assert held.nbytes == 2**26


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_kvpress_answers_line_by_line(tmp_path: Path) -> None:
    python = script(
        tmp_path / "python",
        'echo \'{"torch": "2"}\'; while read -r job; do echo \'{"job_sec": 1.5}\'; done',
    )
    with KvpressServer(python, "folder") as server:
        assert server.versions == {"torch": "2"}
        job = {"budget_tokens": 8, "block_tokens": 4, "new_tokens": 1}
        assert [server.work([([1, 2, 3], 1)], **job) for _ in range(2)] == [1.5, 1.5]


def test_an_interpreter_without_kvpress_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stopped"):
        KvpressServer(script(tmp_path / "python", "exit 1"), "folder")
    with pytest.raises(UsageError, match="cannot be started"):
        KvpressServer(str(tmp_path / "none"), "folder")
    with pytest.raises(UsageError, match="random weights"):
        KvpressServer(script(tmp_path / "python", "exit 1"), None)


@pytest.mark.slow
def test_both_benches_import_where_hydra_and_datasets_are_missing() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "datasets")))  # None: cannot be imported
import kvarena.harness.bench.__main__, kvarena.harness.bench.gpu
"""
    subprocess.run([sys.executable, "-c", code], check=True)
