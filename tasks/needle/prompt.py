"""Prompts with needles: all the haystack a length has room for, and where the needles stand in it.

Several questions share one text, as long as the one with the longest question allows.

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
    haystack: str  # with introduction and needles, without the question
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
    questions: Sequence[str],
    length_tokens: int,
) -> list[NeedlePrompt]:
    """A prompt for each question, the longest that all of them can have within ``length_tokens``.

    Each needle stands at the boundary nearest its depth. Raises ValueError, with the least possible
    length, if there is no room for one sentence.
    """
    in_text = sorted(range(len(needles)), key=depths.__getitem__)
    tokenizer = stretch.tokenizer

    def pieces(num_sentences: int) -> list[str]:
        """Haystack and needles by turns; the first piece has the introduction."""
        texts = stretch.split(num_sentences, sorted(depths))
        texts[0] = intro + texts[0]
        inserted = [*(needles[n] for n in in_text), ""]
        return list(chain.from_iterable(zip(texts, inserted, strict=True)))[:-1]

    def render(num_sentences: int) -> list[int]:
        text = "".join(pieces(num_sentences))
        return max((render_prompt(tokenizer, text + asked) for asked in questions), key=len)

    num_sentences = stretch.most_sentences(render, length_tokens)
    if num_sentences == 0:
        takes = "this needle takes" if len(needles) == 1 else f"these {len(needles)} needles take"
        least = len(render(1))
        raise ValueError(f"length {length_tokens} is too small: {takes} {least} tokens")
    *texts, haystack = accumulate(pieces(num_sentences))
    rendered = [render_prompt(tokenizer, haystack + asked) for asked in questions]

    def tokens_before(text: str) -> int:
        # Found without offsets, which not all tokenizers give: a prompt that goes on with
        # another sign shares just the tokens before it, through any chat template.
        other = render_prompt(tokenizer, text + "~")
        return sum(1 for _ in takewhile(bool, map(int.__eq__, rendered[0], other)))

    start, end = tokens_before(intro), tokens_before(haystack + " ")
    needle_tokens, first_tokens, haystack_before = 0, {}, {}
    for n, before, after in zip(in_text, texts[0::2], texts[1::2], strict=True):
        first_tokens[n] = tokens_before(before)
        haystack_before[n] = first_tokens[n] - start - needle_tokens
        needle_tokens += tokens_before(after + " ") - first_tokens[n]
    haystack_tokens = end - start - needle_tokens
    return [
        NeedlePrompt(
            text=haystack + asked,
            haystack=haystack,
            token_ids=token_ids,
            question_tokens=len(token_ids) - end,
            first_tokens=[first_tokens[n] for n in range(len(needles))],
            depth_percents=[
                100 * haystack_before[n] / haystack_tokens for n in range(len(needles))
            ],
        )
        for asked, token_ids in zip(questions, rendered, strict=True)
    ]
