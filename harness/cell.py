"""One cell: the settings of one (task, model, policy, budget, seed), checked, and its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from kvarena.codecs.base import Codec
from kvarena.harness import models
from kvarena.harness.budget import Budget, parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.fingerprints import code_fingerprint, model_fingerprint
from kvarena.harness.models import ModelSpec
from kvarena.harness.registry import build, one_of
from kvarena.harness.requests import check_budget, check_context
from kvarena.harness.sampling import Sampling
from kvarena.harness.shards import Shard
from kvarena.policies.base import Policy
from kvarena.tasks.base import Sample, Task, Tokenizer

if TYPE_CHECKING:
    from kvarena.harness.byte_budget import Fit


@dataclass(kw_only=True)
class Cell:
    """Settings of one cell, checked for what can be checked before a model is loaded.

    policy_label, codec_label: the name and the options that differ from its yaml; config is
    the resolved configuration, kept for the record. Raises UsageError.
    """

    task_settings: Mapping[str, Any]
    policy_settings: Mapping[str, Any]
    policy_label: str
    codec_settings: Mapping[str, Any]
    codec_label: str
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
    kv_dtype: str
    config: Mapping[str, Any]
    shard: Shard | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "chunk_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.removesuffix('_tokens')} must be >= 1, got {value}")
        one_of("question", self.question, ["inside", "after", "first"])
        task: Task = build(self.task_settings)
        self._unsettled_task = task
        self.policy: Policy = build(self.policy_settings)
        self.codec: Codec = build(self.codec_settings)
        if task.is_teacher_forced and not self.sampling.is_greedy:
            raise UsageError(f"{task.name} forces its answers; leave out sampling.temperature")
        budget = parse_budget(self.budget)
        # Bytes bind a policy that keeps everything through its codec; tokens cannot.
        binds = self.policy.evicts or budget.bytes is not None
        self.bound: Budget = budget if binds else parse_budget("full")
        self._fitted_tokens: int | None = None
        self.codec_used = self.codec_label
        check_budget(self.policy, self.bound.tokens)
        models.check_device(self.device)
        self.torch_dtype = models.resolve_dtype(self.dtype, self.device)
        self.torch_kv_dtype = models.resolve_kv_dtype(self.kv_dtype)
        models.check_attention(self.attention, self.device, self.torch_dtype)

    @cached_property
    def task(self) -> Task:
        """The task, settled for the model, whose configuration is read now and not before.

        Raises UsageError if there is none, or for a context that is too short for the task.
        """
        task, context_tokens = self._unsettled_task, self.context_tokens
        try:
            self._settled_options = task.settle(context_tokens)
        except ValueError as error:
            raise UsageError(f"{task.name}: {error}") from error
        return task

    @cached_property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer that the model handles; None if it states no limit."""
        return models.context_tokens(models.load_config(self.model))

    @property
    def label(self) -> str:
        """The cell in a few words."""
        shard = f" shard {self.shard.label}" if self.shard else ""
        return f"{self.task.name} {self.method_label} {self.bound.label}{shard}"

    @property
    def method_label(self) -> str:
        """The policy, and the codec if there is one: keydiff+kivi(bits=2)."""
        is_plain = self.codec_label == "none"
        return self.policy_label if is_plain else f"{self.policy_label}+{self.codec_label}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows say; slots, limit and shard do not.

        content: hashes of what the other settings only point to. Raises UsageError if a task's data
        or a model's files are not there.
        """
        try:
            data = self.task.data_fingerprint()
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
        return {
            "task": {
                "name": self.task.name,
                "version": self.task.version,
                **self.task_settings,
                # In place of auto: so auto and the same number typed are one cell.
                **self._settled_options,
            },
            "policy": {"name": self.policy_label, **self.policy_settings},
            "codec": {"name": self.codec_label, **self.codec_settings},
            "model": {"name": self.model.name, **vars(self.model)},
            "budget": {"name": self.bound.label},
            "question": self.question,
            "sampling": vars(self.sampling),
            "seed": self.seed,
            "chunk": self.chunk_tokens,
            "attention": self.attention,
            "device": torch.device(self.device).type,
            "dtype": self.dtype_name,
            "kv_dtype": self.kv_dtype_name,
            "content": {
                "data": data,
                "model": model_fingerprint(self.model),
                "policy": code_fingerprint(self.policy, Policy),
                "codec": code_fingerprint(self.codec, Codec),
            },
        }

    @property
    def dtype_name(self) -> str:
        """The data type that auto stands for, or the one asked for: float32."""
        return str(self.torch_dtype).removeprefix("torch.")

    @property
    def kv_dtype_name(self) -> str:
        """The data type of tokens that are not coded."""
        return str(self.torch_kv_dtype or self.torch_dtype).removeprefix("torch.")

    def samples(self, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The first ``limit`` samples, each checked against the model's context and the budget."""
        try:
            samples = self.task.samples(tokenizer, self.seed, self.limit)
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
        if self.question == "first":
            samples = [question_first(sample) for sample in samples]
        for sample in samples:
            if self.question != "inside" and not sample.question_tokens:
                raise UsageError(
                    f"question={self.question}: task {self.task.name} has no context apart from "
                    "its question; use question=inside"
                )
            check_budget(self.policy, self.budget_tokens(sample), self.question_tokens(sample))
        if samples:
            self._check_context(max(samples, key=_total_tokens))
        return samples

    def part(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that the shard holds; all of them without a shard."""
        return [s for s in samples if self.shard is None or self.shard.holds(s.id)]

    def budget_tokens(self, sample: Sample) -> int | None:
        """Of one sample; None without a bound, or as long as one in bytes is not settled."""
        if self.bound.bytes is not None:
            return self._fitted_tokens
        return self.bound.for_prompt(len(sample.prompt_token_ids))

    def question_tokens(self, sample: Sample) -> int:
        """Tokens held back from compression under question=after, else none."""
        return sample.question_tokens if self.question == "after" else 0

    def _check_context(self, longest: Sample) -> None:
        limit_tokens = self.context_tokens
        check_context(
            f"sample {longest.id}",
            len(longest.prompt_token_ids),
            longest.max_new_tokens,
            limit_tokens,
            "" if limit_tokens is None else self.task.advice(longest, limit_tokens),
        )

    def adopt(self, fit: "Fit") -> None:
        """Go on with what a budget in bytes came to; the identity stays as it was asked for."""
        self._fitted_tokens = fit.budget_tokens
        if fit.codec:
            self.codec = replace(self.codec, **fit.codec)
            changes = ",".join(f"{name}={value}" for name, value in fit.codec.items())
            self.codec_used = f"{self.codec_label}[{changes}]"


def _total_tokens(sample: Sample) -> int:
    return len(sample.prompt_token_ids) + sample.max_new_tokens


def question_first(sample: Sample) -> Sample:
    """The same sample with its question, and what follows it, before the prompt as well.

    What a token of the context projects then depends on the question: Locret-Q of "Locret",
    https://arxiv.org/abs/2410.01805. Token indices in ``meta`` stay those of the plain prompt.
    """
    question = sample.prompt_token_ids[len(sample.prompt_token_ids) - sample.question_tokens :]
    return replace(sample, prompt_token_ids=question + sample.prompt_token_ids)
