"""Prompts with needles: all the haystack a length has room for, and where the needles stand in it.

The real places are measured in the prompt's own tokens, chat template included.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, takewhile
from typing import NamedTuple

from kvarena.tasks.base import render_prompt
from kvarena.tasks.haystack import Stretch


class NeedlePrompt(NamedTuple):
    """A prompt and where its needles are; lists are in the order the needles were given in."""

    text: str
    token_ids: list[int]
    question_tokens: int  # all that follows the haystack
    first_tokens: list[int]  # index of each needle's first token
    depth_percents: list[float]  # share of the haystack's tokens, needles not among them


def hide_needles(
    stretch: Stretch,
    needles: Sequence[str],
    depths: Sequence[float],
    *,
    intro: str,
    question: str,
    length_tokens: int,
) -> NeedlePrompt:
    """The longest prompt within ``length_tokens``, each needle at the boundary nearest its depth.

    Raises ValueError, with the least possible length, if there is no room for one sentence.
    """
    in_text = sorted(range(len(needles)), key=depths.__getitem__)

    def pieces(num_sentences: int) -> list[str]:
        """Haystack and needles by turns; the first piece has the introduction, the last asks."""
        texts = stretch.split(num_sentences, sorted(depths))
        texts[0] = intro + texts[0]
        inserted = [*(needles[n] for n in in_text), question]
        return list(chain.from_iterable(zip(texts, inserted, strict=True)))

    def render(num_sentences: int) -> list[int]:
        return render_prompt(stretch.tokenizer, "".join(pieces(num_sentences)))

    num_sentences = stretch.most_sentences(render, length_tokens)
    if num_sentences == 0:
        takes = "this needle takes" if len(needles) == 1 else f"these {len(needles)} needles take"
        least = len(render(1))
        raise ValueError(f"length {length_tokens} is too small: {takes} {least} tokens")
    token_ids = render(num_sentences)

    def tokens_before(text: str) -> int:
        # Found without offsets, which not all tokenizers give: a prompt that goes on with
        # another sign shares just the tokens before it, through any chat template.
        other = render_prompt(stretch.tokenizer, text + "~")
        return sum(1 for _ in takewhile(bool, map(int.__eq__, token_ids, other)))

    *texts, whole = accumulate(pieces(num_sentences))
    start, end = tokens_before(intro), tokens_before(texts[-1] + " ")
    needle_tokens, first_tokens, haystack_before = 0, {}, {}
    for n, before, after in zip(in_text, texts[0::2], texts[1::2], strict=False):
        first_tokens[n] = tokens_before(before)
        haystack_before[n] = first_tokens[n] - start - needle_tokens
        needle_tokens += tokens_before(after + " ") - first_tokens[n]
    haystack_tokens = end - start - needle_tokens
    return NeedlePrompt(
        text=whole,
        token_ids=token_ids,
        question_tokens=len(token_ids) - end,
        first_tokens=[first_tokens[n] for n in range(len(needles))],
        depth_percents=[100 * haystack_before[n] / haystack_tokens for n in range(len(needles))],
    )
