"""Tokenizers whose tokens can be read off a text: one per character, or one per word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class CharTokenizer:
    """A token per character, its code point.

    chat_template: of one user turn, "USER {} ASSISTANT"; None: there is none. has_start: whether a
    special token, 0, stands at the front.
    """

    chat_template: str | None = None
    has_start: bool = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * (self.has_start and add_special_tokens) + [ord(sign) for sign in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        start = "" if skip_special_tokens else "<s>"
        return "".join(chr(token_id) if token_id else start for token_id in token_ids)

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: object) -> str:
        return in_template(self.chat_template, conversation, kwargs)


@dataclass
class WordTokenizer:
    """A token per word with the whitespace before it, numbered as they come; template as above."""

    chat_template: str | None = None
    words: list[str] = field(default_factory=list)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = re.findall(r"\s*\S+|\s+$", text)
        numbers = {word: number for number, word in enumerate(self.words)}
        ids = [numbers.setdefault(word, len(numbers)) for word in found]
        self.words = list(numbers)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[token_id] for token_id in token_ids)

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: object) -> str:
        return in_template(self.chat_template, conversation, kwargs)


def in_template(
    template: str | None, conversation: list[dict[str, str]], options: dict[str, object]
) -> str:
    """The turns, for an answer that follows. A later user turn follows the answer before it."""
    assert options == {"tokenize": False, "add_generation_prompt": True}
    assert template is not None
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user"][
        -len(conversation) :
    ]
    return "".join(
        template.format(turn["content"]) if turn["role"] == "user" else turn["content"]
        for turn in conversation
    )
