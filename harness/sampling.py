"""How the next token is chosen, as a setting: greedy, or drawn from filtered probabilities."""

from dataclasses import dataclass

from kvarena.harness.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. UsageError out of range."""

    temperature: float = 0.0
    top_k: int = 0  # tokens
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", ">= 0 and finite", 0 <= self.temperature < float("inf")),
            ("top_k", ">= 0 tokens", self.top_k >= 0),
            ("top_p", "over 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "at least 0 and under 1", 0 <= self.min_p < 1),
        )
        for name, allowed, holds in checks:  # nan fails every comparison
            if not holds:
                raise UsageError(f"sampling.{name} must be {allowed}, got {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def label(self) -> str:
        """greedy, or what was set: temperature=0.6,top_p=0.95."""
        if self.is_greedy:
            return "greedy"
        changed = {k: v for k, v in vars(self).items() if v != getattr(Sampling, k)}
        return ",".join(f"{key}={value}" for key, value in changed.items())
