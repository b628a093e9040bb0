"""Run by the interpreter of KVPRESS_PYTHON: jobs through kvpress's pipeline, timed there.

``python kvpress_server.py <model folder> <threads>``. Imports nothing of kvarena, whose
transformers kvpress cannot use. Each line of standard input is a job as JSON
(``KvpressServer.work`` writes them), each line of standard output the answer to it; the first one
names the versions.

kvpress (https://github.com/NVIDIA/kvpress) reads the context in one pass with full attention, and
BlockPress then compresses it block by block; the question and the answer are added uncompressed.
"""

import importlib
import json
import os
import sys
from time import perf_counter
from types import ModuleType
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder, threads = sys.argv[1], int(sys.argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"

    # Late, so that what they print goes where it should. kvpress by name, for mypy never sees it.
    import torch
    import transformers

    kvpress = importlib.import_module("kvpress")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # equal answers: none may end early
    pipeline = kvpress.KVPressTextGenerationPipeline(
        model=model.eval(), tokenizer=transformers.AutoTokenizer.from_pretrained(folder)
    )
    modules = {"torch": torch, "transformers": transformers}
    versions = {name: module.__version__ for name, module in modules.items()}
    answers.write(json.dumps(versions) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        started = perf_counter()
        with torch.inference_mode():
            for token_ids, question_tokens in job["prompts"]:
                _answer(pipeline, kvpress, token_ids, question_tokens, job)
        answers.write(json.dumps({"job_sec": perf_counter() - started}) + "\n")


def _answer(
    pipeline: Any,  # Any: kvpress is not installed where types are checked
    kvpress: ModuleType,
    token_ids: list[int],
    question_tokens: int,
    job: dict[str, Any],
) -> None:
    import torch

    context, question = token_ids[:-question_tokens], token_ids[-question_tokens:]
    # Its share of the context that goes, such that the budget stays with the question in it.
    kept = min(len(context), job["budget_tokens"] - question_tokens)
    press = kvpress.BlockPress(
        press=kvpress.KeyDiffPress(compression_ratio=1 - kept / len(context)),
        block_size=job["block_tokens"],
    )
    inputs = {
        "context_ids": torch.tensor([context]),
        "questions_ids": [torch.tensor([question])],
    }
    pipeline._forward(inputs, max_new_tokens=job["new_tokens"], press=press)


if __name__ == "__main__":
    main()
