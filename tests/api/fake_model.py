"""A model without weights for tests: the same interface, instant and deterministic, with failures on demand.

A function of the prompt text gives the answer. A prompt that contains HANG, FAIL or CRASH makes its step hang until
released, raise, or lose the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Literal

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from api.engine.kv_cache import Copy
from api.engine.loaded_model import Capacity, Model, SampledToken, SamplingDefaults
from api.engine.request import ImageInput
from api.engine.scheduler import Batch, EncodeTask
from api.engine.sequence import Sequence
from api.engine.text.markup import MARKUP
from api.engine.text.tokenizer import Vocabulary

SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|image|>",
)  # fmt: skip
END = ("<|endoftext|>", "<|user|>", "<|observation|>")
FAIL_COLOUR = (6, 6, 6)  # an image of this colour cannot be encoded


class DeviceLost(RuntimeError):
    """Stands for a CUDA error."""


class OutOfMemory(RuntimeError):
    """Stands for torch.OutOfMemoryError."""


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and GLM's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*MARKUP, "<|video|>")])
    return tokenizer


class FakeTemplate:
    """The parts of GLM's prompt format that tests look at."""

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
        image = "<|begin_of_image|><|image|><|end_of_image|>"
        return "".join(part["text"] if part["type"] == "text" else image for part in content)


class FakeImageProcessor:
    """One token for each 28 x 28 pixels; the patches are the mean colour, by which tests recognize the image."""

    def count_tokens(self, width: int, height: int) -> int:
        rows, columns = max(height // 28, 1), max(width // 28, 1)
        return rows * columns

    def process(self, image: Image.Image) -> ImageInput:
        rows, columns = max(image.height // 28, 1), max(image.width // 28, 1)
        colour = image.resize((1, 1)).getpixel((0, 0))
        grid = (1, rows * 2, columns * 2)
        return ImageInput(patches=colour, grid=grid, tokens=rows * columns, key=repr((colour, grid)).encode())


class FakeRunner:
    """Its KV cache stores the tokens' prefix cache keys, so that every read can be checked."""

    overlaps = False
    free_rows = 12

    def __init__(
        self,
        vocabulary: Vocabulary,
        answer: Callable[[str, list[Any]], str],
        token_s: float = 0.0,
        page_tokens: int = 16,
    ) -> None:
        self._vocabulary = vocabulary
        self._answer = answer
        self._token_s = token_s
        self._page_tokens = page_tokens
        self._kv: dict[tuple[int, int], Any] = {}  # page and index in it -> key of the token stored there
        self.release = threading.Event()  # lets a hanging step continue
        self.hanging = threading.Event()  # set when a step has begun to hang
        self.decoded: list[str] = []  # request ids in the order of their tokens
        self.encoded: list[Any] = []  # the patches of every encoded image
        self.batches: list[Batch] = []
        self.most_rows = 10**9  # more sequences in a batch do not fit into memory
        self.cleared: list[int] = []  # KV pages
        self.slices = 1  # steps that encoding an image takes

    def warm_up(self) -> None:
        pass

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def encode(self, task: EncodeTask, limit_s: float) -> Any | None:
        task.state = (task.state or 0) + 1
        if task.image.patches == FAIL_COLOUR:
            raise ValueError("told to fail on this image")
        if task.state < self.slices:
            return None
        self.encoded.append(task.image.patches)
        return task.image.patches

    def size_bytes(self, features: Any) -> int:
        return 100

    def copy_pages(self, copies: Items[Copy]) -> None:
        for copy in copies:
            for index in range(copy.tokens):
                self._kv[copy.target, index] = self._kv[copy.source, index]

    def clear_pages(self, pages: Items[int]) -> None:
        self.cleared += pages

    def begin(self, sequence: Sequence) -> None:
        if sequence.state is None:
            prompt = b"".join(map(self._vocabulary.token_bytes, sequence.request.prompt_ids)).decode(errors="replace")
            text = self._answer(prompt, [image.patches for image in sequence.request.images])
            sequence.state = (prompt, [*self._vocabulary.encode(text), self._vocabulary.special["<|user|>"]])

    def compute(self, batch: Batch) -> list[SampledToken]:
        if len(batch.sequences) > self.most_rows:
            raise OutOfMemory("told to have little memory")
        for chunk in batch.chunks:
            self._fail_on_demand(chunk.sequence.state[0])
        time.sleep(self._token_s)
        self.batches.append(batch)
        for sequence in batch.decode:
            self._compute(sequence, sequence.computed, sequence.computed + 1)
        for chunk in batch.chunks:
            self._compute(chunk.sequence, chunk.start, chunk.end)
        return [self._next(sequence) for sequence in batch.sampled]

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        if isinstance(error, DeviceLost):
            return "device"
        return "memory" if isinstance(error, OutOfMemory) else "request"

    def _compute(self, sequence: Sequence, start: int, end: int) -> None:
        assert sequence.block_table is not None
        slots = [(sequence.block_table.pages[i // self._page_tokens], i % self._page_tokens) for i in range(end)]
        stored = [self._kv.get(slot) for slot in slots[:start]]
        assert stored == sequence.keys[:start], f"{sequence.request.id} would read another request's keys and values"
        for number, span in enumerate(sequence.spans):
            if start < span.end and end > span.start:
                assert sequence.features[number] == span.image.patches, "these are another image's features"
        self._kv.update(zip(slots[start:], sequence.keys[start:end], strict=True))

    def _next(self, sequence: Sequence) -> SampledToken:
        self.decoded.append(sequence.request.id)
        tokens = sequence.state[1]
        # A forced token may have taken the place of the last one, which is then repeated.
        return SampledToken(tokens[min(len(sequence.output_ids), len(tokens) - 1)])

    def _fail_on_demand(self, prompt: str) -> None:
        if "HANG" in prompt:
            self.hanging.set()
            self.release.wait()
        if "FAIL" in prompt:
            raise ValueError("told to fail")
        if "CRASH" in prompt:
            raise DeviceLost("told to lose the device")


def echo(prompt: str, images: list[Any]) -> str:
    """Answer with the last line of the prompt; the byte tokenizer has no text for special tokens."""
    return f"I see {len(images)} pictures. " + prompt.rsplit("\n", 1)[-1].removesuffix("<think></think>")


def fake_model(
    answer: Callable[[str, list[Any]], str] = echo,
    token_s: float = 0.0,
    context_tokens: int = 4096,
    slots: int = 1,
    pages: int | None = None,
    page_tokens: int = 16,
    chunk_tokens: int = 4096,
) -> Model:
    """A model with room for `slots` requests; by default its KV cache holds as many full contexts."""
    vocabulary = Vocabulary(byte_tokenizer())
    pages = pages or (slots + 1) * -(-context_tokens // page_tokens)
    return Model(
        id="fake",
        runner=FakeRunner(vocabulary, answer, token_s, page_tokens),
        vocabulary=vocabulary,
        template=FakeTemplate(),
        image_processor=FakeImageProcessor(),
        end_ids=frozenset(vocabulary.special[text] for text in END),
        context_tokens=context_tokens,
        capacity=Capacity(slots, pages, page_tokens, chunk_tokens, encoder_cache_bytes=1000),
        defaults=SamplingDefaults(),
        facts={"class": "FakeModel", "device": "cpu", "dtype": "none", "parameters": 0, "demo": False, "knows": None},
    )
