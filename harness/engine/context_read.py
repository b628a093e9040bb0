"""A context that several requests share, on its way through a slot."""

from collections import deque
from dataclasses import dataclass, field, replace

from kvarena.harness.engine.active_request import ActiveRequest


@dataclass(kw_only=True)
class ContextRead(ActiveRequest):
    """A context that is read once; then its slot holds it until its last question begins there.

    request: of one of its questions, up to where the question begins.
    """

    questions: deque[ActiveRequest] = field(default_factory=deque)

    @classmethod
    def of(cls, question: ActiveRequest) -> "ContextRead":
        asked = question.request
        context = replace(
            asked,
            prompt=asked.prompt[: asked.context_tokens],
            question_tokens=0,
            room_tokens=asked.held_back_tokens,
        )
        return cls(index=question.index, request=context, generator=question.generator)

    def next_question(self, now_sec: float) -> ActiveRequest:
        """The next one to answer, with what the context has cost, if it is the first of them."""
        question = self.questions.popleft()
        question.go_on_from(self)
        question.prefill_tokens, self.prefill_tokens = self.prefill_tokens, 0
        question.admitted_at, self.admitted_at = self.admitted_at or now_sec, 0.0
        return question

    def chooses_after(self, num_new: int) -> bool:
        return False

    @property
    def waits(self) -> bool:
        return self.num_seen == len(self.request.prompt)

    @property
    def finish_reason(self) -> str | None:
        return "invalid" if self.error else None
