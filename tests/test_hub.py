"""data=hub: files at the pinned commit from a hub on this machine, or one line without a hub.

Each test runs in processes of its own: the hub's address is read when its client is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_mirror import hub_mirror
from kvarena.tasks import math500
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from kvarena.tasks.gsm8k import Gsm8k
from kvarena.tasks.longbench import data
from toy_folder import save_model_folder

SHARED = Path(os.environ.get("KVARENA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
COMMIT = "0123456789" * 4
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
FETCH = f"""
import sys, time
from kvarena.tasks.benchmark.downloads import HubFile
started = time.monotonic()
try:
    print(HubFile("org/set", "{COMMIT}", "rows/a.jsonl", sys.argv[1]).fetch().read_text())
except (OSError, ValueError) as error:
    print(type(error).__name__, error, f"after {{time.monotonic() - started:.0f}} s")
"""


def python(
    folder: Path, endpoint: str, *arguments: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """A process whose hub is at ``endpoint`` and keeps its files in ``folder``."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": str(int(offline))
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_downloaded_once_at_its_commit_and_is_there_offline(tmp_path: Path) -> None:
    with hub_mirror({("org/set", COMMIT, "rows/a.jsonl"): b"{}"}) as mirror:
        first = python(tmp_path, mirror.endpoint, "-c", FETCH, sha256(b"{}"))
        assert (first.stdout, first.stderr) == ("{}\n", ""), "no progress bar"
        assert f"GET /datasets/org/set/resolve/{COMMIT}/rows/a.jsonl" in mirror.asked
        num_asked = len(mirror.asked)
        again = python(tmp_path, mirror.endpoint, "-c", FETCH, sha256(b"{}"))
        assert again.stdout == "{}\n"
        assert len(mirror.asked) == num_asked
    assert python(tmp_path, NOWHERE, "-c", FETCH, sha256(b"{}")).stdout == "{}\n"
    assert python(tmp_path, NOWHERE, "-c", FETCH, sha256(b"{}"), offline=True).stdout == "{}\n"


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    with hub_mirror({("org/set", COMMIT, "rows/a.jsonl"): b"{ }"}) as mirror:
        done = python(tmp_path, mirror.endpoint, "-c", FETCH, sha256(b"{}"))
    assert done.stdout.startswith("ValueError ")
    assert f"has sha256 {sha256(b'{ }')}, pinned is {sha256(b'{}')}; delete it" in done.stdout


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_there_is_one_try_and_no_waiting(tmp_path: Path, offline: bool) -> None:
    done = python(tmp_path, NOWHERE, "-c", FETCH, "", offline=offline)
    assert done.stdout.startswith("OSError OfflineModeIsEnabled" if offline else "OSError Connect")
    assert int(done.stdout.split()[-2]) < 5
    assert "Retrying" not in done.stderr


def test_a_file_that_the_hub_does_not_have_is_refused(tmp_path: Path) -> None:
    with hub_mirror({("org/set", COMMIT, "other.jsonl"): b"{}"}) as mirror:
        done = python(tmp_path, mirror.endpoint, "-c", FETCH, "")
    assert done.stdout.startswith("OSError "), done


def command(
    tmp_path: Path, endpoint: str, *overrides: str, offline: bool = False
) -> tuple[int, str]:
    """Exit code and what stands on stderr of a plan, which reads all data and no weights."""
    model = tmp_path / "toy"
    if not model.exists():
        save_model_folder(model)
    arguments = [f"model={model}", f"results_dir={tmp_path / 'results'}", "mode=plan", *overrides]
    started = time.monotonic()
    done = python(
        tmp_path, endpoint, "-m", "kvarena.harness.command.run", *arguments, offline=offline
    )
    assert time.monotonic() - started < 60
    return done.returncode, done.stderr


@pytest.mark.parametrize(("task", "offline"), [("longbench", True), ("math500", False)])
def test_the_command_says_in_one_line_how_to_get_the_data(
    tmp_path: Path, task: str, offline: bool
) -> None:
    code, err = command(tmp_path, NOWHERE, f"task={task}", offline=offline)
    assert code == 2
    assert err.startswith(f"error: {task}: data 'hub' cannot be read: ")
    assert err.count("\n") == 1
    assert "Ways to get" in err


LONGBENCH = """
import json, sys
from dataclasses import replace
from kvarena.tasks.longbench import data
from kvarena.tasks.longbench import LongBench
from toy_tokenizers import CharTokenizer
pins = json.loads(sys.argv[1])
data.DATA_ZIP = replace(data.DATA_ZIP, sha256=pins["zip"])
data.SETTINGS = tuple(
    replace(file, url=url, sha256=sha256)
    for file, (url, sha256) in zip(data.SETTINGS, pins["settings"], strict=True)
)
task = LongBench(data="hub", tasks="qasper,lcc")
samples = task.samples(CharTokenizer('USER: {} ASSISTANT:', has_start=True), 0)
labels = {sample.meta["data"] for sample in samples}
print(json.dumps([[s.id for s in samples], task.data_fingerprint(), *labels]))
"""


def test_longbench_comes_from_the_zip_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = SAMPLE_FOLDER / "longbench"
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("qasper", "lcc"):
            archive.write(sample / f"{name}.jsonl", f"data/{name}.jsonl")
    pinned = data.DATA_ZIP
    files = {(pinned.repo, pinned.revision, pinned.name): packed.getvalue()}
    names = (data.PROMPTS, data.LENGTHS)
    files |= {("web/config", COMMIT, name): (sample / name).read_bytes() for name in names}
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with hub_mirror(files) as mirror:
        web = f"{mirror.endpoint}/datasets/web/config/resolve/{COMMIT}"
        settings = [[f"{web}/{name}", sha256((sample / name).read_bytes())] for name in names]
        pins = json.dumps({"zip": sha256(packed.getvalue()), "settings": settings})
        done = python(tmp_path, mirror.endpoint, "-c", LONGBENCH, pins)
    assert done.returncode == 0, done.stderr
    ids, fingerprint, label = json.loads(done.stdout)
    assert label == "hub:zai-org/LongBench@5e628be"
    local = python(tmp_path, NOWHERE, "-c", LONGBENCH.replace('"hub"', '"sample"'), pins)
    assert [ids, fingerprint, "sample"] == json.loads(local.stdout)


GSM8K = """
import json, sys
from dataclasses import replace
from kvarena.tasks.gsm8k import Gsm8k
pinned = replace(Gsm8k.problems.hub, sha256=sys.argv[1])
Gsm8k.problems = replace(Gsm8k.problems, hub=pinned)
print(json.dumps(Gsm8k.problems.load("hub")))
"""


def test_gsm8k_comes_from_the_parquet_on_the_hub(tmp_path: Path) -> None:
    rows = Gsm8k.problems.load("sample")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    pinned = Gsm8k.problems.hub
    with hub_mirror({(pinned.repo, pinned.revision, pinned.name): content}) as mirror:
        done = python(tmp_path, mirror.endpoint, "-c", GSM8K, sha256(content))
        other = python(tmp_path, mirror.endpoint, "-c", GSM8K, pinned.sha256)
    assert json.loads(done.stdout) == rows, done.stderr
    assert "pinned is ee7b8da9e381df27" in other.stderr


@pytest.mark.shared_data
def test_math500_comes_from_the_hub_by_the_command_with_its_real_pin(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    pinned = math500.TEST_FILE
    content = (SHARED / "math500" / "test.jsonl").read_bytes()
    options = ["task=math500", "task.max_new_tokens=1", "limit=1"]
    with hub_mirror({(pinned.repo, pinned.revision, pinned.name): content}) as mirror:
        assert command(tmp_path, mirror.endpoint, *options) == (0, "")
    assert command(tmp_path, NOWHERE, *options, offline=True) == (0, ""), "from the cache"
