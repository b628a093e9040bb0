"""Teacher forcing: how far a policy moves the model from what it says with the full cache.

Both caches read the same prompt and are fed the same answer; the logits that choose each token of
the answer are compared. What the full cache says is worked out once per sample and kept in files,
which all policies, budgets and processes share: a sweep pays for the full cache once.

The queries of an answer are those whose logits choose its tokens: the last token of the prompt and
every token of the answer but the last.

Shape letters: L layers, H query heads, K KV heads, T cached tokens, A answer tokens, V vocabulary.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.harness.engine import Engine
from kvarena.harness.engine.sequence import Generation, KeptTokens
from kvarena.harness.files import replacing
from kvarena.harness.progress import TokenProgress
from kvarena.harness.registry import build, load_choice
from kvarena.policies.base import LayerView, Needs, Policy
from kvarena.tasks.base import Sample, Tokenizer, content_id

if TYPE_CHECKING:
    from kvarena.harness.cell import Cell

_SCHEMA = 2  # of the reference files; a new one leaves the old files unread


class ForcedTask(Protocol):
    """What a task with ``is_teacher_forced`` has besides samples."""

    attention_recall: bool

    def forced_token_ids(self, tokenizer: Tokenizer, sample: Sample) -> list[int] | None:
        """The answer to force; None for the full cache's own."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A sample's forced answer and the full cache's logits [A, V] in float32, in a file.

    given: the answer where the task gives one; stop_token_ids: what else may end it.
    """

    sample: Sample
    given: list[int] | None
    stop_token_ids: set[int]
    folder: Path

    @property
    def path(self) -> Path:
        sample = self.sample
        stops = (sample.max_new_tokens, sample.stop_newline, sorted(self.stop_token_ids))
        decides = content_id(sample.prompt_token_ids, self.given, *stops)
        return self.folder / f"{sample.id}-{decides[:8]}.safetensors"

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
        assert generation.logits is not None, "recorded for every reference"
        tensors = {"token_ids": torch.tensor(generation.token_ids)}
        tensors["logits"] = generation.logits.float().contiguous()
        with replacing(self.path) as path:
            save_file(tensors, path)


def forced_answers(
    cell: "Cell",
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: Seq[Sample],
    *,
    codec: Codec,
    budgets: Seq[int | None],
    question_tokens: Seq[int],
    stop_token_ids: Seq[set[int]],
    cache_dir: Path,
) -> Iterator[tuple[Generation, dict[str, Any]]]:
    """Each sample's forced answer under the cell's policy and what its row adds, as they end.

    codec, budgets, question_tokens: of the policy's run; stop_token_ids: of the full cache's own
    answers.
    """
    task = cast(ForcedTask, cell.task)
    engine = partial(Engine, model, chunk_tokens=cell.chunk_tokens, attention=cell.attention)
    # No number of slots and no question held back: with the full cache they change nothing.
    names = ("model", "dtype", "attention", "device", "chunk")
    weights = cell.identity["content"]["model"]
    key = content_id(_SCHEMA, [cell.identity[name] for name in names], weights)
    references = [
        Reference(
            sample=sample,
            given=task.forced_token_ids(tokenizer, sample),
            stop_token_ids=stops,
            folder=cache_dir / key,
        )
        for sample, stops in zip(samples, stop_token_ids, strict=True)
    ]
    full = engine(build(load_choice("policy", "full")), slots=cell.slots)
    _complete(full, references, f"{cell.label}, full cache first")
    del full  # with its buffers, before the policy's are made

    policy_engine = engine(cell.policy, codec=codec, kv_dtype=cell.torch_kv_dtype, slots=cell.slots)
    prompts = [sample.prompt_token_ids for sample in samples]
    answers = [reference.read("token_ids").tolist() for reference in references]
    num_tokens = sum(map(len, prompts)) + sum(map(len, answers))
    with TokenProgress(cell.label, num_tokens * (2 if task.attention_recall else 1)) as progress:
        advance = progress.advance
        for generation in policy_engine.generate(
            prompts,
            forced=answers,
            budgets=budgets,
            question_tokens=question_tokens,
            as_completed=True,
            on_pass=advance,
            record_history=task.attention_recall,
            record_logits="answer",
        ):
            if generation.finish_reason == "invalid":
                yield generation, {}
                continue
            assert generation.logits is not None, "recorded for every answer"
            logits = references[generation.index].read("logits")
            measures = compare(logits, generation.logits.cpu(), generation.token_ids)
            if task.attention_recall:
                assert generation.kept_history is not None, "recorded for recall"
                prompt = prompts[generation.index]
                probe = RecallProbe(len(prompt), generation.kept_history)
                forced = [generation.token_ids]
                next(engine(probe, slots=1).generate([prompt], forced=forced, on_pass=advance))
                measures["attention_recall"] = float(probe.shares.mean())
                measures["attention_recall_by_layer_head"] = probe.shares.round(decimals=4).tolist()
            yield generation, measures


def _complete(engine: Engine, references: Seq[Reference], label: str) -> None:
    """Run the full cache for the references that have no file yet."""
    missing = [reference for reference in references if not reference.is_there]
    if not missing:
        return
    samples = [reference.sample for reference in missing]
    given = [reference.given for reference in missing if reference.given is not None]
    assert len(given) in (0, len(missing)), "a task forces answers of its own or none"
    answers: dict[str, Any] = {"forced": given}  # Any: options of different types
    if not given:
        answers = {
            "max_new_tokens": [sample.max_new_tokens for sample in samples],
            "min_new_tokens": [int(sample.stop_newline) for sample in samples],
            "stop_token_ids": [reference.stop_token_ids for reference in missing],
        }
    num_tokens = sum(len(sample.prompt_token_ids) + sample.max_new_tokens for sample in samples)
    with TokenProgress(label, num_tokens) as progress:
        for generation in engine.generate(
            [sample.prompt_token_ids for sample in samples],
            **answers,
            as_completed=True,
            on_pass=progress.advance,
            record_logits="answer",
        ):
            if generation.finish_reason == "invalid":
                raise ArithmeticError("the full cache's own logits are not finite")
            missing[generation.index].save(generation)


def compare(full: Tensor, policy: Tensor, token_ids: Seq[int]) -> dict[str, Any]:
    """What a row says of two runs over the same answer; full, policy: logits [A, V].

    KL(full || policy) and negative log-likelihoods (nll) are in nats, differences are policy minus
    full, ``score`` is the share of tokens where both would choose the same one.
    """
    log_full, log_policy = (logits.double().log_softmax(dim=-1) for logits in (full, policy))
    weighted = log_full.exp() * (log_full - log_policy)
    # A token that cannot come weighs nothing, also where both logarithms are infinite. Rounding may
    # leave a sum a hair under zero.
    kl = weighted.masked_fill(log_full == float("-inf"), 0).sum(dim=-1).clamp(min=0)
    agrees = full.argmax(dim=-1) == policy.argmax(dim=-1)
    chosen = torch.tensor(token_ids)[:, None]
    nll_full, nll_policy = (-logs.gather(1, chosen)[:, 0] for logs in (log_full, log_policy))
    difference = nll_policy - nll_full
    return {
        "score": float(agrees.double().mean()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "nll_full": float(nll_full.mean()),
        "nll_policy": float(nll_policy.mean()),
        "nll_difference": float(difference.mean()),
        "num_reference_tokens": len(token_ids),
        "kl_per_token": kl.tolist(),
        "agrees_per_token": agrees.int().tolist(),
        "nll_difference_per_token": difference.tolist(),
    }


class RecallProbe(Policy):
    """Keeps everything, and adds up how much attention falls on what another policy had kept.

    prompt_tokens: length of the prompt; history: what the other policy held after every pass over
    prompt and answer. A query could see what was held after the pass before and its own pass's
    tokens up to itself. For one sequence at a time.
    """

    evicts: ClassVar[bool] = False
    # Nothing is evicted, so only a column makes the engine call ``score``.
    columns: ClassVar[tuple[str, ...]] = ("unused",)

    def __init__(self, prompt_tokens: int, history: Seq[KeptTokens]) -> None:
        super().__init__()
        before = [KeptTokens(seen_tokens=0, positions=[]), *history]
        # By the position of an answer's query, the last one of its pass.
        self._held = {
            after.seen_tokens - 1: held
            for held, after in zip(before, history, strict=False)
            if after.seen_tokens >= prompt_tokens
        }
        self._mass: dict[int, Tensor] = {}  # by layer, [2, H]: on kept tokens, and on all

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=1)

    def score(self, view: LayerView) -> Tensor:
        query = int(view.positions.max())
        if query in self._held:
            assert view.attention is not None, "asked for"
            num_heads, positions = view.positions.shape[1], view.positions[0]
            start, kept = self._held[query].seen_tokens, self._held[query].positions
            visible = torch.zeros(num_heads, query + 1, dtype=torch.bool, device=positions.device)
            if kept:
                visible.scatter_(1, kept[view.layer].to(positions.device), True)
            visible[:, start:] = True
            weights = view.attention[0, :, -1].unflatten(0, (num_heads, -1)).double()  # [K, G, T]
            on_kept = weights * visible.gather(1, positions)[:, None]
            mass = torch.stack([on_kept.sum(dim=-1), weights.sum(dim=-1)]).flatten(1)  # [2, H]
            self._mass[view.layer] = self._mass.get(view.layer, 0) + mass
        return view.positions.float()

    @property
    def shares(self) -> Tensor:
        """Share of the attention of the answer's queries on kept tokens, [L, H] float64."""
        layers = [self._mass[layer].cpu() for layer in sorted(self._mass)]
        on_kept, total = torch.stack(layers, dim=1)
        return on_kept / total
