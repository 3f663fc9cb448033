"""Turns messages into the input of the model: chat template, token ids, processed images.

Text from the caller cannot forge special tokens (see `Vocabulary`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from hashlib import sha256
from math import prod
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from api.caller import Caller
from api.engine.loaded_model import Model
from api.engine.request import ImageInput, Receive
from api.engine.text.markup import END_THINK, THINK
from api.engine.text.tokenizer import Vocabulary
from api.errors import ServingError, invalid
from api.images.decode import check_bytes, check_pixels, data_url_bytes, decode, is_remote, open_image, read_data_url
from api.images.fetch import Fetcher
from api.images.known import KnownImage, KnownUploads
from api.parsing.boxes import image_references
from api.parsing.output import split_thinking
from api.protocol.completion import PromptFacts
from api.protocol.schemas import ChatRequest, ImagePart, Message, TextPart, TokenizeRequest, Tool
from api.protocol.text_completion import TextRequest
from settings import Settings

PREPROCESS_THREADS = 2  # for texts, which never wait for images
IMAGE_THREADS = 2
FETCH_THREADS = 8  # they wait for the network, not for the CPU
TEXT_OPENING = ("[gMASK]", "<sop>")  # before a text that no template renders
# What `verbosity` says to the model; `medium` says nothing.
VERBOSITY = {
    "low": "Answer as briefly as possible, without explanations.",
    "high": "Answer in detail, with explanations.",
}
SHORT_TOKEN = 8  # a text with fewer characters for each token of the context is not checked further


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    image_sizes: tuple[tuple[int, int], ...]  # width and height in pixels, upright
    starts_thinking: bool  # the template ends with an open `<think>`
    question_image: int | None = None  # the image that the last question refers to, if it is exactly one
    texts: tuple[tuple[int, ...], ...] = ()  # the ids of each prompt of a text completion; `ids` are those of the longest
    upload_bytes: int = 0  # of the images as they arrived

    @property
    def image_bytes(self) -> int:
        """Of the images as they arrived, and of the pixels of those that are decoded."""
        return self.upload_bytes + sum(getattr(image.patches, "nbytes", 0) for image in self.images)

    @property
    def image_tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    @property
    def facts(self) -> PromptFacts:
        tokens = sum(map(len, self.texts)) if self.texts else len(self.ids)
        return PromptFacts(self.image_tokens, self.image_sizes, self.question_image, tokens)


@dataclass(frozen=True)
class Upload:
    """An image of a request before it is decoded: either known, or with its header read."""

    param: str  # the field that it came in
    source: str | bytes  # data: URL, or what was fetched
    name: bytes
    image: Image.Image | None = None
    known: KnownImage | None = None


@dataclass(frozen=True)
class Draft:
    """A prompt whose images are measured but not yet decoded, so that its number of tokens is known."""

    ids: tuple[int, ...]  # one image token for each image
    uploads: tuple[Upload, ...]
    tokens: int
    starts_thinking: bool
    question_image: int | None
    maker: ImageMaker  # of its images
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def upload_bytes(self) -> int:
        return sum(len(upload.source) for upload in self.uploads)

    @property
    def image_bytes(self) -> int:
        """Of the images as they arrived, and of the pixels of those that are to be decoded."""
        opened = [upload.image.size for upload in self.uploads if upload.image is not None]
        return self.upload_bytes + sum(self.maker.model.image_processor.count_bytes(*size) for size in opened)


class PromptBuilder:
    """Builds prompts in worker threads; called in the event loop only.

    Fetching has its own threads, so that a slow remote server does not delay other requests, and so have images and health
    probes.
    """

    def __init__(self, settings: Settings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._known = KnownUploads()
        self._preprocess_pool = ThreadPoolExecutor(PREPROCESS_THREADS, thread_name_prefix="preprocess")
        self._image_pool = ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="image")
        self._probe_pool = ThreadPoolExecutor(1, thread_name_prefix="probe")
        self._fetch_pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")

    def pool(self, caller: Caller) -> ThreadPoolExecutor:
        """The threads in which to parse and preprocess the requests of `caller`, but for its images."""
        return self._probe_pool if caller.probe else self._preprocess_pool

    def image_pool(self, caller: Caller) -> ThreadPoolExecutor:
        return self._probe_pool if caller.probe else self._image_pool

    async def draft(self, chat: ChatRequest, model: Model, caller: Caller, salt: str) -> Draft:
        """Fetch remote images, render the template, count tokens. Images that were uploaded before under `salt` are known.

        Raises ServingError.
        """
        fetched = await self.fetch(chat)
        loop = asyncio.get_running_loop()
        maker = ImageMaker(model, self._settings, self._known, salt, self.image_pool(caller))
        return await loop.run_in_executor(self.pool(caller), draft, chat, fetched, model, self._settings, maker)

    async def finish(self, drafted: Draft, model: Model, caller: Caller) -> Prompt:
        """Decode and process the images that are not known. Raises ServingError.

        One image at a time, so that a request whose client has left ends after the one in progress, that those of other
        requests come in between, and that memory stays low.
        """
        loop, pool = asyncio.get_running_loop(), self.image_pool(caller)
        made = [await loop.run_in_executor(pool, drafted.maker.make, upload) for upload in drafted.uploads]
        return await loop.run_in_executor(self.pool(caller), finish, drafted, made, model)

    async def image_tokens(self, request: TokenizeRequest, model: Model, caller: Caller) -> list[int]:
        """The number of tokens of each image. No more than their headers are read. Raises ServingError."""
        fetched = await self.fetch(request)
        maker = ImageMaker(model, self._settings, self._known, caller.name)
        return await asyncio.get_running_loop().run_in_executor(
            self.pool(caller), image_tokens, request, fetched, model, self._settings, maker
        )

    def close(self) -> None:
        for pool in (self._preprocess_pool, self._image_pool, self._probe_pool, self._fetch_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, chat: ChatRequest | TokenizeRequest) -> dict[str, bytes]:
        """The remote images of a request by URL, each fetched once."""
        first: dict[str, str] = {}
        for param, url in image_urls(chat, self._settings):
            if is_remote(url):
                first.setdefault(url, param)
        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self._fetch_pool, self._fetcher.fetch, url, param) for url, param in first.items()]
        return dict(zip(first, await asyncio.gather(*work), strict=True))


def image_urls(chat: ChatRequest | TokenizeRequest, settings: Settings) -> list[tuple[str, str]]:
    """Field and URL of each image, in order. Raises the 400 error if there are too many."""
    urls = [
        (f"messages[{m}].content[{p}].image_url.url", part.image_url.url)
        for m, message in enumerate(chat.messages or [])
        if isinstance(message.content, list)
        for p, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if len(urls) > settings.max_images:
        raise invalid(f"`messages` must have <= {settings.max_images} pictures. Given: {len(urls)}", "messages")
    return urls


def draft(
    chat: ChatRequest, fetched: Mapping[str, bytes], model: Model, settings: Settings, maker: ImageMaker | None = None
) -> Draft:
    """`fetched` holds the remote images by URL. Decodes no image. Raises the 400 or 413 error."""
    maker = maker or ImageMaker(model, settings)
    if isinstance(chat, TextRequest):
        return _draft_texts(chat, model, maker)
    uploads = [maker.open(param, url, fetched) for param, url in image_urls(chat, settings)]
    expected = sum(_tokens(upload, model) for upload in uploads)
    if expected >= model.context_tokens:
        raise _too_long(expected, model, "The pictures alone take")
    ids = rendered_ids(
        chat.messages,
        chat.active_tools,
        chat.enable_thinking,
        model,
        instruction=VERBOSITY.get(chat.verbosity or ""),
        continues=bool(chat.continue_final_message),
    )
    assert ids.count(model.vocabulary.special[model.image_token]) == len(uploads), "one image token for each image"
    tokens = len(ids) - len(uploads) + expected
    if tokens >= model.context_tokens:
        raise _too_long(tokens, model, "The prompt has")
    return Draft(tuple(ids), tuple(uploads), tokens, _opens_thinking(ids, model), question_image(chat, len(uploads)), maker)


def question_image(chat: ChatRequest, images: int) -> int | None:
    """The image that the last question refers to, if it is exactly one of its `images`."""
    referenced = {image for _, image in image_references(_last_question(chat.messages), images)}
    return referenced.pop() if len(referenced) == 1 else None


def image_tokens(
    request: TokenizeRequest, fetched: Mapping[str, bytes], model: Model, settings: Settings, maker: ImageMaker
) -> list[int]:
    """The number of tokens of each image. Raises the 400 or 413 error."""
    uploads = (maker.open(param, url, fetched) for param, url in image_urls(request, settings))
    return [_tokens(upload, model) for upload in uploads]


def with_image_tokens(ids: Sequence[int], tokens: Sequence[int], model: Model) -> list[int]:
    """`ids` with the image token of each image repeated as often as the image has tokens."""
    image_id = model.vocabulary.special[model.image_token]
    remaining = iter(tokens)
    return [i for token in ids for i in ([token] if token != image_id else [token] * next(remaining))]


def _tokens(upload: Upload, model: Model) -> int:
    if upload.known is not None:
        return upload.known.tokens
    assert upload.image is not None
    return model.image_processor.count_tokens(*upload.image.size)


def _draft_texts(request: TextRequest, model: Model, maker: ImageMaker) -> Draft:
    """The prompts of a text completion as they are, without a chat template. Raises the 400 error."""
    texts = tuple(_text_ids(prompt, model) for prompt in request.prompts)
    longest = max(texts, key=len)
    if len(longest) >= model.context_tokens:
        raise _too_long(len(longest), model, "The prompt has", "prompt")
    return Draft(longest, (), len(longest), False, None, maker, texts)


def _text_ids(prompt: str | tuple[int, ...], model: Model) -> tuple[int, ...]:
    """A text after the tokens that every text of the model begins with, in which special tokens are plain text; or ids."""
    vocabulary = model.vocabulary
    if isinstance(prompt, str):
        check_characters(prompt, "prompt", model)
        opening = [vocabulary.special[name] for name in TEXT_OPENING if name in vocabulary.special]
        return (*opening, *vocabulary.encode(vocabulary.protect(prompt)))
    for token in prompt:
        if not 0 <= token < 2**31 or not vocabulary.has(token):
            raise invalid(f"`prompt`: the model has no token {token}.", "prompt")
        if token == vocabulary.special[model.image_token]:
            raise invalid(f"`prompt`: token {token} stands for an image, and there is none.", "prompt")
    return prompt


def _last_question(messages: list[Message]) -> str:
    content = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if isinstance(content, list):
        return "\n".join(part.text for part in content if isinstance(part, TextPart))
    return content or ""


def rendered_ids(
    messages: list[Message],
    tools: list[Tool],
    enable_thinking: bool,
    model: Model,
    instruction: str | None = None,
    continues: bool = False,
) -> list[int]:
    """Token ids of the conversation as the chat template renders it, one image token for each image.

    `instruction` becomes a system message before all others. `continues`: the prompt ends with the text of the last
    message, which is the assistant's, instead of the beginning of a new one.

    Raises the 400 error for text that cannot fit the context, or messages that the template refuses.
    """
    vocabulary = model.vocabulary
    template_messages = [_for_template(message) for message in messages]
    if instruction:
        template_messages.insert(0, {"role": "system", "content": instruction})
    template_tools = [tool.model_dump(exclude_none=True) for tool in tools]
    check_characters([_without_old_reasoning(template_messages), template_tools], "messages", model)
    protected, protected_tools = vocabulary.protect(template_messages), vocabulary.protect(template_tools) or None
    last = protected.pop() if continues else None
    try:
        rendered = model.template.render(protected, protected_tools, enable_thinking)
    except TemplateError as error:  # a template may refuse the order of roles
        raise invalid(f"`messages` do not fit the model's chat template: {error}", "messages") from None
    if last is not None:
        rendered += _begun_answer(last, enable_thinking)
    return vocabulary.encode(rendered)


def _begun_answer(message: dict[str, Any], enable_thinking: bool) -> str:
    """An answer that the model is to go on with, after the template's opening of its turn."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    thoughts = "" if not enable_thinking else f"\n{THINK}{message.get('reasoning_content', '')}{END_THINK}"
    return f"{thoughts}\n{text}"


def _opens_thinking(ids: list[int], model: Model) -> bool:
    """Whether the prompt ends with `<think>`, apart from white space."""
    for token in reversed(ids):
        if token == model.vocabulary.special.get(THINK):
            return True
        if model.vocabulary.token_bytes(token).strip() or token in model.vocabulary.special.values():
            return False
    return False


@dataclass(frozen=True)
class ImageMaker:
    """Makes the images of one request for the engine, and their patches again when it needs them again."""

    model: Model
    settings: Settings
    known: KnownUploads = field(default_factory=KnownUploads)
    salt: str = ""
    pool: ThreadPoolExecutor | None = None  # for making patches again; None: they are kept

    def open(self, param: str, url: str, fetched: Mapping[str, bytes]) -> Upload:
        """Nothing but the header is read, and not even that if the image is known. Raises the 400 or 413 error."""
        source = fetched[url] if is_remote(url) else url
        name = self.known.name(source, self.salt, self.model.image_processor.settings_key)
        known = self.known.get(name)
        if known is not None:
            check_bytes(known.file_bytes, param, self.settings)
            check_pixels(prod(known.size), param, self.settings)
            return Upload(param, source, name, known=known)
        return Upload(param, source, name, open_image(self._file(source, param), param, self.settings))

    def make(self, upload: Upload) -> tuple[ImageInput, tuple[int, int]]:
        """The image and its size in pixels, upright. One that is known is not decoded. Raises the 400 error."""
        read = partial(self._read, upload) if self.pool else None
        known = upload.known or (self.known.get(upload.name) if read else None)
        if known is not None:
            return ImageInput(None, known.grid, known.tokens, known.key, read), known.size
        assert upload.image is not None
        image, size = _decoded(upload.image, upload.param, self.model)
        image.read = read
        self.known.add(upload.name, KnownImage(image.key, image.grid, image.tokens, size, _file_bytes(upload.source)))
        return image, size

    def _file(self, source: str | bytes, param: str) -> bytes:
        return read_data_url(source, param, self.settings) if isinstance(source, str) else source

    def _read(self, upload: Upload, receive: Receive) -> None:
        """Called in the engine thread. Raises RuntimeError once the server ends."""

        def read() -> None:
            try:
                opened = open_image(self._file(upload.source, upload.param), upload.param, self.settings)
                result: Any = _decoded(opened, upload.param, self.model)[0].patches
            except Exception as error:  # too little memory: it was decoded before
                result = error
            receive(result)

        assert self.pool is not None
        self.pool.submit(read)


def _file_bytes(source: str | bytes) -> int:
    return len(source) if isinstance(source, bytes) else data_url_bytes(source)


def finish(draft: Draft, made: Sequence[tuple[ImageInput, tuple[int, int]]], model: Model) -> Prompt:
    """Repeat the image token for each token of its image. `made`: the images with their sizes."""
    images, sizes = [image for image, _ in made], [size for _, size in made]
    expanded = with_image_tokens(draft.ids, [image.tokens for image in images], model)
    # Rotated upright, an image may have another number of tokens than expected.
    if len(expanded) >= model.context_tokens:
        raise _too_long(len(expanded), model, "The prompt has")
    return Prompt(
        tuple(expanded), tuple(images), tuple(sizes), draft.starts_thinking, draft.question_image, draft.texts,
        draft.upload_bytes,
    )  # fmt: skip


def _decoded(image: Image.Image, param: str, model: Model) -> tuple[ImageInput, tuple[int, int]]:
    """The processed image and its size in pixels, upright. `image` is closed: others hold it longer than its pixels
    are needed."""
    upright = decode(image, param)
    image.close()
    return _with_key(model.image_processor.process(upright), upright), upright.size


def _with_key(processed: ImageInput, image: Image.Image) -> ImageInput:
    """`processed` with the hash of its content as its key, unless the image processor has set one."""
    if processed.key:
        return processed
    digest = sha256(f"{image.mode} {image.size} {processed.grid} ".encode())
    digest.update(image.tobytes())
    return replace(processed, key=digest.digest())


def _for_template(message: Message) -> dict[str, Any]:
    """A message with the keys that GLM's chat template reads."""
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content: Any = message.content if message.content is not None else ""
    if isinstance(content, list):
        content = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ]
    if message.role == "assistant":
        reasoning = message.reasoning_content or message.reasoning
        if isinstance(content, str) and not reasoning:
            reasoning, content = split_thinking(content)
        if reasoning:
            out["reasoning_content"] = reasoning
    out["content"] = content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": c.function.name, "arguments": json.loads(c.function.arguments)},
            }
            for c in message.tool_calls
        ]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def check_characters(value: Any, param: str, model: Model) -> None:
    """Raise the 400 error for text that would not fit the context even in the longest tokens.

    Tokenizing it would take minutes.
    """
    count = _characters(value)
    if count <= SHORT_TOKEN * model.context_tokens:
        return
    limit = longest_token(model.vocabulary) * model.context_tokens
    if count > limit:
        message = (
            f"`{param}` has {count} characters; <= {limit} can fit {model.context_tokens} tokens, the context length."
        )
        raise invalid(message, param, "context_length_exceeded")


def _without_old_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A template may omit the reasoning before the last question, so that it need not fit the context."""
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    return [{k: v for k, v in m.items() if n >= last or k != "reasoning_content"} for n, m in enumerate(messages)]


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, items))


@lru_cache(maxsize=1)
def longest_token(vocabulary: Vocabulary) -> int:
    """Bytes of the longest token, which bound the characters that one token can hold."""
    return max(map(len, json.loads(vocabulary.definition())["model"]["vocab"]))


def _too_long(tokens: int, model: Model, subject: str, param: str = "messages") -> ServingError:
    message = f"{subject} {tokens} tokens; it must be < {model.context_tokens}, the context length, to leave room."
    return invalid(message, param, "context_length_exceeded")
