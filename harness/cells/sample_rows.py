"""Rows of a cell's samples as the engine ends them: generated and scored, or forced."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvarena.harness.cells.byte_budget import Fit, tighter
from kvarena.harness.cells.cell import Allowance, Cell
from kvarena.harness.cells.forced_answers import forced_answers
from kvarena.harness.engine import Generation, Request
from kvarena.harness.engine.request import stop_tokens
from kvarena.harness.errors import UsageError
from kvarena.harness.models.kv_size import compression
from kvarena.harness.progress import TokenProgress
from kvarena.harness.provenance import commit_label
from kvarena.harness.store.row_files import is_score
from kvarena.tasks.base import Sample, Task, Tokenizer, content_id

Planned = tuple[Sample, Allowance]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell with what it needs to run.

    fit: of a budget in bytes; cache_dir: what cells share; dialogues: all turns, by context.
    """

    cell: Cell
    model: PreTrainedModel
    tokenizer: Tokenizer
    fit: Fit | None
    cache_dir: Path
    dialogues: Mapping[str, Sequence[Sample]] = field(default_factory=dict)

    def rows(self, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        """One finished row per sample, as they end; stops at the first that fails.

        A sample that held more bytes than the budget allows runs again with less, until it fits.
        """
        planned = [(sample, self.allowance(sample)) for sample in samples]
        while planned:
            again: list[Planned] = []
            by_id = {sample.id: (sample, allowed) for sample, allowed in planned}
            for row in self._rows_once(planned):
                sample, allowed = by_id[row["sample_id"]]
                try:
                    less = self._less(row, allowed)
                except UsageError as error:  # of this sample; others may fit
                    yield settings_of(self.cell, sample, allowed) | failure(error)
                    continue
                if less is None:
                    yield row
                else:
                    again.append((sample, less))
            planned = again

    def allowance(self, sample: Sample) -> Allowance:
        """What the sample may hold, by the cell's budget."""
        if self.fit is not None:
            return self.fit.allowance(self.cell.codec)
        return Allowance(budget_tokens=self.cell.budget_tokens(sample), codec=self.cell.codec)

    def request(self, sample: Sample, allowed: Allowance) -> Request:
        """The sample as the engine is asked for it."""
        stops = set(stop_tokens(self.model))
        if sample.stop_newline:
            stops.add(self.tokenizer.encode("\n", add_special_tokens=False)[-1])
        context = None
        if self.cell.shares_contexts(sample):
            assert sample.context is not None, "asked just now"
            # Where bytes settle the budget, questions of one context may end up with two.
            context = f"{sample.context.id} in {allowed.budget_tokens} tokens"
        return Request(
            prompt=sample.prompt_token_ids,
            max_new_tokens=sample.max_new_tokens,
            budget_tokens=allowed.budget_tokens,
            question_tokens=self.cell.question_tokens(sample),
            room_tokens=self.cell.room_tokens(sample),
            context=context,
            seed=int(content_id(self.cell.settings.seed, sample.id), 16) >> 1,
            stop_token_ids=stops,
            min_new_tokens=int(sample.stop_newline),
        )

    def requests(
        self, planned: Sequence[Planned]
    ) -> tuple[list[Request], Sequence[Planned | None]]:
        """All that the engine is asked, and whose row each answer becomes.

        A dialogue starts from its first turn; None for turns that are not planned, having rows.
        """
        if not self.dialogues:
            return [self.request(sample, allowed) for sample, allowed in planned], planned
        by_id = {sample.id: (sample, allowed) for sample, allowed in planned}
        requests: list[Request] = []
        answers: list[Planned | None] = []
        for turns in self.dialogues.values():
            wanted = [turn for turn, sample in enumerate(turns) if sample.id in by_id]
            if not wanted:
                continue
            _, allowed = by_id[turns[wanted[0]].id]
            for turn, sample in enumerate(turns[: wanted[-1] + 1]):
                request = self.request(sample, allowed)
                if turn:
                    request = _next_turn(request, sample, len(requests) - 1)
                requests.append(request)
                answers.append(by_id.get(sample.id))
        return requests, answers

    def _rows_once(self, planned: Sequence[Planned]) -> Iterator[dict[str, Any]]:
        # A codec becomes coarser by one setting each time, for all samples that are left.
        assert len({repr(allowed.codec) for _, allowed in planned}) == 1, "one engine, one codec"
        produce = _forced_rows if self.cell.task.is_teacher_forced else _answer_rows
        return produce(self, planned)

    def _less(self, row: dict[str, Any], allowed: Allowance) -> Allowance | None:
        """What to try instead where the row is over the budget in bytes; else None."""
        limit = self.cell.bound.bytes
        if limit is None or row["kv_bytes_kept"] <= limit:
            return None
        return tighter(self.cell, allowed, row["kv_bytes_kept"])


def _next_turn(request: Request, sample: Sample, before: int) -> Request:
    """The request as it follows the answer to the one with the index ``before``."""
    return replace(
        request,
        prompt=sample.follow_up_token_ids,
        continues=before,
        budget_tokens=None,
        context=None,
        question_tokens=0,
        room_tokens=0,
    )


def _answer_rows(job: Job, planned: Sequence[Planned]) -> Iterator[dict[str, Any]]:
    cell = job.cell
    engine = cell.engine(job.model, planned[0][1].codec)
    requests, answers = job.requests(planned)
    total_tokens = sum(len(request.prompt) + request.answer_tokens for request in requests)
    with TokenProgress(cell.label, total_tokens) as progress:
        for generation in engine.generate(
            requests, sampling=cell.settings.sampling, as_completed=True, on_pass=progress.advance
        ):
            answer = answers[generation.index]
            if answer is None:
                continue
            sample, allowed = answer
            row = _row(job, sample, allowed, generation, len(planned))
            if row["status"] == "ok":
                finished = generation.finish_reason == "stop"
                row |= score(cell.task, sample, row["prediction"], finished=finished)
            yield row


def _forced_rows(job: Job, planned: Sequence[Planned]) -> Iterator[dict[str, Any]]:
    for generation, measures in forced_answers(
        job.cell,
        job.model,
        job.tokenizer,
        [sample for sample, _ in planned],
        [job.request(sample, allowed) for sample, allowed in planned],
        codec=planned[0][1].codec,
        cache_dir=job.cache_dir / "fidelity",
    ):
        sample, allowed = planned[generation.index]
        row = _row(job, sample, allowed, generation, len(planned))
        yield row | measures if row["status"] == "ok" else row


def score(task: Task, sample: Sample, text: str, *, finished: bool) -> dict[str, Any]:
    """What the task's metrics add to a row; a scorer that fails gives a status and no score."""
    try:
        found = task.score(sample, text, finished=finished)
        if not is_score(found.get("score")):
            raise ValueError(f"a score is a number from 0 to 1, got {found.get('score')!r}")
    except Exception as error:  # a scorer's bug must not cost the answer, nor count as zero
        return {"status": "score_error", "error": f"{type(error).__name__}: {error}"}
    return found


def failure(error: Exception) -> dict[str, Any]:
    """What a row says of a sample without an answer: status oom or error."""
    causes = (error, error.__cause__)
    is_memory = any(isinstance(one, MemoryError | torch.OutOfMemoryError) for one in causes) or (
        "can't allocate memory" in str(error)  # how torch says it on the CPU
    )
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return {"status": "oom" if is_memory else "error", "error": text}


def settings_of(cell: Cell, sample: Sample, allowed: Allowance) -> dict[str, Any]:
    """What is known of a row before anything ran; store/columns.py says what each column is."""
    return {
        "task": cell.task.name,
        "task_version": cell.task.version,
        "model": cell.model.name,
        "policy": cell.method_label(allowed.codec),
        "shape": cell.shape_label,
        "protect": str(cell.protection),
        "evict_every": cell.evict_every,
        "codec": cell.codec_label(allowed.codec),
        "codec_asked": cell.codec_label(),
        "budget": cell.bound.label,
        "question": cell.settings.question,
        "turns": cell.settings.turns,
        "chunk": cell.settings.chunk,
        "sampling": cell.settings.sampling.label,
        "dtype": cell.dtype_name,
        "kv_dtype": cell.kv_dtype_name,
        "device": cell.settings.device,
        "seed": cell.settings.seed,
        "commit": commit_label(),
        "sample_id": sample.id,
        "document": sample.document or sample.id,
        "part": sample.part,
        "turn": None if sample.context is None else sample.context.turn,
        "references": list(sample.references),
        "prompt_tokens": len(sample.prompt_token_ids),
        "budget_tokens": allowed.budget_tokens if cell.policy.evicts else None,
        "bounded": cell.policy.bounded,
        "protected_tokens": cell.protected_tokens(allowed.budget_tokens),
        **{f"meta_{name}": value for name, value in sample.meta.items()},
    }


def _row(
    job: Job, sample: Sample, allowed: Allowance, generation: Generation, num_samples: int
) -> dict[str, Any]:
    """One tidy row without its score."""
    text = job.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    row = {
        **settings_of(job.cell, sample, allowed),
        "status": "ok",
        # Half a surrogate pair, which decoders can give, would break every table after.
        "prediction": text.encode("utf-8", "replace").decode(),
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tokens_computed": generation.prefill_tokens,
        "generated_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "attention": "+".join(generation.kernels),
        "kv_bytes_kept": generation.kv_bytes_kept,
        "kv_bytes_peak": generation.kv_bytes_peak,
        "kept_tokens": generation.kept_tokens,
        **compression(
            job.model.config,
            kv_bytes=generation.kv_bytes_kept,
            kept_tokens=generation.kept_tokens,
            prompt_tokens=generation.prompt_tokens,
        ),
        "ttft_sec": generation.ttft_sec,
        "decode_tokens_per_sec": generation.decode_tokens_per_sec,
        "compressed": generation.has_evicted,
        "slots": min(job.cell.settings.slots, num_samples),
        "graphs": job.cell.settings.graphs,
    }
    if generation.error is not None:
        row |= {"status": "invalid", "error": generation.error}
    return row
