"""The `mid` shape: a glm4v checkpoint of 572 M random parameters, between the demo and the 9B model.

It generates plain words only and no end token, so every answer has the requested length and every token shows in the
stream.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from models.shapes.checkpoint import FOLDER as SHAPES
from models.shapes.checkpoint import image_token_ids

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "glm-bench"
VOCABULARY = 32_768  # rows of the embedding; the demo's tokenizer uses the first of them
IMAGE_SIDE = 336  # pixels: 576 patches, 144 tokens
WORD = re.compile("Ġ[a-z]{2,}")

# A follow-up must begin with exactly the tokens of the turn before it: answers begin with a space, which servers and
# GLM's own template strip.
TEMPLATE = """[gMASK]<sop>
{%- for message in messages -%}
    {{- '<|' + message.role + '|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- set text = message.content if message.content is string else message.content | map(attribute='text') | join -%}
        {{ ' ' + text.strip() }}
    {%- elif message.content is string -%}{{ message.content }}
    {%- else -%}
        {%- for part in message.content -%}
            {{- part.text if part.type == 'text' else '<|begin_of_image|><|image|><|end_of_image|>' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>' -}}
"""


def words(folder: Path = SHAPES) -> dict[str, int]:
    """The plain words of the tokenizer that are one token together with the space before them, and their ids."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return {token.removeprefix("Ġ"): ident for token, ident in sorted(vocabulary.items()) if WORD.fullmatch(token)}


def build_mid(cache: Path = DEFAULT_CACHE) -> Path:
    """The checkpoint's folder; the first call builds it (about a minute, 1.2 GB)."""
    folder = cache / "mid"
    if folder.is_dir():
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")  # the weights do not depend on it
        return folder
    unfinished = cache / f"mid.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Glm4vConfig, Glm4vForConditionalGeneration

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHAPES / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    processing = json.loads((SHAPES / "preprocessor_config.json").read_text(encoding="utf-8"))
    processing["size"] = {"shortest_edge": 2 * 112**2, "longest_edge": 2 * IMAGE_SIDE**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = Glm4vConfig(
        **image_token_ids(tokenizer),
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 20,
            "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 8192,
            "pad_token_id": end, "eos_token_id": [end],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "hidden_size": 768, "depth": 12, "num_heads": 12, "out_hidden_size": 1024, "intermediate_size": 4096,
            "image_size": IMAGE_SIDE,
        },
    )  # fmt: skip
    torch.manual_seed(46)
    model = Glm4vForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():  # all other tokens get the logit 0, less than the best word has
        head = model.lm_head.weight
        word_ids = torch.tensor(list(words().values()))
        rows = head[word_ids].clone()
        head.zero_()
        head[word_ids] = rows
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
