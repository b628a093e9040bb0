"""One cell: generate and score the missing answers of one (task, model, policy, budget, seed)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvarena.harness import models
from kvarena.harness.budget import Budget, parse_budget
from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.fidelity import forced_answers
from kvarena.harness.models import ModelSpec
from kvarena.harness.progress import TokenProgress
from kvarena.harness.registry import build, one_of
from kvarena.harness.requests import check_budget, check_context
from kvarena.harness.results import CellFolder
from kvarena.harness.sampling import Sampling
from kvarena.harness.sequence import Generation
from kvarena.policies.base import Policy
from kvarena.tasks.base import Sample, Task, Tokenizer, content_id


@dataclass(kw_only=True)
class Cell:
    """Settings of one cell, checked for what can be checked before a model is loaded.

    policy_label names the policy and the options that differ from its yaml; config is the resolved
    configuration, kept for the record. Raises UsageError.
    """

    task_settings: Mapping[str, Any]
    policy_settings: Mapping[str, Any]
    policy_label: str
    model: ModelSpec
    budget: str | int
    sampling: Sampling
    question: str
    seed: int
    limit: int | None
    slots: int
    chunk_tokens: int
    attention: str
    device: str
    dtype: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("slots", "chunk_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.removesuffix('_tokens')} must be >= 1, got {value}")
        one_of("question", self.question, ["inside", "after"])
        self.task: Task = build(self.task_settings)
        self.policy: Policy = build(self.policy_settings)
        if self.task.is_teacher_forced and not self.sampling.is_greedy:
            raise UsageError(f"{self.task.name} forces its answers; leave out sampling.temperature")
        budget = parse_budget(self.budget)
        self.bound: Budget = budget if self.policy.evicts else parse_budget("full")
        check_budget(self.policy, self.bound.tokens)
        models.check_device(self.device)
        self.torch_dtype = models.resolve_dtype(self.dtype, self.device)
        models.check_attention(self.attention, self.device, self.torch_dtype)

    @property
    def label(self) -> str:
        """The cell in a few words."""
        return f"{self.task.name} {self.policy_label} {self.bound.label}"

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows say; slots and limit do not."""
        return {
            "task": {"name": self.task.name, "version": self.task.version, **self.task_settings},
            "policy": {"name": self.policy_label, **self.policy_settings},
            "model": {"name": self.model.name, **vars(self.model)},
            "budget": {"name": self.bound.label},
            "question": self.question,
            "sampling": vars(self.sampling),
            "seed": self.seed,
            "chunk": self.chunk_tokens,
            "attention": self.attention,
            "device": torch.device(self.device).type,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
        }


def run_cell(cell: Cell, results_dir: Path) -> Path:
    """Bring the cell's rows up to date and return its folder. The model loads only if needed."""
    folder = CellFolder(results_dir, cell.identity())
    tokenizer = models.load_tokenizer(cell.model)
    samples = _samples(cell, tokenizer)
    with folder.claimed():
        done = {row["sample_id"] for row in folder.rows()}
        missing = [sample for sample in samples if sample.id not in done]
        if not missing:
            print(f"{cell.label}: all {len(samples)} samples are there already")
            return folder.path
        folder.open(cell.config)
        model = _load_once(cell.model, cell.device, cell.dtype)
        produce = _forced_rows if cell.task.is_teacher_forced else _answer_rows
        for row in produce(cell, model, tokenizer, missing, results_dir):
            folder.append(row)
    return folder.path


def _answer_rows(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    results_dir: Path,
) -> Iterator[dict[str, Any]]:
    """Generated and scored answers, as they end."""
    engine = Engine(
        model,
        cell.policy,
        chunk_tokens=cell.chunk_tokens,
        slots=cell.slots,
        attention=cell.attention,
    )
    total_tokens = sum(len(s.prompt_token_ids) + s.max_new_tokens for s in samples)
    with TokenProgress(cell.label, total_tokens) as progress:
        for generation in engine.generate(
            [sample.prompt_token_ids for sample in samples],
            max_new_tokens=[sample.max_new_tokens for sample in samples],
            budgets=[_budget_tokens(cell, sample) for sample in samples],
            question_tokens=[_question_tokens(cell, sample) for sample in samples],
            stop_token_ids=[_stop_token_ids(model, tokenizer, sample) for sample in samples],
            min_new_tokens=[int(sample.stop_newline) for sample in samples],
            sampling=cell.sampling,
            seeds=[int(content_id(cell.seed, sample.id), 16) >> 1 for sample in samples],
            as_completed=True,
            on_pass=progress.advance,
        ):
            sample = samples[generation.index]
            row = _row(cell, sample, generation, tokenizer)
            finished = generation.finish_reason == "stop"
            yield {**row, **cell.task.score(sample, row["prediction"], finished=finished)}


def _forced_rows(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    results_dir: Path,
) -> Iterator[dict[str, Any]]:
    """Forced answers and how far the policy moves the model, as they end."""
    for generation, measures in forced_answers(
        cell,
        model,
        tokenizer,
        samples,
        budgets=[_budget_tokens(cell, sample) for sample in samples],
        question_tokens=[_question_tokens(cell, sample) for sample in samples],
        stop_token_ids=[_stop_token_ids(model, tokenizer, sample) for sample in samples],
        cache_dir=results_dir / "cache" / "fidelity",
    ):
        yield {**_row(cell, samples[generation.index], generation, tokenizer), **measures}


def _samples(cell: Cell, tokenizer: Tokenizer) -> Sequence[Sample]:
    """The first ``limit`` samples, each checked against the model's context."""
    try:
        samples = cell.task.samples(tokenizer, cell.seed, cell.limit)
    except ValueError as error:
        raise UsageError(f"{cell.task.name}: {error}") from error
    limit_tokens = models.context_tokens(models.load_config(cell.model))
    for sample in samples:
        if cell.question == "after" and not sample.question_tokens:
            raise UsageError(
                f"question=after: task {cell.task.name} has no context apart from its question; "
                "use question=inside"
            )
        check_budget(cell.policy, _budget_tokens(cell, sample), _question_tokens(cell, sample))
        check_context(
            f"sample {sample.id}", len(sample.prompt_token_ids), sample.max_new_tokens, limit_tokens
        )
    return samples


def _budget_tokens(cell: Cell, sample: Sample) -> int | None:
    return cell.bound.for_prompt(len(sample.prompt_token_ids))


def _question_tokens(cell: Cell, sample: Sample) -> int:
    """Tokens held back from compression under question=after, else none."""
    return sample.question_tokens if cell.question == "after" else 0


def _stop_token_ids(model: PreTrainedModel, tokenizer: Tokenizer, sample: Sample) -> set[int]:
    """The model's own stop tokens, and a newline where the task says so."""
    eos = model.generation_config.eos_token_id
    stops = {eos} if isinstance(eos, int) else set(eos or ())
    if sample.stop_newline:
        stops.add(tokenizer.encode("\n", add_special_tokens=False)[-1])
    return stops


@lru_cache(maxsize=1)
def _load_once(spec: ModelSpec, device: str, dtype: str) -> PreTrainedModel:
    """Sweeps in one process load a model once; the engine does not change it."""
    return models.load_weights(spec, device=device, dtype=dtype)


def _row(
    cell: Cell, sample: Sample, generation: Generation, tokenizer: Tokenizer
) -> dict[str, Any]:
    """One tidy row without its score; results/README.md is the dictionary of its columns."""
    text = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    # Half a surrogate pair, which Python's own decoders can give, would break every table after.
    prediction = text.encode("utf-8", "replace").decode()
    return {
        "task": cell.task.name,
        "model": cell.model.name,
        "policy": cell.policy_label,
        "budget": cell.bound.label,
        "question": cell.question,
        "sample_id": sample.id,
        "status": "ok",
        "prediction": prediction,
        "reference": " | ".join(sample.references),
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "budget_tokens": generation.budget_tokens,
        "kv_bytes_kept": generation.kv_bytes_kept,
        "kv_bytes_peak": generation.kv_bytes_peak,
        "ttft_sec": generation.ttft_sec,
        "decode_tokens_per_sec": generation.decode_tokens_per_sec,
        "slots": cell.slots,
        "seed": cell.seed,
        **{f"meta_{name}": value for name, value in sample.meta.items()},
    }
