"""Shards: disjoint parts of a cell's samples, so that several machines can share one cell."""

import re
from dataclasses import dataclass
from typing import Any

from kvarena.harness.errors import UsageError
from kvarena.tasks.base import content_id


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of ``count``."""

    number: int
    count: int

    @property
    def label(self) -> str:
        """As it is written on the command line: 3/8."""
        return f"{self.number}/{self.count}"

    @property
    def suffix(self) -> str:
        """Sets the shard's files apart from those of others: -3of8."""
        return f"-{self.number}of{self.count}"

    def holds(self, sample_id: str) -> bool:
        """By a hash of the id, so that neither order nor number of the samples matters."""
        return int(content_id("shard", sample_id), 16) % self.count == self.number - 1


def parse_shard(value: Any) -> Shard | None:  # Any: what a user may have typed
    """``3/8`` as the third of eight shards; None for none. Raises UsageError for anything else."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", str(value), re.ASCII)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(
            f"shard={value} is not one of several parts; write shard=3/8 for the third of eight "
            "(1/8 to 8/8), or leave it out"
        )
    return Shard(int(found[1]), int(found[2]))
