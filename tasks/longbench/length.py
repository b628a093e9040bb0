"""How long a LongBench prompt may be, and how a longer one is cut: officially, by its middle."""

from kvarena.tasks.base import Tokenizer

# Room for template and answer that the official lengths leave at the least, with a context of 4096.
LEAST_ROOM_TOKENS = 596


def longest_prompt(context_tokens: int) -> int:
    """Tokens of a prompt, chat template apart, that suit a model of so many tokens of context.

    Official: 3500, 7500, 15500 and 31500 for contexts of 4096, 8192, 16384 and 32768
    (``LongBench/config/model2maxlen.json``), so 1000 for each 1024 less 500: 127500 for 131072. A
    shorter context leaves as much room for answer and template as the shortest of those. Raises
    ValueError for a context without any more than that.
    """
    longest = min(1000 * context_tokens // 1024 - 500, context_tokens - LEAST_ROOM_TOKENS)
    if longest < 2:
        raise ValueError(
            f"max_length=auto: a context of {context_tokens} tokens is too short for LongBench, "
            f"whose templates and answers take {LEAST_ROOM_TOKENS}; use another model, or give "
            "MAX_LENGTH (task.max_length)"
        )
    return longest


def cut_middle(
    tokenizer: Tokenizer, prompt: str, context_end: int, max_length: int | None
) -> tuple[str, int, int]:
    """The prompt without its middle, where its context ends, and its tokens before the cut.

    A prompt of more than ``max_length`` tokens, special ones included, keeps the first and the last
    half of that many, decoded apart and joined as text. context_end: index of a character.
    max_length: None: nothing is cut.
    """
    token_ids = tokenizer.encode(prompt)
    if max_length is None or len(token_ids) <= max_length:
        return prompt, context_end, len(token_ids)
    half = int(max_length / 2)
    head = tokenizer.decode(token_ids[:half], skip_special_tokens=True)
    tail = tokenizer.decode(token_ids[-half:], skip_special_tokens=True)
    num_after = len(prompt) - context_end
    # The end of the context is in the tail, or the cut took it, or the head has all of the context.
    end = len(head + tail) - num_after if num_after <= len(tail) else min(context_end, len(head))
    return head + tail, end, len(token_ids)
