"""A model without weights for tests: same interface, instant, deterministic, and obedient to orders.

What it answers is given by a function of the prompt text. A prompt that contains HANG, FAIL or CRASH
makes its step hang until released, raise, or lose the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from api.engine.model import Model, SamplingDefaults
from api.engine.request import Picture, Sequence
from api.engine.tokens import MARKUP, Vocabulary

SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|image|>",
)  # fmt: skip
END = ("<|endoftext|>", "<|user|>", "<|observation|>")


class DeviceLost(RuntimeError):
    """Stands for a CUDA error."""


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and GLM's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*MARKUP, "<|video|>")])
    return tokenizer


class FakeTemplate:
    """GLM's prompt format, as far as tests look at it."""

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str:
        out = "[gMASK]<sop>"
        if tools:
            out += f"<|system|>\n# Tools {tools}"
        for message in messages:
            role = "observation" if message["role"] == "tool" else message["role"]
            out += f"<|{role}|>\n{self._text(message.get('content'))}"
            for call in message.get("tool_calls") or []:
                out += f"\n<tool_call>{call['function']['name']}</tool_call>"
        return out + "<|assistant|>" + ("" if enable_thinking else "\n<think></think>")

    @staticmethod
    def _text(content: Any) -> str:
        if not isinstance(content, list):
            return content or ""
        picture = "<|begin_of_image|><|image|><|end_of_image|>"
        return "".join(part["text"] if part["type"] == "text" else picture for part in content)


class FakePictures:
    """One token for each 28 x 28 pixels; the patches are the mean colour, so a test can see the picture."""

    def count_tokens(self, width: int, height: int) -> int:
        rows, columns = max(height // 28, 1), max(width // 28, 1)
        return rows * columns

    def process(self, image: Image.Image) -> Picture:
        rows, columns = max(image.height // 28, 1), max(image.width // 28, 1)
        colour = image.resize((1, 1)).getpixel((0, 0))
        return Picture(patches=colour, grid=(1, rows * 2, columns * 2), tokens=rows * columns)


class FakeRunner:
    def __init__(self, vocabulary: Vocabulary, answer: Callable[[str, list[Any]], str], token_s: float = 0.0) -> None:
        self._vocabulary = vocabulary
        self._answer = answer
        self._token_s = token_s
        self.release = threading.Event()  # lets a hanging step go on
        self.hanging = threading.Event()  # set when a step has begun to hang
        self.decoded: list[str] = []  # request ids in the order of their steps

    def encode_picture(self, sequence: Sequence) -> None:
        pass

    def prefill(self, sequence: Sequence) -> int:
        prompt = b"".join(map(self._vocabulary.token_bytes, sequence.request.prompt_ids)).decode(errors="replace")
        self._obey(prompt)
        text = self._answer(prompt, [picture.patches for picture in sequence.request.pictures])
        sequence.state = iter([*self._vocabulary.encode(text), self._vocabulary.special["<|user|>"]])
        return self._next(sequence)

    def decode(self, sequences: Items[Sequence]) -> list[int]:
        return [self._next(sequence) for sequence in sequences]

    def is_fatal(self, error: BaseException) -> bool:
        return isinstance(error, DeviceLost)

    def _next(self, sequence: Sequence) -> int:
        time.sleep(self._token_s)
        self.decoded.append(sequence.request.id)
        return next(sequence.state)

    def _obey(self, prompt: str) -> None:
        if "HANG" in prompt:
            self.hanging.set()
            self.release.wait()
        if "FAIL" in prompt:
            raise ValueError("told to fail")
        if "CRASH" in prompt:
            raise DeviceLost("told to lose the device")


def echo(prompt: str, pictures: list[Any]) -> str:
    """Answer with the last thing that was said; the byte tokenizer has no text for special tokens."""
    return f"I see {len(pictures)} pictures. " + prompt.rsplit("\n", 1)[-1].removesuffix("<think></think>")


def fake_model(
    answer: Callable[[str, list[Any]], str] = echo, token_s: float = 0.0, context_tokens: int = 4096
) -> Model:
    vocabulary = Vocabulary(byte_tokenizer())
    return Model(
        id="fake",
        runner=FakeRunner(vocabulary, answer, token_s),
        vocabulary=vocabulary,
        template=FakeTemplate(),
        pictures=FakePictures(),
        end_ids=frozenset(vocabulary.special[text] for text in END),
        context_tokens=context_tokens,
        defaults=SamplingDefaults(),
        facts={"class": "FakeModel", "device": "cpu", "dtype": "none", "parameters": 0, "demo": False, "knows": None},
    )
