"""Teacher forcing: how far a policy moves the model from what it says with the full cache.

Both caches read the same prompt and are fed the same answer; the logits that choose each token of
the answer are compared. What the full cache says is worked out once per sample and kept in files,
which all policies, budgets and processes share: a sweep pays for the full cache once.

Shape letters: A answer tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.codecs.none import NoCodec
from kvarena.harness.cells.fidelity_measures import RecallProbe, compare
from kvarena.harness.engine import Engine, Generation, Request
from kvarena.harness.files import replacing
from kvarena.harness.progress import TokenProgress
from kvarena.harness.registry import build, load_choice
from kvarena.policies.base import Policy
from kvarena.tasks.base import Sample, Tokenizer, content_id

if TYPE_CHECKING:
    from kvarena.harness.cells.cell import Cell

_SCHEMA = 2  # of the files of full answers; a new one leaves the old files unread


class ForcedTask(Protocol):
    """What a task with ``is_teacher_forced`` has besides samples."""

    attention_recall: bool

    def forced_token_ids(self, tokenizer: Tokenizer, sample: Sample) -> list[int] | None:
        """The answer to force; None for the full cache's own."""


@dataclass(frozen=True, kw_only=True)
class FullCacheAnswer:
    """A sample's forced answer and the full cache's logits [A, V] in float32, in a file.

    request: of the full cache, by which the file is named: one that is forced where the task gives
    the answer.
    """

    sample_id: str
    request: Request
    folder: Path

    @property
    def path(self) -> Path:
        asked = self.request
        assert asked.stop_token_ids is not None, "a cell names them"
        stops = (asked.max_new_tokens, asked.min_new_tokens, sorted(asked.stop_token_ids))
        decides = content_id(tuple(asked.prompt), asked.forced, *stops)
        return self.folder / f"{self.sample_id}-{decides[:8]}.safetensors"

    @property
    def is_there(self) -> bool:
        """Whether the file can be read; a damaged one is made anew."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return {"token_ids", "logits"} <= set(file.keys())
        except (OSError, SafetensorError):
            return False

    def read(self, name: str) -> Tensor:
        """token_ids [A] or logits [A, V]."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def save(self, generation: Generation) -> None:
        """Take answer and logits from a run with the full cache."""
        assert generation.logits is not None, "recorded for every one"
        tensors = {"token_ids": torch.tensor(generation.token_ids)}
        tensors["logits"] = generation.logits.float().contiguous()
        with replacing(self.path) as path:
            save_file(tensors, path)


def forced_answers(
    cell: "Cell",
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    requests: Sequence[Request],
    *,
    codec: Codec,
    cache_dir: Path,
) -> Iterator[tuple[Generation, dict[str, Any]]]:
    """Each sample's forced answer under the cell's policy and what its row adds, as they end.

    requests: of the policy's run, as if it answered itself; codec: likewise.
    """
    task = cast(ForcedTask, cell.task)
    full = build(load_choice("policy", "full"))
    # No number of slots and no question held back: with the full cache they change nothing.
    names = ("model", "dtype", "attention", "device", "chunk")
    weights = cell.identity["content"]["model"]
    key = content_id(_SCHEMA, [cell.identity[name] for name in names], weights)
    full_answers = [
        FullCacheAnswer(
            sample_id=sample.id,
            request=_by_full_cache(request, task.forced_token_ids(tokenizer, sample)),
            folder=cache_dir / key,
        )
        for sample, request in zip(samples, requests, strict=True)
    ]
    _complete(_exact(cell, model, full), full_answers, f"{cell.label}, full cache first")
    forced = [
        replace(request, max_new_tokens=None, forced=full_answer.read("token_ids").tolist())
        for request, full_answer in zip(requests, full_answers, strict=True)
    ]
    num_tokens = sum(len(request.prompt) + request.answer_tokens for request in forced)
    with TokenProgress(cell.label, num_tokens * (2 if task.attention_recall else 1)) as progress:
        advance = progress.advance
        for generation in cell.engine(model, codec).generate(
            forced,
            as_completed=True,
            on_pass=advance,
            record_history=task.attention_recall,
            record_logits="answer",
        ):
            if generation.finish_reason == "invalid":
                yield generation, {}
                continue
            assert generation.logits is not None, "recorded for every answer"
            logits = full_answers[generation.index].read("logits")
            measures = compare(logits, generation.logits.cpu(), generation.token_ids)
            if task.attention_recall:
                assert generation.kept_history is not None, "recorded for recall"
                request = _without_bound(forced[generation.index])
                probe = RecallProbe(len(request.prompt), generation.kept_history)
                next(_exact(cell, model, probe, slots=1).generate([request], on_pass=advance))
                measures["attention_recall"] = float(probe.shares.mean())
                measures["attention_recall_by_layer_head"] = probe.shares.round(decimals=4).tolist()
            yield generation, measures


def _by_full_cache(request: Request, given: list[int] | None) -> Request:
    """The same prompt without a bound, and with the answer that the task gives, if it does."""
    asked = _without_bound(request)
    return asked if given is None else replace(asked, max_new_tokens=None, forced=given)


def _without_bound(request: Request) -> Request:
    """The same prompt as the full cache reads it, in one piece and for this request alone."""
    return replace(request, budget_tokens=None, question_tokens=0, room_tokens=0, context=None)


def _exact(
    cell: "Cell", model: PreTrainedModel, policy: Policy, slots: int | None = None
) -> Engine:
    """An engine for a policy that keeps everything, in the model's own data type."""
    return cell.engine(model, NoCodec(), policy=policy, slots=slots, kv_dtype=model.dtype)


def _complete(engine: Engine, full_answers: Sequence[FullCacheAnswer], label: str) -> None:
    """Run the full cache for the answers that have no file yet."""
    missing = [full_answer for full_answer in full_answers if not full_answer.is_there]
    if not missing:
        return
    requests = [full_answer.request for full_answer in missing]
    num_tokens = sum(len(request.prompt) + request.answer_tokens for request in requests)
    with TokenProgress(label, num_tokens) as progress:
        for generation in engine.generate(
            requests, as_completed=True, on_pass=progress.advance, record_logits="answer"
        ):
            if generation.finish_reason == "invalid":
                raise ArithmeticError("the full cache's own logits are not finite")
            missing[generation.index].save(generation)
