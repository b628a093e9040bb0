"""The command ``kvarena``: bad input is one line and exit code 2, good input is rows, once."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from faulty import Outcome, called, stopped_after_one_row, with_overrides
from kvarena.harness.budget import parse_budget
from kvarena.harness.command import run
from kvarena.harness.command.overrides import prepare_arguments, prepare_commands
from kvarena.harness.models import loading
from kvarena.harness.registry import build, choices, ready_policies
from kvarena.harness.report import after_run
from kvarena.harness.studies.reference import REPOSITORY
from kvarena.policies.keydiff import KeyDiff
from toy_folder import CONTEXT_TOKENS, toy_overrides

COLUMNS = [
    "task",
    "model",
    "policy",
    "budget",
    "sample_id",
    "status",
    "score",
    "prediction",
    "prompt_tokens",
    "generated_tokens",
    "kv_bytes_kept",
    "kv_bytes_peak",
    "ttft_sec",
    "decode_tokens_per_sec",
]


Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return toy_overrides(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def kvarena(
    overrides: list[str],
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """The command in this process, on the toy model: a process of its own takes seconds."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; this takes it back
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        given = [*overrides, f"results_dir={results}"]
        return called(with_overrides(given, arguments), monkeypatch, capsys)

    return call


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models loaded so far."""
    load, names = loading.load_weights, []

    def spy(spec: loading.ModelSpec, **options: str) -> object:
        names.append(spec.name)
        return load(spec, **options)

    monkeypatch.setattr(loading, "load_weights", spy)
    return names


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a run's second goes into tables and pictures."""
    monkeypatch.setattr(after_run, "report", lambda *arguments, **options: [])


def rows_of(results: Path) -> dict[str, list[dict]]:
    """Folder name without its hash -> rows."""
    found = sorted(results.glob("runs/**/samples.jsonl"))
    names = [path.parent.name.rpartition("-")[0] for path in found]
    assert len(set(names)) == len(names)
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in zip(names, found, strict=True)
    }


def num_cells(results: Path) -> int:
    return len(list(results.glob("runs/**/samples.jsonl")))


def ids(rows: list[dict]) -> list[str]:
    return sorted(row["sample_id"] for row in rows)


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "policy=keydif",
            "unknown policy 'keydif'. Did you mean keydiff? Available: caote, corm, critical",
        ),
        ("task=neadle", "unknown task 'neadle'. Did you mean needle? Available: "),
        ("model=smolm2", "unknown model 'smolm2'. Did you mean smollm2-135m? Available: "),
        ("sweeps=[budget=64]", "unknown setting 'sweeps'."),
        ("experiment=dmo", "unknown experiment 'dmo'. Did you mean demo? Available: "),
        ("bugdet=512", "unknown setting 'bugdet'. Did you mean budget? Available: "),
        ("+bugdet=512", "unknown setting 'bugdet'. Did you mean budget? Available: "),
        ("budget=0", "budget=0 is not a number of tokens (512), of 1024 tokens (2k, 8k), a share"),
        ("budget=-1", "budget=-1 is not"),
        ("budget=8kk", "budget=8kk is not"),
        ("budget=1.5", "budget=1.5 is not"),
        ("budget=1e3", "budget=1000.0 is not"),
        ("budget=nan", "budget=nan is not"),
        ("'budget=8 k'", "budget=8 k is not"),
        ("budget=101%", "budget=101% is not"),
        ("budget=0%", "budget=0% is not"),
        ("budget=null", "budget=None is not"),
        ("budget=", "budget= is not"),
        ("budget=[512]", "budget=[512] is not"),
        ("budget=64,96", "--multirun"),
        ("policy=snapkv budget=32", "32 tokens leaves nothing to choose: 32 tokens are protected"),
        ("policy.sinks=4 policy.recent=60", "64 tokens leaves nothing to choose: 64 tokens are"),
        (
            "task.lengths=[1100]",
            f"over the model's context of {CONTEXT_TOKENS}; use LENGTHS=1018 or",
        ),
        ("task.max_new_tokens=900", f"context of {CONTEXT_TOKENS}; use LENGTHS=124 or less (task."),
        ("task.lengths=[64]", "length 64 is too small"),
        ("task.lengths=abc", "lengths must be a list of different int values"),
        ("task.haystack=/nowhere", "haystack '/nowhere' is not a folder"),
        ("task.length=[1000]", "unknown task option 'length'. Did you mean lengths? Available: "),
        ("attention=flash", "attention=flash"),
        ("attention=falsh", "unknown attention 'falsh'. Did you mean flash? Available: sdpa, "),
        ("device=gpu", "device='gpu' is not a torch device; use cpu, cuda or cuda:N"),
        ("dtype=f8", "unknown dtype 'f8'. Available: float32, bfloat16, float16, auto"),
        ("limit=0", "limit must be >= 1, got 0"),
        (
            "limit=many",
            "error: limit=many: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("slots=0", "slots must be >= 1, got 0"),
        ("chunk=0", "chunk must be >= 1, got 0"),
        ("graphs=true", "graphs=true needs a CUDA device"),
        ("seed=x", "Value 'x' of type 'str' could not be converted to Integer"),
        ("sampling.temperature=-1", "sampling.temperature must be >= 0 and finite, got -1.0"),
        ("sampling.heat=1", "unknown sampling option 'heat'. Available: temperature, top_k, "),
        ("policy.anchr=raw", "unknown policy option 'anchr'. Did you mean anchor? Available: "),
        ("+policy.anchr=raw", "unknown KeyDiff option 'anchr'. Did you mean anchor? Available: "),
        (
            "policy.anchor=mean",
            "anchor must be one of raw, normalised, median, pairwise, got 'mean'",
        ),
        ("policy.sinks=four", "sinks must be int, got 'four'"),
        ("policy.sinks=1.5", "sinks must be int, got 1.5"),
        ("policy.sinks=null", "sinks must be int, got None"),
        ("policy=h2o policy.per_query=1", "per_query must be bool, got 1"),
        ("task._target_=os.system", "_target_ must name a class in kvarena, got 'os.system'"),
        ("~policy", "~policy: settings can be changed but not removed"),
        ("~budget", "~budget: settings can be changed but not removed"),
        ("model=custom model.source=null", "model toy names no source; give a hub id"),
        ("device=meta", "device='meta' has not been tried with kvarena; use cpu or cuda"),
        ("sampling.temperature=nan", "temperature must be >= 0 and finite, got nan"),
        ("keydiff", "'keydiff' is no setting with a value; did you mean policy=keydiff?"),
        ("budget 512", "'budget' is no setting with a value; did you mean budget=VALUE?"),
        ("data=sample", "unknown setting 'data'. Did you mean task.data ("),
        (
            "lengths=[1000]",
            "unknown setting 'lengths'. Did you mean task.lengths (needle, ruler, scbench)?",
        ),
        (
            "lenghts=[1000]",
            "unknown setting 'lenghts'. Did you mean task.lengths (needle, ruler, scbench)?",
        ),
        ("recent=64", "unknown setting 'recent'. Did you mean policy.recent"),
        (
            "window=8",
            "Did you mean policy.window (caote, corm, critical, curdkv, r_kv, snapkv) or codec.",
        ),
        ("temperature=1", "Did you mean sampling.temperature?"),
        ("task.data=sample", "(data is an option of "),
        (
            "-m policy=keydiff,snapkv policy.window=8",
            "(window is an option of caote, corm, critical, curdkv, r_kv, snapkv)",
        ),
        (
            "codec.bits=4",
            "unknown codec option 'bits'. Available: none (bits is an option of kivi)",
        ),
        ("policy=all", "policy=all is several policies; add --multirun"),
        ("policy=all,locret", "policy=all is several policies; add --multirun"),
        ("-m policy=all,lockret", "unknown policy 'lockret'. Did you mean locret? Available: "),
        ("-m task=all", "only policies have that word; write 'task=glob(*)' for every one"),
        ("policy=[keydiff,snapkv]", "policy takes a name; several of them with --multirun: "),
        ("policy=null", "unknown policy 'None'"),
        ("policy=", "unknown policy ''"),
        ("policy._target_=kvarena.policies.nope.X", "no module kvarena.policies.nope; leave "),
        ("policy._target_=kvarena.policies.keydiff.Nope", "names no Policy; leave _target_ as "),
        ("policy._target_=kvarena.tasks.needle.Needle", "names no Policy; leave _target_ as "),
        ("codec._target_=kvarena.policies.keydiff.KeyDiff", "names no Codec; leave _target_ as "),
        ("policy._target_=KeyDiff", "_target_ must name a class in kvarena, got 'KeyDiff'"),
        ("policy._target_=null", "_target_ must name a class in kvarena, got None"),
        ("model=/nowhere/toy", "model /nowhere/toy: there is no such folder; a hub id would be "),
        ("model=./toy-model", "model ./toy-model: there is no such folder"),
        ("-m model=org/a,org/b", "of several models, each must be a name from the list"),
        ("-m results_dir=/tmp/a,b", "put it in double quotes inside single ones: 'results_dir="),
        ("results_dir=", "results_dir= names no folder; results_dir=. is the one you are in"),
        ("'task.haystack=${foo}'", "Interpolation key 'foo' not found"),
        ("budget=[64", "budget=[64 is not a number of tokens"),
        ("-m --info=config", "of --run, --multirun (-m), --cfg (-c), --info (-i) and -sc give "),
        ("-m policy=keydiff,typo", "unknown policy 'typo'"),
        ("-m policy=glob(z*)", "policy: no match for ['z*']. Available: caote"),
        ("-m budget=64,8kk", "budget=8kk is not"),
        ("-m experiment=demo,dmo", "unknown experiment 'dmo'"),
    ],
)
def test_bad_input_is_one_line_and_code_2_before_a_model_loads(
    arguments: str, expected: str, kvarena: Command, results: Path, loads: list[str]
) -> None:
    outcome = kvarena(*shlex.split(arguments))
    assert outcome.err.startswith("error: ")
    assert expected in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.code == 2
    assert outcome.out == ""
    assert loads == []
    assert num_cells(results) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_cuda_device_is_one_line(kvarena: Command, loads: list[str]) -> None:
    outcome = kvarena("device=cuda")
    assert outcome.code == 2
    assert outcome.err == (
        "error: device=cuda asked for, but torch sees no CUDA device; use device=cpu\n"
    )
    assert loads == []


def test_a_hub_id_without_a_hub_is_one_line_that_says_what_to_do(kvarena: Command) -> None:
    outcome = kvarena("model=nobody/nothing")
    assert outcome.code == 2
    assert outcome.err == (
        "error: model nothing: cannot load 'nobody/nothing' (no such folder here, no earlier "
        "download, and HF_HUB_OFFLINE is set); give a folder that holds it "
        "(model=/path/to/folder), or go online or log in for a hub id\n"
    )


def test_a_folder_without_weights_is_one_line(
    kvarena: Command, overrides: list[str], tmp_path: Path
) -> None:
    model = Path(overrides[0].removeprefix("model="))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    outcome = kvarena(f"model={copy}")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: model copy: cannot load '{copy}' (")
    assert outcome.err.count("\n") == 1


def test_a_typo_is_told_without_waiting_for_torch() -> None:
    code = (
        "import sys\n"
        "from kvarena.harness.command.run import main\n"
        "try: main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    typo = subprocess.run(
        [sys.executable, "-c", code, "policy=keydif"], capture_output=True, text=True, check=False
    )
    assert typo.returncode == 2
    assert typo.stderr.startswith("error: unknown policy 'keydif'")


# ---- good input ----


def test_a_run_writes_rows_a_manifest_tables_and_pictures(
    kvarena: Command, results: Path, overrides: list[str]
) -> None:
    outcome = kvarena()
    assert outcome.code == 0
    ((name, rows),) = rows_of(results).items()
    assert name == "keydiff-64"
    assert len(rows) == 2
    for row in rows:
        assert set(COLUMNS) <= set(row)
        assert (row["task"], row["model"], row["policy"], row["budget"], row["status"]) == (
            "needle",
            "toy",
            "keydiff",
            "64",
            "ok",
        )
        assert row["score"] == 0
        assert 300 < row["prompt_tokens"] <= 400
        assert 1 <= row["generated_tokens"] <= 6
        assert 0 < row["kv_bytes_kept"] < row["kv_bytes_peak"]
        assert row["ttft_sec"] > 0
    assert sorted(row["meta_depth_target"] for row in rows) == [0, 100]
    (manifest_path,) = results.glob("runs/needle/toy/keydiff-64-*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    assert {row["run_id"] for row in rows} == {manifest["run_id"]}
    assert manifest["config"]["model"]["source"] == overrides[0].removeprefix("model=")
    assert manifest["config"]["budget"] == 64
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["identity"]["dtype"] == "float32"
    assert all(manifest["identity"]["content"].values())
    assert "chat_template_sha256" in manifest
    assert all(row["compressed"] for row in rows)
    table = pd.read_csv(results / "tables" / "needle.csv", dtype={"budget": str})
    assert sorted(table["sample_id"]) == ids(rows)
    assert set(COLUMNS) <= set(table.columns)
    summary = pd.read_csv(results / "tables" / "needle-summary.csv")
    assert summary["num_ok"].tolist() == [2]
    for picture in ("overview.png", "keydiff-64.png"):
        data = (results / "plots" / "needle" / "toy" / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert picture in outcome.out


def test_the_same_command_again_loads_no_model_and_adds_no_row(
    kvarena: Command, results: Path, loads: list[str]
) -> None:
    first = kvarena()
    assert loads == ["toy"]
    before = {path: path.read_bytes() for path in results.glob("runs/**/*.json*")}
    names = {"manifest.json", "sample_ids.json", "samples.jsonl", "status.json"}
    assert {path.name for path in before} == names
    second = kvarena()
    assert (first.code, second.code) == (0, 0)
    assert loads == ["toy"]
    assert "all 2 samples are there already" in second.out
    assert "needle.csv" in second.out
    assert {path: path.read_bytes() for path in results.glob("runs/**/*.json*")} == before


@pytest.mark.usefixtures("no_pictures")
def test_without_a_limit_the_rest_is_done_and_nothing_twice(
    kvarena: Command, results: Path
) -> None:
    kvarena("limit=1")
    (limited,) = rows_of(results).values()
    assert len(limited) == 1
    kvarena()
    (complete,) = rows_of(results).values()
    assert complete[0] == limited[0]
    assert len(set(ids(complete))) == len(complete) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_was_stopped_goes_on_where_it_stopped(kvarena: Command, results: Path) -> None:
    with stopped_after_one_row() as written:
        stopped = kvarena()
    assert stopped.code == 130
    assert "finished samples are kept. The same command goes on" in stopped.err
    (path,) = results.glob("runs/**/status.json")
    assert json.loads(path.read_text())["state"] == "cancelled"
    assert kvarena().code == 0
    assert json.loads(path.read_text())["state"] == "done"
    (rows,) = rows_of(results).values()
    assert rows[0]["sample_id"] == written[0]
    assert len(set(ids(rows))) == len(rows) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_torn_row_runs_again_and_says_the_same(kvarena: Command, results: Path) -> None:
    kvarena()
    (path,) = results.glob("runs/**/samples.jsonl")
    (before,) = rows_of(results).values()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="torn last line"):
        assert kvarena().code == 0
    (after,) = rows_of(results).values()
    for old, new in zip(before, after, strict=True):
        assert [old[name] for name in COLUMNS[:10]] == [new[name] for name in COLUMNS[:10]]


def test_a_damaged_row_is_named_with_its_line(kvarena: Command, results: Path) -> None:
    kvarena()
    (path,) = results.glob("runs/**/samples.jsonl")
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:40] + b"\n" + b"".join(rest))
    outcome = kvarena()
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {path} line 1 is damaged")
    assert outcome.err.count("\n") == 1


def test_a_run_whose_every_sample_failed_ends_with_its_tables(
    kvarena: Command, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(policy: KeyDiff, view: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(KeyDiff, "score", fail)
    outcome = kvarena()
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "needle keydiff 64: 2 of 2 samples failed and are in no score; the same command runs them "
        "again"
    )
    assert outcome.err.count("Traceback") <= 1  # of the first sample
    written = outcome.out.partition("Written:\n")[2].split()
    assert written == [str(results / "tables" / f"needle{kind}.csv") for kind in ("", "-summary")]
    assert pd.read_csv(written[0])["status"].tolist() == ["error", "error"]
    assert pd.read_csv(written[1])["num_ok"].tolist() == [0]
    # Beside a policy that works, it is a line without a score.
    beside = kvarena("-m", "policy=keydiff,snapkv")
    assert beside.code == 1
    assert pd.read_csv(results / "tables" / "needle-summary.csv")["num_ok"].tolist() == [2, 0]


def test_a_sweep_runs_every_combination_and_loads_the_model_once(
    kvarena: Command, results: Path, loads: list[str]
) -> None:
    assert kvarena("-m", "policy=keydiff,snapkv", "budget=64,25%").code == 0
    found = rows_of(results)
    assert set(found) == {"keydiff-64", "keydiff-25%", "snapkv-64", "snapkv-25%"}
    assert len({tuple(ids(rows)) for rows in found.values()}) == 1
    for name, rows in found.items():
        for row in rows:
            assert f"{row['policy']}-{row['budget']}" == name
            share = -(-row["prompt_tokens"] // 4)
            assert row["budget_tokens"] == (64 if row["budget"] == "64" else share)
    assert loads == ["toy"]
    assert len(pd.read_csv(results / "tables" / "needle.csv")) == 8
    assert len(pd.read_csv(results / "tables" / "needle-summary.csv")) == 4
    pictures = {path.stem for path in (results / "plots" / "needle" / "toy").glob("*.png")}
    assert pictures == {"overview", *found}


@pytest.mark.usefixtures("no_pictures")
def test_flags_may_stand_among_the_overrides(
    kvarena: Command, overrides: list[str], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvarena("--version")  # puts everything in place for the call below
    argv = [*overrides, f"results_dir={results}", "limit=1", "-m", "budget=64,96", "seed=1"]
    monkeypatch.setattr(sys, "argv", ["kvarena", *argv])
    run.main()
    assert set(rows_of(results)) == {"keydiff-64", "keydiff-96"}


@pytest.mark.usefixtures("no_pictures")
def test_every_spelling_of_a_budget_runs(kvarena: Command, results: Path) -> None:
    assert kvarena("-m", "budget=512,2k,8K,25%,full", "limit=1").code == 0
    tokens = {name: row["budget_tokens"] for name, (row,) in rows_of(results).items()}
    (share,) = {-(-row["prompt_tokens"] // 4) for (row,) in rows_of(results).values()}
    assert tokens == {
        "keydiff-512": 512,
        "keydiff-2k": 2048,
        "keydiff-8k": 8192,
        "keydiff-25%": share,
        "keydiff-full": None,
    }


def test_the_full_cache_under_two_budgets_is_one_cell(kvarena: Command, results: Path) -> None:
    outcome = kvarena("-m", "policy=full", "budget=64,96")
    assert outcome.code == 0
    ((name, rows),) = rows_of(results).items()
    assert (name, len(rows)) == ("full-full", 2)
    assert len(pd.read_csv(results / "tables" / "needle.csv")) == 2


@pytest.mark.usefixtures("no_pictures", "toy_heads")
def test_a_glob_sweeps_every_policy(kvarena: Command, results: Path) -> None:
    assert kvarena("-m", "policy=glob(*)", "limit=1").code == 0
    policies = {row["policy"] for rows in rows_of(results).values() for row in rows}
    assert policies == set(choices("policy"))


@pytest.mark.usefixtures("no_pictures")
def test_all_policies_are_those_that_need_no_trained_file(kvarena: Command, results: Path) -> None:
    assert kvarena("-m", "policy=all", "limit=1").code == 0
    policies = {row["policy"] for rows in rows_of(results).values() for row in rows}
    assert policies == set(ready_policies()) < set(choices("policy"))


def test_all_policies_and_more_are_each_there_once() -> None:
    (_, argument) = prepare_arguments(["-m", "policy='all',locret,full"])
    assert argument == f"policy={','.join([*ready_policies(), 'locret'])}"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "setting",
    [
        "policy.anchor=median",
        "seed=1",
        "dtype=bfloat16",
        "budget=65",
        "chunk=64",
        "attention=reference",
        "sampling.temperature=1",
        "task.max_new_tokens=5",
    ],
)
def test_a_setting_that_could_change_answers_gets_a_folder_of_its_own(
    setting: str, kvarena: Command, results: Path
) -> None:
    kvarena("limit=1")
    assert kvarena("limit=1", setting).code == 0
    assert num_cells(results) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_model_folder_is_one_model_from_wherever_it_is_named(
    kvarena: Command, results: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kvarena("limit=1")
    folder = Path(overrides[0].removeprefix("model="))
    monkeypatch.chdir(folder)
    for location in (".", f"../{folder.name}", f"{folder}/"):
        assert kvarena("limit=1", f"model={location}").code == 0
    (rows,) = rows_of(results).values()
    assert [row["model"] for row in rows] == ["toy"]


@pytest.mark.usefixtures("no_pictures")
def test_slots_share_a_folder(kvarena: Command, results: Path) -> None:
    depths = "task.depths=[0,50,100]"
    kvarena("slots=1", "limit=1", depths)
    assert kvarena("slots=4", depths).code == 0
    (rows,) = rows_of(results).values()
    assert [row["slots"] for row in rows] == [1, 2, 2]  # as many as there were samples


@pytest.mark.usefixtures("no_pictures")
def test_changed_options_are_in_the_label(kvarena: Command, results: Path) -> None:
    assert kvarena("policy.anchor=median", "policy.sinks=2", "limit=1").code == 0
    ((row,),) = rows_of(results).values()
    assert row["policy"] == "keydiff(sinks=2,anchor=median)"


def test_an_impossible_cell_does_not_stop_a_sweep(kvarena: Command, results: Path) -> None:
    outcome = kvarena("-m", "policy=snapkv,keydiff", "budget=32")
    assert outcome.code == 2
    assert outcome.err.startswith("error: a budget of 32 tokens leaves nothing to choose")
    assert "Error executing job" not in outcome.err
    assert set(rows_of(results)) == {"keydiff-32"}
    assert "needle.csv" in outcome.out


def test_a_failure_of_ours_has_a_traceback_and_code_1(
    kvarena: Command, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loading, "load_weights", fail)
    outcome = kvarena()
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert outcome.err.count("RuntimeError: out of luck") == 1
    assert not (results / "tables").exists()


def test_help_lists_the_choices_and_the_settings(kvarena: Command) -> None:
    outcome = kvarena("--help")
    assert outcome.code == 0
    for text in [*choices("policy"), *choices("task"), *choices("model"), "budget: 64", "slots: 8"]:
        assert text in outcome.out


def test_the_installed_command_runs_from_another_folder(
    overrides: list[str], tmp_path: Path
) -> None:
    command = Path(sys.executable).with_name("kvarena")
    start = (
        [str(command)]
        if command.exists()
        else [sys.executable, "-m", "kvarena.harness.command.run"]
    )
    done = subprocess.run(
        [*start, *overrides, "limit=1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = rows_of(tmp_path / "results").values()
    assert len(rows) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


# ---- experiments ----


def jobs_of(*arguments: str) -> list[dict[str, Any]]:  # Any: resolved settings
    """The settings of every job of a command, composed by Hydra, with the choices' names."""
    jobs = []
    run.register_settings()
    for command in prepare_commands(["-m", *arguments]):
        GlobalHydra.instance().clear()
        with initialize_config_module("kvarena.conf", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            overrides = OverridesParser.create(loader).parse_overrides(command[1:])
            (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
            for job in batch:
                settings = compose("config", overrides=job, return_hydra_config=True)
                names = dict(settings.hydra.runtime.choices)
                plain = {name: settings[name] for name in settings if name != "hydra"}
                jobs.append(OmegaConf.to_container(OmegaConf.create(plain)) | {"names": names})
    return jobs


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_job_of_every_experiment_can_be_built(name: str) -> None:
    jobs = jobs_of(f"experiment={name}")
    assert len(jobs) >= 7
    for job in jobs:
        for group in ("task", "policy", "codec"):
            build(job[group])
        assert parse_budget(job["budget"])


def test_the_experiment_at_equal_bytes_runs_the_methods_that_are_recorded() -> None:
    recorded = pd.read_csv(REPOSITORY / "results" / "equal-bytes" / "equal-bytes.csv")
    methods = {
        (policy.partition("+")[0], str(codec).partition("(")[0], budget)
        for policy, codec, budget in recorded[["policy", "codec", "budget"]].to_numpy()
    }
    jobs = jobs_of("experiment=equal_bytes")
    planned = {(job["names"]["policy"], job["names"]["codec"], job["budget"]) for job in jobs}
    assert len(jobs) == len(planned) == 28
    assert methods < planned
    tight, wide = ({one[:2] for one in planned if one[2] == size} for size in ("12MB", "20MB"))
    assert wide == tight | {("full", "zipcache")}
    assert {job["kv_dtype"] for job in jobs} == {"float16"}
    assert {job["codec"]["window"] for job in jobs if "window" in job["codec"]} == {64}


def test_what_is_typed_counts_more_than_an_experiment() -> None:
    jobs = jobs_of("budget=64", "experiment=demo", "policy=h2o,tova", "policy.recent=4", "limit=1")
    assert [(job["names"]["policy"], job["budget"]) for job in jobs] == [("h2o", 64), ("tova", 64)]
    assert {(job["policy"]["recent"], job["limit"]) for job in jobs} == {(4, 1)}


def test_of_several_experiments_each_runs_its_own_sweeps_and_all_share_a_table(
    kvarena: Command, results: Path
) -> None:
    arguments = ("-m", "experiment=demo,reference_needle", "policy=keydiff,tova", "limit=1")
    outcome = kvarena(*arguments)
    assert (outcome.code, outcome.err.count("error")) == (0, 0)
    assert num_cells(results) == 4
    rows = pd.read_csv(results / "tables" / "needle.csv")
    assert sorted(rows["policy"].str.partition("@")[0]) == ["keydiff"] * 2 + ["tova"] * 2


def test_an_experiment_with_sweeps_needs_the_flag_unless_it_is_only_shown(
    kvarena: Command, loads: list[str]
) -> None:
    outcome = kvarena("experiment=demo")
    assert (outcome.code, outcome.out, loads) == (2, "", [])
    assert outcome.err == "error: experiment=demo is a sweep; add --multirun\n"
    assert kvarena("--cfg=job", "experiment=demo").code == 0


# ---- flags ----


@pytest.fixture
def flags(
    kvarena: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command with these arguments and no others."""

    def call(*arguments: str) -> Outcome:
        return called(arguments, monkeypatch, capsys)

    return call


def test_the_version_is_that_of_kvarena(flags: Command) -> None:
    outcome = flags("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"kvarena {metadata.version('kvarena')} ")


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o nospace -o default -F hydra_bash_completion kvarena"),
        ("zsh", "complete -o nospace -o default -F hydra_bash_completion kvarena"),
        ("fish", "complete -c kvarena -x -a '(hydra_fish_completion)'"),
    ],
)
def test_shell_completion_is_a_script_as_the_help_says(
    shell: str, line: str, flags: Command
) -> None:
    outcome = flags("-sc", f"install={shell}")
    assert (outcome.code, outcome.err) == (0, "")
    assert line in outcome.out
    assert flags("-sc", f"uninstall={shell}").code == 0
    assert 'eval "$(kvarena -sc install=bash)"' in flags("--help").out


def test_the_completion_completes(flags: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "kvarena policy=keyd")
    assert flags("-sc", "query=bash").out.split() == ["policy=keydiff"]


@pytest.mark.parametrize("commands", [[], ["install=csh"], ["budget=64"], ["install=bash", "x=1"]])
def test_another_completion_than_there_is_is_one_line(commands: list[str], flags: Command) -> None:
    outcome = flags("-sc", *commands)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "write install=SHELL or uninstall=SHELL; SHELL is bash, fish, zsh" in outcome.err


# ---- values that are text ----

NAMES = (
    *("a~b", "a=b", "a$b", "a$(b)", "a(b", "[a]b", 'a"b', 'a" b "c', "a b", "a#b", "a:b", "a{b}"),
    *("a%b", "a\\b", "a;b&c", "été 汉", "it's", "a,b(c"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["results_dir", "task.data", "+task.options.data"])
def test_a_path_of_any_signs_arrives_as_typed(key: str, name: str) -> None:
    (argument,) = prepare_arguments([f"{key}=/tmp/{name}"])
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert override.get_key_element() == key
    assert override.value() == f"/tmp/{name}"


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, expected in (
        ("~", "/home/me"),
        ("~/a,b", "/home/me/a,b"),
        ('"~/a,b"', "/home/me/a,b"),
        ("./~", "./~"),
        ("/x/~y", "/x/~y"),
    ):
        (argument,) = prepare_arguments([f"task.data={value}"])
        (override,) = OverridesParser.create().parse_overrides([argument])
        assert override.value() == expected


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_model_and_results_in_folders_of_any_signs_run(
    mode: list[str], kvarena: Command, overrides: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "m,o=d(e)l~ $[]\"x'"
    shutil.copytree(overrides[0].removeprefix("model="), folder)
    results = tmp_path / "r,e=s(u)l~ $[]\"t'"
    quoted = str(results).replace('"', '\\"')
    outcome = kvarena(*mode, f"model={folder}", f'results_dir="{quoted}"', "limit=1")
    assert (outcome.code, outcome.err.count("error")) == (0, 0)
    ((row,),) = rows_of(results).values()
    assert row["model"] == folder.name
    assert {path.name for path in results.iterdir()} == {"runs", "tables", "plots"} | (
        {"sweeps"} if mode else set()
    )


def test_an_interpolation_is_resolved_for_the_sweep_as_well(
    kvarena: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert kvarena("-m", "results_dir=${oc.env:SCRATCH}/r", "mode=plan").code == 0
    assert {path.name for path in (tmp_path / "scratch" / "r").iterdir()} == {"runs", "sweeps"}
    assert {path.name for path in tmp_path.iterdir()} == {"scratch"}


@pytest.mark.usefixtures("no_pictures")
def test_a_limit_over_everything_takes_everything(kvarena: Command, results: Path) -> None:
    assert kvarena(f"limit={10**30}").code == 0
    (rows,) = rows_of(results).values()
    assert len(rows) == 2


def test_an_unknown_flag_is_not_told_as_a_run_that_was_stopped(kvarena: Command) -> None:
    outcome = kvarena("--bogus")
    assert outcome.code == 2
    assert "unrecognized arguments: --bogus" in outcome.err
    assert "stopped" not in outcome.err


# ---- options in sweeps ----


@pytest.mark.usefixtures("no_pictures")
def test_an_option_of_swept_codecs_is_one_of_each(kvarena: Command, results: Path) -> None:
    outcome = kvarena("-m", "codec=kivi,kvcomp", "codec.window=32", "budget=128", "limit=1")
    assert (outcome.code, outcome.err.count("error")) == (0, 0)
    codecs = {row["codec"] for rows in rows_of(results).values() for row in rows}
    assert codecs == {"kivi(window=32)", "kvcomp(window=32)"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("policy", "option", "label"),
    [
        ("h2o", "policy.per_query=true", "h2o(per_query=True)"),
        ("l2norm", "policy.skip_layers=[0,2]", "l2norm(skip_layers=[0, 2])"),
        ("snapkv", "policy.pooling='avg'", "snapkv(pooling=avg)"),
    ],
)
def test_an_option_of_a_swept_policy_arrives_whatever_it_holds(
    policy: str, option: str, label: str, kvarena: Command, results: Path
) -> None:
    assert kvarena("-m", option, f"policy=choice({policy})", "limit=1").code == 0
    ((row,),) = rows_of(results).values()
    assert row["policy"] == label


@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_any_signs_arrives_at_each_of_swept_tasks(name: str) -> None:
    arguments = prepare_arguments(["-m", "task=math500,gsm8k", f"task.data=/tmp/{name}"])
    (batch,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(arguments[1:]), max_batch_size=None
    )
    for task, (chosen, option) in zip(("math500", "gsm8k"), batch, strict=True):
        assert chosen == f"task={task}"
        (override,) = OverridesParser.create().parse_overrides([option])
        assert override.value() == f"/tmp/{name}"


def test_an_option_that_one_of_the_swept_lacks_stops_all_before_the_first_cell(
    kvarena: Command, results: Path, loads: list[str]
) -> None:
    for policies in ("snapkv,keydiff", "all"):
        outcome = kvarena("-m", f"policy={policies}", "policy.window=8")
        assert (outcome.code, outcome.err.count("\n"), loads) == (2, 1, [])
        assert "unknown policy option 'window'" in outcome.err
        assert "(window is an option of caote, corm, critical, curdkv, r_kv, snapkv)" in outcome.err
