"""Fidelity: how far a policy moves the model from what it says with the full cache.

Takes the samples of any other task, feeds the same answer to the full cache and to the policy's
cache (teacher forcing), and compares the distributions that choose each of its tokens:
KL(full || policy), top-1 agreement (the ``score``), and negative log-likelihood. It tells policies
apart on a model that answers hardly any question, and with few samples.

Method: this project's own; KL of next-token distributions as the distance to an uncompressed model
is that of "Accuracy is Not All You Need", https://arxiv.org/abs/2407.09141.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.harness.registry import build, choices, load_choice, one_of
from kvarena.tasks.base import Sample, Task, Tokenizer, content_id

REFERENCES = ("full", "gold")


@dataclass(kw_only=True)
class Fidelity(Task):
    """The samples of task ``of``; what is forced is ``reference``. ValueError on a bad option.

    reference: full: what the model answers greedily with the full cache, its stop token included;
    gold: the first reference of the sample that is not blank, without a stop token. It is tokenized
    on its own and as it is: right where a chat template's header precedes it; after a plain prompt
    a model would often write a space first, which moves both caches' likelihood of the first token.
    """

    is_teacher_forced: ClassVar[bool] = True
    # And those of the task within.
    row_columns: ClassVar[tuple[Column, ...]] = (
        Column("meta_of", str, "name", "whose samples these are"),
        Column("meta_forced", str, "", "the answer that was forced", choices=REFERENCES),
    )

    of: str = "needle"
    options: Mapping[str, Any] | None = None  # Any: whatever that task's yaml holds
    reference: str = "full"
    max_tokens: int = 32
    attention_recall: bool = False

    def __post_init__(self) -> None:
        if self.of == "fidelity":
            raise ValueError("of must name another task, fidelity cannot be measured itself")
        settings = load_choice("task", one_of("task", self.of, choices("task")))
        if not isinstance(self.options, Mapping | None):
            raise ValueError(f"options must be a mapping or null, got {self.options!r}")
        allowed = [name for name in settings if name != "_target_"]
        for name in self.options or {}:
            one_of(f"option of task {self.of}", str(name), allowed)
        one_of("reference", self.reference, REFERENCES)
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be an int from 1 on, got {self.max_tokens!r}")
        if type(self.attention_recall) is not bool:
            raise ValueError(f"attention_recall must be a bool, got {self.attention_recall!r}")
        self._settings = settings | dict(self.options or {})
        self._task: Task = build(self._settings)

    def settle(self, context_tokens: int | None) -> dict[str, Any]:
        """``options``, with those that were ``auto`` of the task within."""
        settled = self._task.settle(context_tokens)
        self._settings |= settled
        return {"options": {**(self.options or {}), **settled}} if settled else {}

    def advice(self, longest: Sample, context_tokens: int) -> str:
        return (
            f"give task.options of {self.of} that make shorter prompts, or a lower task.max_tokens"
        )

    # One table must not average over tasks or over what was forced, so both are in the name.
    @property
    def name(self) -> str:  # type: ignore[override]
        """fidelity-needle, or fidelity-needle-gold."""
        return f"fidelity-{self.of}" + ("-gold" if self.reference == "gold" else "")

    @property
    def version(self) -> str:  # type: ignore[override]
        """Changes with the version and with every option of the task within, defaults included."""
        return f"1-{content_id(self._task.version, self._settings)[:8]}"

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """Those of the task within, under ids of their own, with at most ``max_tokens`` to answer.

        Raises ValueError for a sample without the gold answer that was asked for.
        """
        samples = self._task.samples(tokenizer, seed, limit)
        return [self._forced(sample) for sample in samples]

    def data_fingerprint(self) -> str | None:
        return self._task.data_fingerprint()

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """Nothing: the text is forced. The harness measures ``score`` on the logits."""
        return {}

    def forced_token_ids(self, tokenizer: Tokenizer, sample: Sample) -> list[int] | None:
        """Tokens of the gold answer to force; None for the full cache's own answer."""
        if self.reference == "full":
            return None
        token_ids = tokenizer.encode(_gold(sample), add_special_tokens=False)
        return token_ids[: sample.max_new_tokens]

    def _forced(self, sample: Sample) -> Sample:
        if self.reference == "gold" and not _gold(sample):
            raise ValueError(f"sample {sample.id} has no gold answer to force; use reference=full")
        return replace(
            sample,
            id=content_id("fidelity", "1", self.of, self.reference, sample.id),
            max_new_tokens=min(sample.max_new_tokens, self.max_tokens),
            meta={**sample.meta, "of": self.of, "forced": self.reference},
        )


def _gold(sample: Sample) -> str:
    return next((text for text in sample.references if text.strip()), "")
