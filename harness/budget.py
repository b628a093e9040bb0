"""The budget as users write it, and as tokens: the one place where the one becomes the other."""

import math
import re
from dataclasses import dataclass

from kvarena.harness.errors import UsageError

GRAMMAR = "a number of tokens (512), of 1024 tokens (2k, 8k), a share of the prompt (25%), or full"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most one of tokens and ratio is set; neither means no bound."""

    label: str
    tokens: int | None = None
    ratio: float | None = None

    def for_prompt(self, prompt_tokens: int) -> int | None:
        """Tokens per KV head for one prompt; None if unbounded.

        A share is rounded up and is the same for every policy: equal memory is the point.
        """
        if self.ratio is None:
            return self.tokens
        # Rounded first: 0.07 * 100 is a hair over 7 in binary.
        return max(1, math.ceil(round(self.ratio * prompt_tokens, 6)))

    @property
    def sort_key(self) -> tuple[int, float]:
        """Tokens in ascending order, then shares, then no bound."""
        if self.tokens is not None:
            return (0, self.tokens)
        return (1, self.ratio) if self.ratio is not None else (2, 0)


def parse_budget(text: str | int) -> Budget:
    """Raise UsageError for anything outside the grammar."""
    label = str(text).strip().lower()
    if label == "full":
        return Budget(label=label)
    match = re.fullmatch(r"([0-9]+)(k?)", label)
    if match and int(match[1]) > 0:
        tokens = int(match[1]) * (1024 if match[2] else 1)
        # One label for one amount of memory: 2048 is the same cell as 2k.
        return Budget(
            label=f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens), tokens=tokens
        )
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", label)
    if match and 0 < float(match[1]) <= 100:
        return Budget(label=label, ratio=float(match[1]) / 100)
    raise UsageError(f"budget={text!s} is not {GRAMMAR}")
