"""The same work elsewhere: transformers' generate, its model in a plain loop, and kvpress.

All of them attend through sdpa and hold a DynamicCache. kvpress runs in an interpreter of its own
(KVPRESS_PYTHON), since it needs an older transformers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from kvarena.harness.bench.line_worker import LineWorker
from kvarena.harness.bench.measure import Case, TimedCase, now_sec
from kvarena.harness.bench.memory import peak_bytes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.errors import UsageError

Prompts = Sequence[tuple[list[int], int]]  # token ids, and how many of the last are the question


@torch.inference_mode()
def generate(subject: Subject, prompt: Sequence[int], new_tokens: int) -> Tensor:
    """``model.generate`` of one prompt: greedy, exactly so many new tokens, full attention."""
    input_ids = torch.tensor([list(prompt)], device=subject.device)
    return subject.stock.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def generate_prefill(subject: Subject, *, section: str, prompt_tokens: int) -> TimedCase:
    """``model.generate`` up to its first token."""

    def read() -> dict[str, float]:
        started = now_sec(subject.device)
        generate(subject, subject.text[:prompt_tokens], 1)
        ttft_sec = now_sec(subject.device) - started
        return {"ttft_sec": ttft_sec, "prefill_tokens_per_sec": prompt_tokens / ttft_sec}

    return TimedCase(
        case=Case(
            section=section,
            what="prefill",
            system="generate",
            policy="full",
            attention="sdpa",
            prompt_tokens=prompt_tokens,
            slots=1,
        ),
        run=read,
        warm=lambda: peak_bytes(read, subject.device),
    )


def dynamic_cache_decode(
    subject: Subject, *, section: str, slots: int, cache_tokens: int, passes: int
) -> TimedCase:
    """An explicit greedy loop over a DynamicCache that starts with the same keys and values.

    A loop and not ``generate``, which could only get there by reading a batch of prompts first.
    """

    @torch.inference_mode()
    def write() -> dict[str, float]:
        cache = DynamicCache(config=subject.stock.config)
        for index, (keys, values) in enumerate(subject.keys_and_values(cache_tokens)):
            cache.update(keys.repeat(slots, 1, 1, 1), values.repeat(slots, 1, 1, 1), index)
        tokens = torch.full((slots, 1), subject.text[cache_tokens], device=subject.device)
        started = 0.0
        for number in range(passes + 1):
            if number == 1:  # the first pass is not timed, as for the engine
                started = now_sec(subject.device)
            logits = subject.stock(input_ids=tokens, past_key_values=cache).logits
            tokens = logits[:, -1:].argmax(dim=-1)
            tokens.tolist()  # a real loop looks at each token, to stop
        pass_sec = (now_sec(subject.device) - started) / passes
        return {"pass_sec": pass_sec, "decode_tokens_per_sec": slots / pass_sec}

    return TimedCase(
        case=Case(
            section=section,
            what="decode",
            system="dynamic_cache",
            policy="full",
            attention="sdpa",
            slots=slots,
            cache_tokens=cache_tokens,
        ),
        run=write,
    )


def generate_job(subject: Subject, case: Case, prompts: Prompts, new_tokens: int) -> TimedCase:
    """One prompt after the other through ``model.generate``."""

    def work(some: Prompts) -> dict[str, float]:
        started = now_sec(subject.device)
        for prompt, _ in some:
            generate(subject, prompt, new_tokens)
        job_sec = now_sec(subject.device) - started
        return {"job_sec": job_sec, "samples_per_min": 60 * len(some) / job_sec}

    def warm() -> dict[str, float]:
        work(prompts[:1])
        return {}

    return TimedCase(case=case, run=lambda: work(prompts), warm=warm)


class KvpressServer(LineWorker):
    """A process with kvpress that does one job per line; use as a context manager.

    Raises UsageError if the interpreter cannot run it.
    """

    def __init__(self, python: str, folder: str | None) -> None:
        if folder is None:
            raise UsageError("kvpress reads its model from a folder, and random weights have none")
        script = Path(__file__).with_name("kvpress_server.py")
        threads = str(torch.get_num_threads())
        try:
            # Isolated: this folder would else hide modules of the same names.
            super().__init__(
                [python, "-I", str(script), folder, threads],
                "the interpreter of KVPRESS_PYTHON stopped (its own message is above); it needs "
                "torch, kvpress and transformers below 5.3",
            )
        except OSError as error:
            raise UsageError(f"KVPRESS_PYTHON={python} cannot be started: {error}") from error
        self.versions = self.answer()

    def work(
        self, prompts: Prompts, *, budget_tokens: int, block_tokens: int, new_tokens: int
    ) -> float:
        """Seconds for the prompts one after the other: BlockPress(KeyDiff), exact new tokens."""
        self.ask(
            {
                "prompts": [[list(prompt), question] for prompt, question in prompts],
                "budget_tokens": budget_tokens,
                "block_tokens": block_tokens,
                "new_tokens": new_tokens,
            }
        )
        return self.answer()["job_sec"]


def kvpress_job(server: KvpressServer, case: Case, prompts: Prompts, new_tokens: int) -> TimedCase:
    """The same prompts through kvpress's pipeline, compressed to the budget of ``case``."""
    budget_tokens, block_tokens = case.budget_tokens or 0, case.chunk_tokens or 0

    def work(some: Prompts) -> dict[str, float]:
        job_sec = server.work(
            some, budget_tokens=budget_tokens, block_tokens=block_tokens, new_tokens=new_tokens
        )
        return {"job_sec": job_sec, "samples_per_min": 60 * len(some) / job_sec}

    def warm() -> dict[str, float]:
        work(prompts[:1])
        return {}

    return TimedCase(case=case, run=lambda: work(prompts), warm=warm)


def kvpress_prefill(server: KvpressServer, subject: Subject, case: Case) -> TimedCase:
    """One prompt through kvpress up to its first token; the last token stands for the question."""
    prompt = subject.text[: case.prompt_tokens]
    job = kvpress_job(server, case, [(prompt, 1)], 1)

    def read() -> dict[str, float]:
        ttft_sec = job.run()["job_sec"]
        return {"ttft_sec": ttft_sec, "prefill_tokens_per_sec": len(prompt) / ttft_sec}

    return TimedCase(case=case, run=read, warm=job.warm)
