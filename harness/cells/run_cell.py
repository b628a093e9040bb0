"""Bring one cell's rows up to date: claim its folder, run what is missing, survive what fails."""

import gc
import hashlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvarena.harness.cells.byte_budget import fit_cell
from kvarena.harness.cells.cell import Cell
from kvarena.harness.cells.sample_rows import Job, failure, settings_of
from kvarena.harness.errors import UsageError
from kvarena.harness.models import ModelSpec, loading
from kvarena.harness.provenance import now
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.tasks.base import Sample

_GIVE_UP_AFTER = 3  # failures with no success: the next samples would fail as well
_UNTOLD = ("invalid", "score_error")  # no exception reaches _report_failure, only the row says why


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command leaves in one cell.

    num_new: samples it ran; num_failed: those among them without an "ok" row.
    """

    path: Path
    sample_ids: frozenset[str]
    num_new: int
    num_failed: int


def run_cell(cell: Cell, results_dir: Path, *, repair: bool = False, wait: bool = False) -> Outcome:
    """Run the shard's samples without an "ok" row. The model loads only if there are any.

    repair, wait: see rows and claimed of CellFolder, which raise UsageError without.
    """
    folder = CellFolder(results_dir, cell.identity, cell.shard)
    tokenizer = loading.load_tokenizer(cell.model)
    all_samples = cell.samples(tokenizer)
    samples = cell.part(all_samples)
    planned = frozenset(sample.id for sample in samples)
    with folder.claimed(wait=wait):
        rows = folder.rows(repair=repair)
        done = {row["sample_id"] for row in rows if row.get("status") == "ok"}
        missing = [sample for sample in samples if sample.id not in done]
        if missing:
            template = tokenizer.chat_template
            template_sha256 = template and hashlib.sha256(template.encode()).hexdigest()
            folder.open(asdict(cell.settings), chat_template_sha256=template_sha256)
        folder.note_samples(sample.id for sample in all_samples)
        if not missing:
            print(f"{cell.label}: all {len(samples)} samples are there already")
            return Outcome(path=folder.path, sample_ids=planned, num_new=0, num_failed=0)
        counted = [r for r in rows if cell.shard is None or cell.shard.holds(r["sample_id"])]
        folder.begin(len(all_samples), Counter(str(row.get("status")) for row in counted))
        num_ok, reason = 0, ""
        try:
            model = _load_once(cell.model, cell.settings.device, cell.settings.dtype)
            in_bytes = cell.bound.bytes is not None
            job = Job(
                cell=cell,
                model=model,
                tokenizer=tokenizer,
                fit=fit_cell(cell, model, tokenizer, folder.path) if in_bytes else None,
                cache_dir=results_dir / "cache",
                dialogues=cell.dialogues(all_samples),
            )
            for row in _rows_whatever_happens(job, missing, folder.path):
                folder.append(row)
                num_ok += row["status"] == "ok"
                if row["status"] in _UNTOLD:
                    reason = reason or f"\nthe first of them: {row['error']}"
        except BaseException as error:
            stopped = not isinstance(error, Exception)  # Ctrl-C, or a scheduler that wants us gone
            with suppress(OSError):  # on a full disk the first error is the one to tell
                folder.write_status("cancelled" if stopped else "failed")
            raise
        num_failed = len(missing) - num_ok
        folder.write_status("failed" if num_failed else "done")
    if num_failed:
        print(
            f"{cell.label}: {num_failed} of {len(samples)} samples failed and are in no score; "
            f"the same command runs them again{reason}",
            file=sys.stderr,
        )
    return Outcome(
        path=folder.path, sample_ids=planned, num_new=len(missing), num_failed=num_failed
    )


def _rows_whatever_happens(
    job: Job, samples: Sequence[Sample], folder: Path
) -> Iterator[dict[str, Any]]:
    """A row per sample, as they end. Where one fails, those left run one by one.

    Gives up when the first few fail one after the other: then it is not theirs.
    """
    left = {sample.id: sample for sample in samples}
    try:
        for row in job.rows(samples):
            del left[row["sample_id"]]
            yield row
        return
    except (UsageError, NotImplementedError):
        raise  # what cannot be run at all, said before any work
    except Exception as error:
        _report_failure(job.cell, error, folder)
    num_ok, num_failed = len(samples) - len(left), 0
    for sample in list(left.values()):
        try:
            (row,) = job.rows([sample])
        except Exception as error:
            num_failed += 1
            _forget(error)
            yield settings_of(job.cell, sample, job.allowance(sample)) | failure(error)
            if num_failed == _GIVE_UP_AFTER and not num_ok:
                print(
                    f"{job.cell.label}: gave up, the first {num_failed} samples all failed",
                    file=sys.stderr,
                )
                return
        else:
            num_ok += 1
            yield row


def _report_failure(cell: Cell, error: Exception, folder: Path) -> None:
    """Tell at once in one line; the rest goes to a file of the cell."""
    path = folder / "errors.log"
    with path.open("a") as log:
        print(now(), file=log)
        traceback.print_exception(error, file=log)
    what = failure(error)["error"]
    print(
        f"{cell.label}: a sample failed; going on one by one\n{what}\n(more in {path})",
        file=sys.stderr,
    )
    _forget(error)


def _forget(error: BaseException) -> None:
    """Let go of the frames of an error and of its cause, which hold the caches of all slots."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load_once(spec: ModelSpec, device: str, dtype: str) -> PreTrainedModel:
    """Sweeps in one process load a model once; the old one goes before a new one comes."""
    held, wanted = _held_model(), (spec, device, dtype)
    if wanted not in held:
        held.clear()
        held[wanted] = loading.load_weights(spec, device=device, dtype=dtype)
    return held[wanted]


@cache
def _held_model() -> dict[tuple[ModelSpec, str, str], PreTrainedModel]:
    """At most one model, for the life of the process."""
    return {}
