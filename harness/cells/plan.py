"""What a cell would take, worked out from configuration and tokenizer: the model never loads."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.harness.cells.cell import Cell, longest_prompt_tokens, tokens_before_answer
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.errors import UsageError
from kvarena.harness.files import read_json
from kvarena.harness.models import loading
from kvarena.harness.models.kv_size import bytes_per_token
from kvarena.harness.store.cell_files import find_cells
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.harness.store.row_files import read_lines
from kvarena.tasks.base import Sample

# A place for reading only, or a full one, keeps nobody from planning.
_NOT_NOTED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)

_TIMED = ("prefill_tokens_computed", "generated_tokens", "ttft_sec", "slots")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One cell before it runs. Tokens are those of the samples still to do, prompt and answer.

    shard: 3/8, or "". num_binding: samples that could lose tokens to the budget, the longest answer
    included; None as long as a budget in bytes is not settled. evicts: False for the full cache.
    longest_tokens: most tokens of a prompt and its longest answer.
    kv_bytes_full, kv_bytes_budget: keys, values and positions of the longest sample under the full
    cache and under the budget with a chunk in work; for one sequence, without a codec and without
    a policy's own state.
    eta_sec: by the rate of earlier rows here that are alike; None if there are none.
    not_noted: why ``make status`` will not know of it; "" if it will.
    """

    path: Path
    identity: Mapping[str, Any]  # Any: JSON values
    shard: str
    state: str  # missing | incomplete | done
    num_samples: int
    num_done: int
    num_tokens: int
    num_binding: int | None
    evicts: bool
    longest_tokens: int
    kv_bytes_full: int
    kv_bytes_budget: int
    eta_sec: float | None
    not_noted: str

    @property
    def never_binds(self) -> bool:
        """Whether a policy that evicts would have nothing to evict."""
        return self.evicts and self.num_binding == 0 and self.num_samples > 0


def plan_cell(cell: Cell, results_dir: Path) -> Plan:
    """Raises UsageError for whatever would stop the run before its model loads.

    Also notes how many samples were planned, so that ``make status`` can tell what is missing.
    """
    folder = CellFolder(results_dir, cell.identity, cell.shard)
    all_samples = cell.samples(loading.load_tokenizer(cell.model))
    samples = cell.part(all_samples)
    rows = read_lines(folder.path)
    done = {row["sample_id"] for row in rows if row.get("status") == "ok"}
    left = [sample for sample in samples if sample.id not in done]
    if not (folder.path / "manifest.json").exists():
        folder.refuse_drift()
    prompts = _prompt_tokens(cell, all_samples)  # a shard may lack a dialogue's earlier turns
    lengths = [prompts[sample.id] + sample.max_new_tokens for sample in samples]
    bounds = [cell.budget_tokens(sample) for sample in samples]
    held = [
        total if bound is None else min(total, bound + max(cell.settings.chunk, cell.evict_every))
        for total, bound in zip(lengths, bounds, strict=True)
    ]
    item_bytes = (cell.torch_kv_dtype or cell.torch_dtype).itemsize
    per_token = bytes_per_token(loading.load_config(cell.model), item_bytes)
    num_tokens = _tokens_to_compute(cell, left, prompts)
    rate = _tokens_per_sec(results_dir, cell)
    return Plan(
        path=folder.path,
        identity=folder.identity,
        shard=cell.shard.label if cell.shard else "",
        state="done" if not left else "incomplete" if rows else "missing",
        num_samples=len(samples),
        num_done=len(samples) - len(left),
        num_tokens=num_tokens,
        num_binding=_num_binding(cell, samples, prompts, folder.path),
        evicts=cell.policy.evicts and not cell.bound.is_full,
        longest_tokens=max(lengths, default=0),
        kv_bytes_full=per_token * max(lengths, default=0),
        kv_bytes_budget=cell.bound.bytes or per_token * max(held, default=0),
        eta_sec=num_tokens / rate if rate else None,
        not_noted=_note(folder, len(all_samples)),
    )


def _prompt_tokens(cell: Cell, samples: Sequence[Sample]) -> dict[str, int]:
    """By sample, how many tokens come before its answer: earlier turns and their answers too."""
    prompts = {sample.id: len(sample.prompt_token_ids) for sample in samples}
    for turns in cell.dialogues(samples).values():
        for turn, sample in enumerate(turns):
            prompts[sample.id] = tokens_before_answer(turns[: turn + 1])
    return prompts


def _tokens_to_compute(cell: Cell, left: Sequence[Sample], prompts: Mapping[str, int]) -> int:
    """Prompts and longest answers, what is shared once."""
    total = sum(prompts[sample.id] + sample.max_new_tokens for sample in left)
    by_context: dict[str, list[Sample]] = {}
    for sample in left:
        if sample.context is not None and (cell.is_dialogue or cell.shares_contexts(sample)):
            by_context.setdefault(sample.context.id, []).append(sample)
    for asked in by_context.values():
        if cell.is_dialogue:  # the last turn has all of it
            whole = [prompts[sample.id] + sample.max_new_tokens for sample in asked]
            total -= sum(whole) - max(whole)
        else:
            context_tokens = len(asked[0].prompt_token_ids) - asked[0].question_tokens
            total -= context_tokens * (len(asked) - 1)
    return total


def _num_binding(
    cell: Cell, samples: Sequence[Sample], prompts: Mapping[str, int], folder: Path
) -> int | None:
    """Samples that may have to evict; None as long as nobody knows.

    Question and context together stay in the budget, so question=after changes nothing here but
    for a context with a question that is longer.
    """
    if not cell.policy.evicts:
        return 0
    bounds = [cell.budget_tokens(sample) for sample in samples]
    if cell.bound.bytes is not None:
        fit = read_json(folder / "fit.json") if (folder / "fit.json").exists() else None
        settled = fit.get("budget_tokens") if isinstance(fit, dict) else None
        if not isinstance(settled, int):
            return None
        bounds = [settled for _ in samples]
    eviction = cell.eviction(cell.num_layers)
    return sum(
        bound is not None
        and _binds(
            eviction,
            max(prompts[sample.id], longest_prompt_tokens(sample)),
            sample.max_new_tokens,
            bound,
        )
        for sample, bound in zip(samples, bounds, strict=True)
    )


def _binds(eviction: Eviction, prompt_tokens: int, answer_tokens: int, budget_tokens: int) -> bool:
    """Whether some layer may have to evict while it reads the prompt, or while it answers."""
    least = eviction.least_tokens(budget_tokens)
    num_fed = prompt_tokens + answer_tokens - 1  # the last new token is chosen but never fed
    return prompt_tokens > least or num_fed >= least + eviction.every


def _note(folder: CellFolder, num_samples: int) -> str:
    """Note the plan, or say why not. Raises UsageError for a place where no cell can be."""
    try:
        folder.note_plan(num_samples)
    except OSError as error:
        if error.errno in _NOT_NOTED:
            return str(error.strerror)
        raise UsageError(
            f"{folder.path} cannot be written ({error.strerror}); choose another results_dir"
        ) from error
    return ""


def _tokens_per_sec(results_dir: Path, cell: Cell) -> float | None:
    """Tokens per second over all slots in earlier rows like the cell's; None without any.

    Alike are model, policy, device and data type: bfloat16 takes half the time of float32 or less.
    """
    alike = {
        "policy": cell.method_label(),
        "device": cell.settings.device,
        "dtype": cell.dtype_name,
    }
    num_tokens, busy_sec = 0, 0.0
    for path in find_cells(results_dir):
        if path.parent.name != cell.model.name:
            continue
        try:
            rows = read_lines(path)
        except UsageError:  # a damaged cell is no reason not to plan another
            continue
        for row in rows:
            if row.get("status") != "ok" or any(row.get(k) != v for k, v in alike.items()):
                continue
            if any(row.get(name) is None for name in _TIMED):  # edited, or of another version
                continue
            num_tokens += row["prefill_tokens_computed"] + row["generated_tokens"]
            rate = row.get("decode_tokens_per_sec")
            decode_sec = (row["generated_tokens"] - 1) / rate if rate else 0.0
            busy_sec += (row["ttft_sec"] + decode_sec) / row["slots"]
    return num_tokens / busy_sec if busy_sec else None
