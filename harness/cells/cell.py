"""One cell: the settings of one (task, model, policy, budget, seed), checked, and its samples."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.harness.budget import Budget, parse_budget
from kvarena.harness.cells.fingerprints import code_fingerprint, model_fingerprint
from kvarena.harness.engine import ENGINE_VERSION, Engine
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.engine.limits import (
    check_attention,
    check_context,
    check_graphs,
    context_tokens,
)
from kvarena.harness.errors import UsageError
from kvarena.harness.models import ModelSpec, devices, loading
from kvarena.harness.protection import Protection
from kvarena.harness.registry import build, choice_label, choices, named_class, one_of
from kvarena.harness.settings import CellSettings, decides_rows
from kvarena.harness.store.shards import Shard, parse_shard
from kvarena.policies.base import Policy
from kvarena.shapes.base import Shape
from kvarena.shapes.uniform import Uniform
from kvarena.tasks.base import Sample, Task, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How one sample may be held: tokens per KV head (None: all), and the codec."""

    budget_tokens: int | None
    codec: Codec


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings of one cell, checked for what can be checked before a model is loaded.

    settings: those of the command, if it was one, which then are noted in the manifest as well.
    Raises UsageError.
    """

    settings: CellSettings

    def __post_init__(self) -> None:
        for name in ("slots", "chunk", "limit"):
            value = getattr(self.settings, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        one_of("question", self.settings.question, ["inside", "after", "first"])
        one_of("turns", self.settings.turns, ["independent", "dialogue"])
        task = self._unsettled_task
        if self.is_dialogue:
            self._check_dialogue(task)
        if task.is_teacher_forced and not self.settings.sampling.is_greedy:
            raise UsageError(f"{task.name} forces its answers; leave out sampling.temperature")
        if self.bound.is_full and not isinstance(self.shape, Uniform):
            raise UsageError("budget=full evicts nothing and has no shape; leave shape=uniform")
        # How many layers share it nobody knows yet, so samples() asks once more.
        replace(self.eviction(num_layers=1), shape=Uniform()).check(self.bound.tokens)
        devices.check_device(self.settings.device)
        if self.settings.graphs:
            check_graphs(self.settings.device, self.eviction(num_layers=1), codes=self.codec.codes)
        check_attention(self.settings.attention, self.settings.device, self.torch_dtype)
        for name in ("codec", "model", "shard"):
            getattr(self, name)  # made now, so that what is wrong with it is told now

    def _check_dialogue(self, task: Task) -> None:
        advice = "use turns=independent"
        if task.is_teacher_forced:
            raise UsageError(f"turns=dialogue: {task.name} forces its answers; {advice}")
        if self.policy.needs.token_scores == "answer":
            raise UsageError(
                f"turns=dialogue: {self.policy_label} must know each answer beforehand; {advice}"
            )
        if self.bound.bytes is not None:
            raise UsageError(f"turns=dialogue needs a budget in tokens, not in bytes, or {advice}")

    @property
    def is_dialogue(self) -> bool:
        """Whether later questions come after the answers to earlier ones of their context."""
        return self.settings.turns == "dialogue"

    def _chosen(self, group: str) -> Mapping[str, Any]:
        chosen = getattr(self.settings, group)
        if not isinstance(chosen, Mapping):
            raise UsageError(f"{group} must name a choice: {', '.join(choices(group))}")
        return chosen

    def _built(self, group: str, base: type) -> Any:  # Any: an instance of base
        named_class(self._chosen(group).get("_target_"), base)
        return build(self._chosen(group))

    @cached_property
    def _unsettled_task(self) -> Task:
        return self._built("task", Task)

    @cached_property
    def policy(self) -> Policy:
        return self._built("policy", Policy)

    @cached_property
    def shape(self) -> Shape:
        return self._built("shape", Shape)

    @cached_property
    def protection(self) -> Protection:
        """As asked for, or the policy's own where everything is kept, which needs none."""
        asked = Protection.parse(self.settings.protect)
        return asked if self._may_evict else Protection()

    @cached_property
    def evict_every(self) -> int:
        """As asked for, or 1 where everything is kept."""
        return self.settings.evict_every if self._may_evict else 1

    @property
    def _may_evict(self) -> bool:
        return self.policy.evicts and not self.bound.is_full

    def eviction(self, num_layers: int) -> Eviction:
        """What decides which tokens stay. Raises UsageError for what does not go together."""
        return Eviction(
            policy=self.policy,
            num_layers=num_layers,
            shape=self.shape,
            protection=self.protection,
            every=self.evict_every,
        )

    @cached_property
    def codec(self) -> Codec:
        """As asked for; a budget in bytes may settle on a coarser one."""
        return self._built("codec", Codec)

    @cached_property
    def model(self) -> ModelSpec:
        return ModelSpec(**self._chosen("model"))

    @cached_property
    def shard(self) -> Shard | None:
        return parse_shard(self.settings.shard)

    @cached_property
    def bound(self) -> Budget:
        """The budget, or none for a policy that keeps everything."""
        budget = parse_budget(self.settings.budget)
        # Bytes bind a policy that keeps everything through its codec; tokens cannot.
        binds = self.policy.evicts or budget.bytes is not None
        return budget if binds else parse_budget("full")

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return devices.resolve_dtype(self.settings.dtype, self.settings.device)

    @cached_property
    def torch_kv_dtype(self) -> torch.dtype | None:
        """None for the model's own."""
        return devices.resolve_kv_dtype(self.settings.kv_dtype)

    @property
    def task(self) -> Task:
        """The task, settled for the model, whose configuration is read now and not before.

        Raises UsageError if there is none, or for a context that is too short for the task.
        """
        assert self._settled_options is not None, "settles the task"
        return self._unsettled_task

    @cached_property
    def _settled_options(self) -> dict[str, Any]:
        """What stands for the options of the task that were auto."""
        task, context_tokens = self._unsettled_task, self.context_tokens
        try:
            return task.settle(context_tokens)
        except ValueError as error:
            raise UsageError(f"{task.name}: {error}") from error

    @cached_property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer that the model handles; None if it states no limit."""
        return context_tokens(self._config)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return int(self._config.num_hidden_layers)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return loading.load_config(self.model).get_text_config()

    @property
    def label(self) -> str:
        """The cell in a few words."""
        shard = f" shard {self.shard.label}" if self.shard else ""
        return f"{self.task.name} {self.method_label()} {self.bound.label}{shard}"

    @property
    def policy_label(self) -> str:
        """The name and what differs from the defaults: keydiff(anchor=median,shape=ada)."""
        around = {
            "shape": self.shape_label.replace("(", "[").replace(")", "]"),
            "protect": str(self.protection),
            "evict_every": self.evict_every,
        }
        usual = {"shape": "uniform", "protect": "paper", "evict_every": 1}
        changed = [f"{key}={value}" for key, value in around.items() if value != usual[key]]
        return choice_label("policy", self.settings.policy, changed)

    @property
    def shape_label(self) -> str:
        """As choice_label: ada(alpha=0.5)."""
        return choice_label("shape", self.settings.shape)

    def protected_tokens(self, sample_budget: int | None) -> int | None:
        """First and newest tokens that stay whatever their score; None where nothing goes."""
        if sample_budget is None or not self.policy.evicts:
            return None
        return self.eviction(self.num_layers).protected_tokens(sample_budget)

    def codec_label(self, used: Codec | None = None) -> str:
        """As policy_label, of the codec asked for or of ``used``, a coarser one of its kind."""
        used = used or self.codec
        options = [option.name for option in fields(used)]
        changed = {
            name: getattr(used, name)
            for name in options
            if getattr(used, name) != getattr(self.codec, name)
        }
        return choice_label("codec", {**self.settings.codec, **changed})

    def method_label(self, used: Codec | None = None) -> str:
        """The policy, and the codec asked for or ``used`` if there is one: keydiff+kivi(bits=2)."""
        codec = self.codec_label(used)
        return self.policy_label if codec == "none" else f"{self.policy_label}+{codec}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows say: settings as they are or as they are settled.

        content: hashes of what the other settings only point to. Raises UsageError if a task's data
        or a model's files are not there.
        """
        try:
            data = self.task.data_fingerprint()
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
        chosen = [setting.name for setting in fields(CellSettings) if decides_rows(setting)]
        return {
            **{name: getattr(self.settings, name) for name in chosen},
            "task": {
                "name": self.task.name,
                "version": self.task.version,
                **self.settings.task,
                # In place of auto: so auto and the same number typed are one cell.
                **self._settled_options,
            },
            "policy": {"name": self.policy_label, **self.settings.policy},
            "codec": {"name": self.codec_label(), **self.settings.codec},
            "shape": {"name": self.shape_label, **self.settings.shape},
            "protect": str(self.protection),
            "evict_every": self.evict_every,
            "engine": ENGINE_VERSION,
            "model": {"name": self.model.name, **vars(self.model)},
            "budget": {"name": self.bound.label},
            "sampling": vars(self.settings.sampling),
            "device": torch.device(self.settings.device).type,
            "dtype": self.dtype_name,
            "kv_dtype": self.kv_dtype_name,
            "content": {
                "data": data,
                "model": model_fingerprint(self.model),
                "policy": code_fingerprint(self.policy, Policy),
                "shape": code_fingerprint(self.shape, Shape),
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

    def all_samples(self, tokenizer: Tokenizer, limit: int | None = None) -> Sequence[Sample]:
        """Those of the task, or the first ``limit`` of them. Raises UsageError."""
        try:
            samples = self.task.samples(tokenizer, self.settings.seed, limit)
        except ValueError as error:
            raise UsageError(f"{self.task.name}: {error}") from error
        return (
            [question_first(s) for s in samples] if self.settings.question == "first" else samples
        )

    def samples(self, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The first ``limit`` samples, each checked against the model's context and the budget."""
        limit = self.settings.limit
        samples = self.all_samples(tokenizer, None if limit is None else min(limit, sys.maxsize))
        eviction = self.eviction(self.num_layers)
        for sample in samples:
            if self.settings.question != "inside" and not sample.question_tokens:
                raise UsageError(
                    f"question={self.settings.question}: task {self.task.name} has no context "
                    "apart from its question; use question=inside"
                )
            eviction.check(self.budget_tokens(sample), self.room_tokens(sample))
        if samples:
            self._check_context(max(samples, key=total_tokens))
        for turns in self.dialogues(samples).values():
            self._check_context(turns[-1], tokens_before_answer(turns))
        return samples

    def dialogues(self, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
        """By context, the turns of each dialogue in their order; none under turns=independent.

        Raises UsageError for a sample that shares its context with no other.
        """
        found: dict[str, list[Sample]] = {}
        for sample in samples if self.is_dialogue else ():
            if sample.context is None:
                raise UsageError(
                    f"turns=dialogue: task {self.task.name} asks one question of each context; "
                    "use turns=independent"
                )
            found.setdefault(sample.context.id, []).append(sample)
        return {name: sorted(own, key=_turn) for name, own in found.items()}

    def shares_contexts(self, sample: Sample) -> bool:
        """Whether its context is compressed apart from the question, once for all who ask of it."""
        return self.settings.question == "after" and sample.context is not None

    def engine(
        self,
        model: PreTrainedModel,
        codec: Codec,
        *,
        policy: Policy | None = None,
        slots: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> Engine:
        """An engine as the cell asks for it, but for what is given here."""
        own = policy is None  # another policy, such as a full reference, goes without the rest
        return Engine(
            model,
            policy or self.policy,
            shape=self.shape if own else None,
            protection=self.protection if own else None,
            evict_every=self.evict_every if own else 1,
            codec=codec,
            kv_dtype=kv_dtype or self.torch_kv_dtype,
            chunk_tokens=self.settings.chunk,
            slots=slots or self.settings.slots,
            attention=self.settings.attention,
            graphs=self.settings.graphs and own,
        )

    def part(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that the shard holds; all of them without a shard."""
        return [s for s in samples if self.shard is None or self.shard.holds(s.id)]

    def budget_tokens(self, sample: Sample) -> int | None:
        """Of one sample; None without a bound, or for one in bytes (byte_budget.py settles it)."""
        return self.bound.for_prompt(longest_prompt_tokens(sample))

    def room_tokens(self, sample: Sample) -> int:
        """What its context leaves room for: the longest question that is asked of it."""
        own = self.question_tokens(sample)
        return own if not own or sample.context is None else sample.context.longest_question_tokens

    def question_tokens(self, sample: Sample) -> int:
        """Tokens held back from compression under question=after, else none."""
        return sample.question_tokens if self.settings.question == "after" else 0

    def _check_context(self, longest: Sample, prompt_tokens: int | None = None) -> None:
        """prompt_tokens: all that comes before its answer, if that is more than its prompt."""
        limit_tokens = self.context_tokens
        check_context(
            f"sample {longest.id}",
            prompt_tokens or len(longest.prompt_token_ids),
            longest.max_new_tokens,
            limit_tokens,
            "" if limit_tokens is None else self.task.advice(longest, limit_tokens),
        )


def longest_prompt_tokens(sample: Sample) -> int:
    """Of all questions that are asked of its context, which share one budget."""
    if sample.context is None:
        return len(sample.prompt_token_ids)
    return sample.context.longest_prompt_tokens


def tokens_before_answer(turns: Sequence[Sample]) -> int:
    """Most tokens before the answer of the last of a dialogue's turns, earlier answers included."""
    follow_ups = sum(len(turn.follow_up_token_ids) for turn in turns[1:])
    answers = sum(turn.max_new_tokens for turn in turns[:-1])
    return len(turns[0].prompt_token_ids) + follow_ups + answers


def _turn(sample: Sample) -> int:
    assert sample.context is not None, "checked"
    return sample.context.turn


def total_tokens(sample: Sample) -> int:
    """Most tokens that the sample can take, prompt and answer."""
    return len(sample.prompt_token_ids) + sample.max_new_tokens


def question_first(sample: Sample) -> Sample:
    """The same sample with its question, and what follows it, before the prompt as well.

    What a token of the context projects then depends on the question: Locret-Q of "Locret",
    https://arxiv.org/abs/2410.01805. Token indices in ``meta`` stay those of the plain prompt.
    """
    question = sample.prompt_token_ids[len(sample.prompt_token_ids) - sample.question_tokens :]
    return replace(sample, prompt_token_ids=question + sample.prompt_token_ids)
