"""Measures the demo model on freshly drawn pictures: `python -m models.shapes.eval --seed 7`.

Asks questions of every family in both languages about held-out pictures of many sizes, through the checkpoint's own
processor, chat template and `generate`. Prints accuracy by family, language and picture size; exit code 1 if a family is
below its floor, the accuracy of the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, Glm4vForConditionalGeneration

from models.shapes import talk
from models.shapes.checkpoint import FOLDER
from models.shapes.pictures import draw_scene
from models.shapes.questions import ask
from models.shapes.wording import Question

SIZES = ((112, 112), (168, 140), (160, 280), (320, 240), (480, 480), (640, 360), (800, 600), (300, 900), (1280, 720))
AIMS = {
    "color": 0.97, "shape": 0.97, "count": 0.97, "compare": 0.97, "moderate": 0.97, "two": 0.97, "second_turn": 0.97,
    "describe": 0.90, "read": 0.90, "where": 0.75, "json": 0.99,
    "greeting": 1.0, "ability": 1.0, "no_picture": 1.0, "tool": 1.0, "format": 1.0,
}  # fmt: skip
# What the shipped weights reach; anything less is a regression.
FLOORS = {
    "color": 0.97, "shape": 0.97, "count": 0.93, "compare": 0.93, "moderate": 0.97, "two": 0.85, "second_turn": 0.96,
    "describe": 0.95, "read": 0.95, "where": 0.75, "json": 0.99,
    "greeting": 1.0, "ability": 1.0, "no_picture": 1.0, "tool": 1.0, "format": 1.0,
}  # fmt: skip
BOX = re.compile(r"<\|begin_of_box\|>\[\[(\d+),(\d+),(\d+),(\d+)\]\]<\|end_of_box\|>")


@dataclass(frozen=True)
class Trial:
    """A conversation with a known last answer. `score` is the row of the table that it counts in."""

    score: str
    lang: str
    size: tuple[int, int] | None
    messages: list[dict]
    pictures: list[Image.Image]
    question: Question
    thinking: bool
    tools: list[dict] | None = None


def user(text: str, pictures: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def trials(rng: random.Random, each: int) -> Iterator[Trial]:
    """`each` trials of every family in each language, spread over the sizes."""
    for lang in ("en", "zh"):
        for number in range(each):
            size = SIZES[number % len(SIZES)]
            thinking = number % 4 == 3
            for family in ("color", "shape", "count", "compare", "describe", "read", "where", "moderate", "json"):
                picture, question = _picture_for(rng, lang, family, size)
                yield Trial(family, lang, size, [user(question.text, 1)], [picture], question, thinking)
            yield _second_turn(rng, lang, size, thinking)
            yield _two(rng, lang, size, thinking)
            if number % 4 == 0:
                yield from _talk(rng, lang, size, thinking)


def _picture_for(rng: random.Random, lang: str, family: str, size: tuple[int, int]) -> tuple[Image.Image, Question]:
    kind = {"read": rng.choice(("number", "word"))}.get(family, "shapes")
    while True:
        count = rng.randint(1, 4) if family in ("describe", "json") else None
        picture, scene = draw_scene(rng, size, kind=kind, count=count)
        try:
            return picture, ask(rng, lang, scene, family)
        except ValueError:
            continue  # the picture allows no such question


def _second_turn(rng: random.Random, lang: str, size: tuple[int, int], thinking: bool) -> Trial:
    family = rng.choice(("color", "shape", "count", "moderate"))
    picture, question = _picture_for(rng, lang, family, size)
    history = [user(question.text, 1), {"role": "assistant", "content": question.answer}]
    return Trial("second_turn", lang, size, [*history, user(question.text)], [picture], question, thinking)


def _two(rng: random.Random, lang: str, size: tuple[int, int], thinking: bool) -> Trial:
    drawn = [draw_scene(rng, size, kind="shapes") for _ in range(2)]
    question = talk.two_pictures(rng, lang, (drawn[0][1], drawn[1][1]))
    return Trial("two", lang, size, [user(question.text, 2)], [d[0] for d in drawn], question, thinking)


def _talk(rng: random.Random, lang: str, size: tuple[int, int], thinking: bool) -> Iterator[Trial]:
    for question in (talk.greeting(rng, lang), talk.off_topic(rng, lang)):
        yield Trial(question.family, lang, None, [user(question.text)], [], question, thinking)
    picture, asked = _picture_for(rng, lang, "count", size)
    yield Trial("no_picture", lang, None, [user(asked.text)], [], talk.without_picture(asked), thinking)
    scene = draw_scene(rng, size, kind="shapes")[1]
    question, _ = talk.tool_question(rng, lang, scene)
    yield Trial("tool", lang, size, [user(question.text, 1)], [picture], question, thinking, [talk.COUNT_TOOL])


class Model:
    """The checkpoint, loaded and prompted as any GLM-4.6V checkpoint."""

    def __init__(self, folder: Path, device: str):
        torch.set_num_threads(1)  # more do not speed up a model this small, and are slower on a busy machine
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def answer(self, trial: Trial) -> str:
        """The generated text, special tokens included."""
        return self.answers([trial])[0]

    @torch.inference_mode()
    def answers(self, trials: list[Trial]) -> list[str]:
        """The generated texts of one batch, special tokens included."""
        prompts, pixels, grids = [], [], []
        for trial in trials:
            prompt = self.tokenizer.apply_chat_template(
                trial.messages, tools=trial.tools, tokenize=False, add_generation_prompt=True, enable_thinking=trial.thinking
            )
            if trial.pictures:
                images = self.processor(trial.pictures, return_tensors="pt")
                counts = iter((images["image_grid_thw"].prod(-1) // 4).tolist())
                prompt = re.sub(r"<\|image\|>", lambda _, counts=counts: "<|image|>" * next(counts), prompt)
                pixels.append(images["pixel_values"])
                grids.append(images["image_grid_thw"])
            prompts.append(prompt)
        encoded = self.tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
        ids = encoded.input_ids
        inputs = {"input_ids": ids, "attention_mask": encoded.attention_mask}
        inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        outputs = self.model.generate(**inputs, max_new_tokens=160, do_sample=False)[:, ids.shape[1] :].tolist()
        return [self.tokenizer.decode(self._until_end(output), skip_special_tokens=False) for output in outputs]

    def _until_end(self, output: list[int]) -> list[int]:
        """Without the padding after the end token, which other rows of the batch have caused."""
        ends = self.model.generation_config.eos_token_id
        return output[: next((place for place, token in enumerate(output) if token in ends), len(output)) + 1]


def judge(trial: Trial, raw: str) -> tuple[float, bool]:
    """The score of the answer, from 0 to 1, and whether its format is right: a thought only with thinking, an end token."""
    end = "<|observation|>" if trial.score == "tool" else "<|user|>"
    body = raw.removesuffix(end)
    form = r"\n<think>[^<\n]+</think>\n(.+)" if trial.thinking else r"\n(?!<think>)(.+)"
    match = re.fullmatch(form, body, re.S)
    answer = (match.group(1) if match else body).strip()
    return _score(trial.question, answer), bool(match) and raw.endswith(end)


def _score(question: Question, answer: str) -> float:
    if question.family == "where":
        expected, actual = BOX.fullmatch(question.answer), BOX.fullmatch(answer)
        if expected and actual:
            return _iou([int(v) for v in expected.groups()], [int(v) for v in actual.groups()])
        return float(answer == question.answer)
    if question.family == "json":
        try:
            json.loads(answer)
            return 1.0
        except ValueError:
            return 0.0
    return float(answer == question.answer)


def _iou(one: list[int], two: list[int]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, width) * max(0, height)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)) - shared
    return shared / union if union > 0 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--each", type=int, default=100, help="trials of each family in each language")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--misses", type=int, default=0, help="print this many wrong answers of each family")
    options = parser.parse_args()
    model = Model(options.model, options.device)
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    misses: dict[str, list[str]] = defaultdict(list)
    for trial in tqdm(list(trials(random.Random(f"eval/{options.seed}"), options.each)), mininterval=5):
        raw = model.answer(trial)
        score, well_formed = judge(trial, raw)
        for key in ("all", trial.lang, f"{trial.size[0]}x{trial.size[1]}" if trial.size else "no picture"):
            scores[trial.score, key].append(score)
            scores["format", key].append(float(well_formed))
        if trial.score == "json":
            scores["json exact", "all"].append(float(trial.question.answer in raw))
        if score < 0.5 or not well_formed:
            misses[trial.score].append(f"{trial.question.text} | expected: {trial.question.answer} | given: {raw!r}")
    return report(scores, {k: v[: options.misses] for k, v in misses.items()})


def report(scores: dict[tuple[str, str], list[float]], misses: dict[str, list[str]]) -> int:
    """Print the table; returns the exit code, 1 if a family is below its floor."""
    families = [f for f in (*FLOORS, "json exact") if (f, "all") in scores]
    columns = ["all", "en", "zh", *(f"{w}x{h}" for w, h in SIZES)]
    print(f"{'family':12}{'n':>6}" + "".join(f"{c:>10}" for c in columns))
    failed = False
    for family in families:
        cells = []
        for column in columns:
            values = scores.get((family, column))
            cells.append(f"{100 * sum(values) / len(values):>9.1f}%" if values else f"{'-':>10}")
        values = scores[family, "all"]
        mean = sum(values) / len(values)
        remark = ""
        if mean < FLOORS.get(family, 0.0):
            failed, remark = True, f"  below its floor of {FLOORS[family]:.0%}"
        elif mean < AIMS.get(family, 0.0):
            remark = f"  aim: {AIMS[family]:.0%}"
        print(f"{family:12}{len(values):>6}" + "".join(cells) + remark)
    print("where: mean IoU; json: parses; json exact: every object right; the rest: the exact sentence.")
    for family, lines in misses.items():
        for line in lines:
            print(f"{family}: {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
