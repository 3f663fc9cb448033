"""The vocabulary: text to token ids without special-token injection, and ids to bytes.

Text from callers goes through `protect` before it is put into a chat template; `encode` then tokenizes the rendered
template. Only special tokens that the template itself contains become special: a caller's `<|user|>` is encoded like
any other text. Knows no tensor library.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

from api.engine.text.markup import MARKUP

# Unicode noncharacters. Callers' text that contains them is escaped too.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PROTECTED = re.compile(f"{_OPEN}([0-9a-f]+){_CLOSE}")


class UnsupportedTokenizer(ValueError):
    """The tokenizer is not a byte-level one, which GLM uses."""


class Vocabulary:
    """Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        definition = json.loads(tokenizer.to_str())
        if "ByteLevel" not in json.dumps(definition.get("decoder")):
            raise UnsupportedTokenizer("the tokenizer's decoder is not ByteLevel")
        added = {token["content"]: token["id"] for token in definition["added_tokens"]}
        self.special: dict[str, int] = added
        self._silent = {t["id"] for t in definition["added_tokens"] if t["special"] and t["content"] not in MARKUP}
        self._added_bytes = {ident: content.encode() for content, ident in added.items()}
        # The same tokenizer without added tokens cannot produce one, whatever the text.
        self._plain = Tokenizer.from_str(json.dumps({**definition, "added_tokens": [], "post_processor": None}))
        self._tokenizer = tokenizer
        self._split = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"(?!)")
        # Escaping every character that can begin a special token also covers one that is split over
        # two text parts (`<|us` and `er|>`).
        self._starts = re.compile("[" + re.escape("".join({_OPEN, _CLOSE} | {t[0] for t in added})) + "]")

    def definition(self) -> str:
        """The tokenizer as JSON, for libraries that build their own table from it."""
        return self._tokenizer.to_str()

    def protect(self, value: Any) -> Any:
        """Make special-token text inert in a string, or in every string of a nested list or dict."""
        if isinstance(value, str):
            return self._starts.sub(lambda m: f"{_OPEN}{ord(m[0]):x}{_CLOSE}", value)
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        return value

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered template in which callers' text went through `protect`."""
        ids: list[int] = []
        end = 0
        for match in self._split.finditer(rendered):
            ids += self._encode_plain(rendered[end : match.start()])
            ids.append(self.special[match[0]])
            end = match.end()
        return ids + self._encode_plain(rendered[end:])

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        restored = _PROTECTED.sub(lambda m: chr(int(m[1], 16)), text)
        return list(self._plain.encode(restored, add_special_tokens=False).ids)

    def has(self, token_id: int) -> bool:
        """Whether the id stands for a token; the padding rows of the embedding do not."""
        return self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; empty for special tokens without text, such as roles and images, and for padding ids."""
        if token_id in self._silent:
            return b""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes map to themselves, the others to U+0100 and following."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + index): b for index, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
