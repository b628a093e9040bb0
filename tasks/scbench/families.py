"""SCBench's families that are here, and their protocol: file names, answer lengths, frames.

Answer lengths and the fixed sentences of frames are those of ``scbench/eval_utils.py`` of
https://github.com/microsoft/MInference (MIT).
"""

from collections.abc import Sequence
from dataclasses import replace

from kvarena.tasks.ruler.prompts import PromptParts

RETR_KV = "retr_kv"  # the value of a key of a JSON object
RETR_PREFIX_SUFFIX = "retr_prefix_suffix"  # the string that begins and ends in a given way
RETR_MULTIHOP = "retr_multihop"  # all variables with a given value, through assignments
MATH_FIND = "math_find"  # the number at a given rank of a list
EN_QA = "en_qa"  # questions about a novel
ZH_QA = "zh_qa"  # the same in Chinese
EN_MULTICHOICE = "en_multichoice"  # one of four answers about a novel
EN_SUM = "en_sum"  # what a document among several says
ICL_MANYSHOT = "icl_manyshot"  # a task that hundreds of examples show
MIX_SUM_NIAH = "mix_sum_niah"  # summaries, and numbers hidden in what is summed up
NEEDLE = "needle"  # a turn of this mixture; its other turns are of EN_SUM
# What the files of the benchmark are called after.
FILE_STEMS = {
    RETR_KV: "scbench_kv",
    RETR_PREFIX_SUFFIX: "scbench_prefix_suffix",
    RETR_MULTIHOP: "scbench_vt",
    MATH_FIND: "scbench_mf",
    EN_QA: "scbench_qa_eng",
    ZH_QA: "scbench_qa_chn",
    EN_MULTICHOICE: "scbench_choice_eng",
    EN_SUM: "scbench_summary",
    ICL_MANYSHOT: "scbench_many_shot",
    MIX_SUM_NIAH: "scbench_summary_with_needles",
}
FAMILIES = tuple(FILE_STEMS)
# Those whose contexts generated.py makes; the others need texts, which only the files have.
MADE_FAMILIES = (RETR_KV, RETR_PREFIX_SUFFIX, RETR_MULTIHOP, MATH_FIND)
# What the turns of a mixture are, by the files' field "task".
TURN_TASKS = {"scbench_summary": EN_SUM, "scbench_passkey": NEEDLE}
ANSWER_TOKENS = {
    RETR_KV: 150,
    RETR_PREFIX_SUFFIX: 150,
    RETR_MULTIHOP: 30,
    MATH_FIND: 5,
    EN_QA: 40,
    ZH_QA: 40,
    EN_MULTICHOICE: 40,
    EN_SUM: 200,
    ICL_MANYSHOT: 10,
}
MIXTURE_ANSWER_TOKENS = {EN_SUM: 800, NEEDLE: 15}
KV_FRAME = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
# What stands before a context, where that does not depend on the questions.
BEFORE = {
    RETR_KV: KV_FRAME,
    EN_QA: "Read the book and answer the question. Be very concise in your answer.\n\n",
    ZH_QA: "阅读以下书籍然后回答问题。\n\n",
    EN_MULTICHOICE: "Read the book and answer the question.\n\n",
}
# "The the" is the benchmark's.
QUESTIONS = {
    EN_QA: "Question: {}\nAnswer:",
    ZH_QA: "问题：{}\n答案：",  # noqa: RUF001
    EN_MULTICHOICE: "Question: {}\nA. {}\nB. {}\nC. {}\nD. {}\n\nThe the correct answer is",
}


def conversation(
    before: str, context: str, turns: Sequence[tuple[str, Sequence[str]]], *, marked: bool = True
) -> PromptParts:
    """The prompt of the first turn, and those of the others with the same context.

    turns: questions with their references. marked: mark what of these stands in the context, as
    where the answer is; the words of an answer about a whole text stand in it by chance.
    """
    first, *others = (
        PromptParts(
            before=before,
            context=context,
            after=f"\n\n{question}",
            prefix="",
            references=tuple(references),
            marks=tuple(text for text in references if marked and text in context),
        )
        for question, references in turns
    )
    return replace(first, others=tuple(others))
