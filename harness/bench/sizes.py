"""What the bench measures, and how much: policies, and every length, width and count."""

from dataclasses import dataclass, replace
from typing import Self

from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, load_choice, one_of, ready_policies
from kvarena.policies.base import Policy

# All others cost as one of these does: they score keys, new tokens or attention.
_EVICTING = ("streaming_llm", "keydiff", "l2norm", "tova", "snapkv", "h2o")
# Measured at every length and width: the cheapest rule there is, and the one that kvpress has.
CHIEF = ("streaming_llm", "keydiff")


def _sees_attention(policy: Policy) -> bool:
    return policy.needs.attention_mass or policy.needs.attention_rows > 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """policies: those that evict, and are compared with each other and with the full cache."""

    policies: tuple[str, ...] = _EVICTING

    def evicting(self, *, see_attention: bool | None = None) -> list[str]:
        """All of them, or those that see attention, or that do not."""
        return [
            name
            for name in self.policies
            if see_attention in (None, _sees_attention(build(load_choice("policy", name))))
        ]

    def with_policies(self, names: str | None) -> Self:
        """Further ones, as ``--also a,b`` has them. Raises UsageError for what cannot be."""
        also = [name for name in (names or "").split(",") if name]
        for name in also:
            one_of("policy", name, ready_policies())
            if not build(load_choice("policy", name)).evicts:
                raise UsageError(f"policy {name} keeps everything and is measured as full is")
        return replace(self, policies=tuple(dict.fromkeys((*self.policies, *also))))


@dataclass(frozen=True, kw_only=True)
class Sizes(Measured):
    """Units: tokens, unless the name says otherwise.

    rounds: visits of every case; job_rounds: of the jobs, which take minutes each.
    budget_tokens: N of prefills; chunk_tokens: B; lengths: prompts read in chunks of B;
    wide_lengths: prompts read in chunks of wide_chunk_tokens, and at once by the peers;
    policy_length: the prompt on which all policies are compared.
    slots x caches: the grid of decoding; policy_shapes: (slots, cache) where all policies are
    compared; passes: timed at each visit of a state that is full; evict_every: of their decoding.
    job_prompts prompts of job_lengths by turns with job_new_tokens answers; answer_prompts short
    prompts with answer_new_tokens under answer_budget_tokens (MATH-like); job_slots: for both.
    codec_prompt_tokens, codec_new_tokens: of the sample that is read and written with each codec.
    matmul_rows, stream_floats: sizes at which the machine's own rates are taken.
    """

    name: str
    rounds: int
    job_rounds: int
    budget_tokens: int = 512
    chunk_tokens: int = 128
    lengths: tuple[int, ...] = (1000, 8000)
    wide_chunk_tokens: int = 256
    wide_lengths: tuple[int, ...] = (1000, 7000)
    policy_length: int = 4000
    slots: tuple[int, ...] = (1, 4, 8, 16)
    caches: tuple[int, ...] = (512, 1024, 2048)
    policy_shapes: tuple[tuple[int, int], ...] = ((1, 512), (8, 512), (8, 2048))
    passes: int = 4
    evict_every: tuple[int, ...] = (1, 16)
    job_prompts: int = 16
    job_lengths: tuple[int, ...] = (1000, 2000, 3000, 4000)
    job_new_tokens: int = 24
    answer_prompts: int = 16
    answer_new_tokens: int = 256
    answer_budget_tokens: int = 256
    job_slots: int = 8
    codec_prompt_tokens: int = 2000
    codec_new_tokens: int = 32
    matmul_rows: int = 512
    stream_floats: int = 2**26


DEFAULT = Sizes(name="default", rounds=3, job_rounds=2)
FULL = Sizes(name="full", rounds=7, job_rounds=3, job_prompts=32, answer_prompts=32)
# The toy has the tests' proportions: everything runs, no figure means anything.
QUICK = Sizes(
    name="quick",
    rounds=2,
    job_rounds=1,
    budget_tokens=48,
    chunk_tokens=16,
    lengths=(64, 256),
    wide_chunk_tokens=32,
    wide_lengths=(64, 128),
    policy_length=128,
    slots=(1, 2),
    caches=(48, 96),
    policy_shapes=((2, 48),),
    passes=2,
    evict_every=(1, 2),
    job_prompts=4,
    job_lengths=(64, 128),
    job_new_tokens=4,
    answer_prompts=4,
    answer_new_tokens=8,
    answer_budget_tokens=48,
    job_slots=2,
    codec_prompt_tokens=208,
    codec_new_tokens=4,
    matmul_rows=64,
    stream_floats=2**16,
)
