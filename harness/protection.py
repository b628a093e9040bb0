"""Which tokens stay whatever their score: ``protect=paper | none | 4+64``."""

import re
from dataclasses import dataclass

from kvarena.harness.errors import UsageError
from kvarena.policies.base import Policy

_ADVICE = "give paper (what each method's authors protect), none, or first+newest tokens like 4+64"


@dataclass(frozen=True)
class Protection:
    """sinks: so many first tokens; recent: so many newest ones. None: as the policy has it."""

    sinks: int | None = None
    recent: int | None = None

    @classmethod
    def parse(cls, text: object) -> "Protection":
        """Of a setting. Raises UsageError for anything else."""
        if text == "paper":
            return cls()
        if text == "none":
            return cls(0, 0)
        match = re.fullmatch(r"(\d+)\+(\d+)", str(text))
        if not match:
            raise UsageError(f"protect={text}: {_ADVICE}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        if self.sinks is None:
            return "paper"
        return f"{self.sinks}+{self.recent}" if self.sinks or self.recent else "none"

    def of(self, policy: Policy, budget_tokens: int) -> tuple[int, int]:
        """First and newest tokens that this policy is kept from evicting under this budget."""
        if self.sinks is None or self.recent is None:
            return policy.sinks, policy.num_recent(budget_tokens)
        return self.sinks, self.recent
