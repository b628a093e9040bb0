"""One cell: the settings of one (task, model, policy, budget, seed), checked, and its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvarena.harness import models
from kvarena.harness.budget import Budget, parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.fingerprints import model_fingerprint, policy_fingerprint
from kvarena.harness.models import ModelSpec
from kvarena.harness.registry import build, one_of
from kvarena.harness.requests import check_budget, check_context
from kvarena.harness.sampling import Sampling
from kvarena.policies.base import Policy
from kvarena.tasks.base import Sample, Task, Tokenizer


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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows say; slots and limit do not.

        content: hashes of what the other settings only point to. Raises UsageError if a task's data
        or a model's files are not there.
        """
        try:
            data = self.task.data_fingerprint()
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
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
            "dtype": self.dtype_name,
            "content": {
                "data": data,
                "model": model_fingerprint(self.model),
                "policy": policy_fingerprint(self.policy),
            },
        }

    @property
    def dtype_name(self) -> str:
        """The data type that auto stands for, or the one asked for: float32."""
        return str(self.torch_dtype).removeprefix("torch.")

    def samples(self, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The first ``limit`` samples, each checked against the model's context and the budget."""
        try:
            samples = self.task.samples(tokenizer, self.seed, self.limit)
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
        limit_tokens = models.context_tokens(models.load_config(self.model))
        for sample in samples:
            if self.question == "after" and not sample.question_tokens:
                raise UsageError(
                    f"question=after: task {self.task.name} has no context apart from its "
                    "question; use question=inside"
                )
            check_budget(self.policy, self.budget_tokens(sample), self.question_tokens(sample))
            check_context(
                f"sample {sample.id}",
                len(sample.prompt_token_ids),
                sample.max_new_tokens,
                limit_tokens,
            )
        return samples

    def budget_tokens(self, sample: Sample) -> int | None:
        """Of one sample; None without a bound."""
        return self.bound.for_prompt(len(sample.prompt_token_ids))

    def question_tokens(self, sample: Sample) -> int:
        """Tokens held back from compression under question=after, else none."""
        return sample.question_tokens if self.question == "after" else 0
