"""python -m bench.pictures: what photos cost besides the model: a second turn about them, and the memory of those that wait.

    python -m bench.pictures turns [--beside FOLDER]    time to the first token of a second turn about eight photos
    python -m bench.pictures memory [--beside FOLDER]   resident memory while eight requests with a large image each are answered
    python -m bench.pictures image                      one photo from its pixels to its release, as bytes and as numbers

`--beside` names another checkout of this project, whose server is asked by turns with this one's.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from PIL import Image

from bench import servers
from bench.client import ask
from models.shapes.checkpoint import FOLDER as DEMO

PHOTOS, SIZE = 8, (4000, 3000)
WATCH_S = 0.005
LARGE_TOKENS = 1000  # of a large image
LARGEST_TOKENS = 6144  # of the largest that GLM-4.6V-Flash takes
PROCESSING = "preprocessor_config.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["turns", "memory", "image"])
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--size", default="x".join(map(str, SIZE)), help="of a photo, in pixels")
    given = parser.parse_args(arguments)
    width, height = map(int, given.size.split("x"))
    if given.what == "image":
        return one_image(given.model, width, height)
    measure = second_turn if given.what == "turns" else memory
    with ExitStack() as stack:
        if given.what == "memory":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            given.model = with_large_pictures(given.model, folder, LARGE_TOKENS)
        roots = {"this": servers.ROOT} | ({"beside": given.beside.resolve()} if given.beside else {})
        asked = {
            name: stack.enter_context(servers.this(given.model, given.dtype, "cpu", root, GLM_SLOTS="2"))
            for name, root in roots.items()
        }
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
        for number in range(given.rounds):
            photos = [photo(width, height, f"{number} {index}") for index in range(given.photos)]
            for name in asked if number % 2 else reversed(asked):
                rows[name].append(asyncio.run(measure(asked[name], photos)))
    report(rows, f"{given.photos} JPEGs of {given.size}, {given.rounds} rounds")
    return 0


def report(rows: dict[str, list[dict[str, float]]], title: str) -> None:
    names = list(rows)
    print(f"| {title} | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|", sep="\n")
    for key in rows[names[0]][0]:
        print(f"| {key} | " + " | ".join(f"{median(row[key] for row in rows[name]):.3g}" for name in names) + " |")
    if len(names) == 2:
        for key in rows[names[0]][0]:
            ratios = [old[key] / new[key] for new, old in zip(*rows.values(), strict=True) if new[key]]
            print(f"{key}: {names[1]} / {names[0]} = {median(ratios):.2f} (median of each round's ratio)")


async def second_turn(server: servers.Server, photos: list[str]) -> dict[str, float]:
    """Seconds to the first token of a turn about new photos, and of the next; and of the server's processors."""
    first: list[dict[str, Any]] = [{"role": "user", "content": [*map(_part, photos), {"type": "text", "text": "What is it?"}]}]
    async with server.address.client() as client:
        began_s = server.cpu_s()
        one = await ask(client, server.address, first, 4)
        _check(one.error)
        first_s = server.cpu_s()
        turns = [*first, {"role": "assistant", "content": one.text or "."}, {"role": "user", "content": "And how many?"}]
        two = await ask(client, server.address, turns, 4)
        _check(two.error)
    return {
        "first turn, s": one.ttft_s, "its processor time, s": first_s - began_s,
        "second turn, s": two.ttft_s, "of the processor, s": server.cpu_s() - first_s,
    }  # fmt: skip


async def memory(server: servers.Server, photos: list[str]) -> dict[str, float]:
    """MiB of resident memory above that before the requests, at most. Two are computed at once, the others wait."""
    before = server.resident_bytes() or 0
    levels: list[int] = []

    async def one(client: httpx.AsyncClient, photo: str) -> None:
        content = [_part(photo), {"type": "text", "text": "What is it?"}]
        _check((await ask(client, server.address, [{"role": "user", "content": content}], 4)).error)

    with _watched(server, levels):
        async with server.address.client() as client:
            await asyncio.gather(*(one(client, photo) for photo in photos))
    return {"at most, MiB": (max(levels) - before) / 2**20}


def one_image(model: Path, width: int, height: int) -> int:
    """Resident memory of this process above that before, and processor time."""
    from transformers import AutoImageProcessor

    from api.engine.image_processor import CheckpointImageProcessor

    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    side = processor.patch_size * processor.merge_size
    processor.size = type(processor.size)(
        shortest_edge=processor.size["shortest_edge"], longest_edge=LARGEST_TOKENS * side**2 * processor.temporal_patch_size
    )
    ours = CheckpointImageProcessor(processor)
    pixels = Image.frombytes("RGB", (width, height), random.Random(46).randbytes(width * height * 3))
    ours.process(pixels.resize((500, 400)))  # what is loaded at the first use
    print("| one image | MiB | processor time, s | tokens |", "| --- | --- | --- | --- |", sep="\n")
    held: list[Any] = []

    def row(name: str, work: Callable[[], Any]) -> None:
        began_s = time.thread_time()
        held[:] = [work()]
        took_s = time.thread_time() - began_s
        tokens = getattr(held[0], "tokens", "")
        print(f"| {name} | {(_resident_bytes() - before) / 2**20:.1f} | {took_s:.2f} | {tokens} |")

    before = _resident_bytes()
    row("bytes", lambda: ours.process(pixels))
    row("released", lambda: None)
    row("numbers of the checkpoint's processor", lambda: processor(images=[pixels], return_tensors="np"))
    return 0


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _check(error: str | None) -> None:
    if error and error != "no text":
        raise RuntimeError(error)


@contextmanager
def _watched(server: servers.Server, levels: list[int]) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            levels.append(server.resident_bytes() or 0)
            time.sleep(WATCH_S)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def with_large_pictures(model: Path, folder: Path, tokens: int) -> Path:
    """The model in `folder`, with pictures of up to so many tokens: the demo scales all to 42."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    processing = json.loads((model / PROCESSING).read_text(encoding="utf-8"))
    side = processing["patch_size"] * processing["merge_size"]
    processing["size"]["longest_edge"] = tokens * side**2 * processing["temporal_patch_size"]
    (folder / PROCESSING).unlink()
    (folder / PROCESSING).write_text(json.dumps(processing), encoding="utf-8")
    return folder


def photo(width: int, height: int, seed: str) -> str:
    """A data URL of a JPEG of about 3 MB for 12 megapixels, as a camera makes them."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (width // 8, height // 8), rng.randbytes(width // 8 * (height // 8) * 3))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


if __name__ == "__main__":
    sys.exit(main())
