"""The baseline: a FastAPI handler around `model.generate`, one request at a time.

Unmodified transformers with its own defaults (threads, attention, cache) and its own streamer, wrapped in as much of the
OpenAI protocol as the client of the benchmark needs.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Glm4vForConditionalGeneration, TextIteratorStreamer


class Answerer:
    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self._model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
        self._model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._one_at_a_time = threading.Lock()

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        with self._one_at_a_time:
            inputs = self._inputs(body["messages"]).to(self._model.device)
            streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            answer: list[torch.Tensor] = []

            def generate() -> None:
                answer.append(
                    self._model.generate(
                        **inputs, streamer=streamer, do_sample=False, max_new_tokens=body["max_tokens"]
                    )
                )

            thread = threading.Thread(target=generate)
            thread.start()
            for text in streamer:
                if text:
                    yield _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
            thread.join()
        prompt_tokens = inputs["input_ids"].shape[1]
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": answer[0].shape[1] - prompt_tokens}
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _inputs(self, messages: list[dict[str, Any]]) -> Any:
        images, rendered = [], []
        for message in messages:
            parts = message["content"]
            if isinstance(parts, list):
                urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
                images += [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
                parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            rendered.append({**message, "content": parts})
        prompt = self._tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        if not images:
            return self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        # The steps of Glm46VProcessor, which needs torchvision.
        features = self._image_processor(images=images, return_tensors="pt")
        for grid in features["image_grid_thw"]:
            tokens = int(grid.prod()) // self._image_processor.merge_size**2
            prompt = prompt.replace("<|image|>", "<|placeholder|>" * tokens, 1)
        inputs = self._tokenizer(
            prompt.replace("<|placeholder|>", "<|image|>"), add_special_tokens=False, return_tensors="pt"
        )
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._model.config.image_token_id).int()
        inputs.update(features)
        return inputs


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **data})}\n\n"


def create_app(answerer: Answerer) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(answerer.stream(body), media_type="text/event-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.naive")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    app = create_app(Answerer(given.model, given.dtype, given.device))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
