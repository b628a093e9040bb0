"""The budget as users write it, and as tokens: the one place where the one becomes the other."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from kvarena.harness.errors import UsageError

GRAMMAR = (
    "a number of tokens (512), of 1024 tokens (2k, 8k), a share of the prompt (25%), bytes (12MB), "
    "or full"
)

_UNIT_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNIT_NAMES = {"kb": "kB", "mb": "MB", "gb": "GB"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most one of tokens, ratio and bytes is set; none means no bound."""

    label: str
    tokens: int | None = None
    ratio: float | None = None
    bytes: int | None = None

    def for_prompt(self, prompt_tokens: int) -> int | None:
        """Tokens per KV head for one prompt; None if unbounded, or bounded in bytes.

        A share is rounded up and is the same for every policy: equal memory is the point.
        """
        if self.ratio is None:
            return self.tokens
        # Rounded first: 0.07 * 100 is a hair over 7 in binary.
        return max(1, math.ceil(round(self.ratio * prompt_tokens, 6)))

    @property
    def is_full(self) -> bool:
        """Whether there is no bound."""
        return self.tokens is None and self.ratio is None and self.bytes is None

    @property
    def sort_key(self) -> tuple[int, float]:
        """Tokens in ascending order, then shares, then bytes, then no bound."""
        for rank, amount in enumerate((self.tokens, self.ratio, self.bytes)):
            if amount is not None:
                return (rank, amount)
        return (3, 0)


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
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(kb|mb|gb)", label)
    if match and float(match[1]) > 0:
        number, unit = Decimal(match[1]), match[2]
        num_bytes = round(number * _UNIT_BYTES[unit])
        # In full, so that a label says one amount and can be read again.
        return Budget(label=f"{number.normalize():f}{_UNIT_NAMES[unit]}", bytes=num_bytes)
    raise UsageError(f"budget={text!s} is not {GRAMMAR}")
