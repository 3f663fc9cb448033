"""A tiny glm4v checkpoint with random weights, made once per test run: real classes, no download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driving import WAIT_S, Driver

from api.engine.kernels import build

# Kernels are compiled for supported processors only; the fallback to torch is tested on all.
collect_ignore = [] if build.processor_supported() else ["kernels/test_kernels.py"]
SHAPES = Path(__file__).resolve().parents[3] / "models" / "shapes"
SENTENCES = ["Hello, what is in the picture?", "The red circle is left of the blue square.", "你好，图里有什么？"]


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(**options) -> Driver:
        drivers.append(Driver(**options).ready())
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.runner.release.set()
        driver.engine.stop(WAIT_S)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("tiny-glm4v")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text((SHAPES / "chat_template.jinja").read_text("utf-8"), "utf-8")
    token_id = tokenizer.convert_tokens_to_ids
    ends = [token_id("<|endoftext|>"), token_id("<|user|>"), token_id("<|observation|>")]
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    config = Glm4vConfig(
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "initializer_range": 0.3, "rope_parameters": rope, "pad_token_id": ends[0], "eos_token_id": ends,
        },
        vision_config={
            "hidden_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 48,
            "image_size": 112, "initializer_range": 0.3,
        },
    )  # fmt: skip
    model = Glm4vForConditionalGeneration(config)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = ends[0]
    model.save_pretrained(folder)
    processing = {
        "image_processor_type": "Glm46VImageProcessor",
        "size": {"shortest_edge": 2 * 112 * 112, "longest_edge": 2 * 28 * 28 * 64},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processing), "utf-8")
    return folder


def _tokenizer():
    from fake_model import SPECIAL
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from api.engine.text.markup import MARKUP

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, "/nothink")])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*MARKUP, "<|video|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
