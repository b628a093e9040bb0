"""SCBench's families that are here, and their protocol: file names, answer lengths, frames.

Answer lengths and the sentence before a JSON object are those of ``scbench/eval_utils.py`` of
https://github.com/microsoft/MInference (MIT).
"""

from collections.abc import Sequence
from dataclasses import replace

from kvarena.tasks.ruler.prompts import PromptParts

RETR_KV = "retr_kv"  # the value of a key of a JSON object
RETR_PREFIX_SUFFIX = "retr_prefix_suffix"  # the string that begins and ends in a given way
RETR_MULTIHOP = "retr_multihop"  # all variables with a given value, through assignments
MATH_FIND = "math_find"  # the number at a given rank of a list
# What the files of the benchmark are called after.
FILE_STEMS = {
    RETR_KV: "scbench_kv",
    RETR_PREFIX_SUFFIX: "scbench_prefix_suffix",
    RETR_MULTIHOP: "scbench_vt",
    MATH_FIND: "scbench_mf",
}
FAMILIES = tuple(FILE_STEMS)
ANSWER_TOKENS = {RETR_KV: 150, RETR_PREFIX_SUFFIX: 150, RETR_MULTIHOP: 30, MATH_FIND: 5}
KV_FRAME = "Extract the value corresponding to the specified key in the JSON object below.\n\n"


def conversation(
    before: str, context: str, turns: Sequence[tuple[str, Sequence[str]]]
) -> PromptParts:
    """The prompt of the first turn, and those of the others with the same context.

    turns: questions with their references. What of these stands in the context is marked.
    """
    first, *others = (
        PromptParts(
            before=before,
            context=context,
            after=f"\n\n{question}",
            prefix="",
            references=tuple(references),
            marks=tuple(text for text in references if text in context),
        )
        for question, references in turns
    )
    return replace(first, others=tuple(others))
