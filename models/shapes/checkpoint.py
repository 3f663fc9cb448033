"""Writes the checkpoint's files other than its weights: tokenizer, configs, image processing.

The classes and special tokens are those of GLM-4.6V-Flash, only narrow and shallow, so that everything that loads the 9B
model loads this one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Glm4vConfig, PreTrainedTokenizerFast

from models.shapes import talk
from models.shapes.pictures import draw_scene
from models.shapes.questions import ask

FOLDER = Path(__file__).resolve().parent
END, USER, OBSERVATION = "<|endoftext|>", "<|user|>", "<|observation|>"
CONTROL_TOKENS = (
    END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", USER, "<|assistant|>", OBSERVATION,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
    "<|begin_of_box|>", "<|end_of_box|>", "/nothink",
)  # fmt: skip
TEXT_TOKENS = (  # not special: parsers need them when special tokens are skipped
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
CELL_PIXELS = 28  # side of one image token: 2x2 patches of 14 pixels
MAX_CELLS = 42  # images are scaled down to at most this many tokens
MIN_CELLS = 16
FRAMES = 2  # a still image counts as two frames in the processor's area limits


def train_tokenizer(seed: int = 1, samples: int = 30_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the project's own questions; digits, Chinese characters and runs of capitals stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\p{Han}|(?<=\p{Lu})\p{Lu}|\p{Lu}(?=\p{Lu})"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=list(CONTROL_TOKENS + TEXT_TOKENS),
    )
    tokenizer.train_from_iterator(_corpus(random.Random(seed), samples), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TEXT_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    )


def _corpus(rng: random.Random, samples: int):
    """The text that the tokenizer learns; printed words are left out, so that they are spelled letter by letter."""
    yield json.dumps(talk.COUNT_TOOL)
    for _ in range(samples):
        lang = rng.choice(("en", "zh"))
        question = ask(rng, lang, draw_scene(rng, (56, 56), kind="shapes")[1])
        yield from (question.text, question.answer, question.think)
    for lang in ("en", "zh"):
        lines = [*talk.OFF_TOPIC[lang], *talk.GREETINGS[lang], *talk.TOOL_DESCRIPTIONS, *talk.SYSTEM_PROMPTS]
        answers = [talk.HELLO[lang], talk.ABILITY[lang], talk.NO_PICTURE[lang]]
        for _ in range(40):
            yield from lines + answers * 5


def image_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The token ids that a glm4v config needs."""
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token_id("<|image|>"),
        "video_token_id": token_id("<|video|>"),
        "image_start_token_id": token_id("<|begin_of_image|>"),
        "image_end_token_id": token_id("<|end_of_image|>"),
        "video_start_token_id": token_id("<|begin_of_video|>"),
        "video_end_token_id": token_id("<|end_of_video|>"),
    }


def config_for(tokenizer: PreTrainedTokenizerFast) -> Glm4vConfig:
    """About 4 M parameters: 6 vision and 5 text layers, 192 wide."""
    token_id = tokenizer.convert_tokens_to_ids
    hidden = 192
    return Glm4vConfig(
        **image_token_ids(tokenizer),
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.06,  # the usual 0.02 suits wide models
            "pad_token_id": token_id(END),
            "eos_token_id": [token_id(t) for t in (END, USER, OBSERVATION)],
            # A low base, so that the narrow heads can distinguish neighbouring rows and columns.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 4, 4]},
        },
        vision_config={
            "hidden_size": hidden,
            "depth": 6,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "intermediate_size": 384,
            "image_size": 168,
            "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
    )


def write_processing(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer, chat template, image processor and generation defaults next to the weights."""
    template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Glm46VImageProcessor",
            "processor_class": "Glm46VProcessor",
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "rescale_factor": 1 / 255,
            "resample": 3,
            "patch_size": 14, "temporal_patch_size": FRAMES, "merge_size": 2,
            "size": {"shortest_edge": FRAMES * MIN_CELLS * CELL_PIXELS**2, "longest_edge": FRAMES * MAX_CELLS * CELL_PIXELS**2},
        },
    )  # fmt: skip
    token_id = tokenizer.convert_tokens_to_ids
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [token_id(t) for t in (END, USER, OBSERVATION)],
            "pad_token_id": token_id(END),
            "max_new_tokens": 256,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
