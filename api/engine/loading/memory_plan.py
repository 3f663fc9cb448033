"""The memory plan: what a model takes on a card, part by part, before anything is allocated, and the recipe that follows.

`choose` takes the best recipe that fits a card, or says that none does and what would help. `report` is the table that
`python -m api.server --plan` prints. All is arithmetic over the shapes of the weights: nothing here touches a device.
`after_loading` is the other half: how large the KV cache can be once the true peak has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from api.engine.config import EngineConfig
from api.engine.cuda.graphs import sizes_for
from api.engine.cuda.runner import MAX_CHUNKS
from api.engine.loaded_model import LoadError
from api.engine.loading.card import GIB, MIB, Card, pretended_card
from api.engine.loading.placement import CHUNK_TOKENS
from api.engine.model.linear import Role
from api.engine.model.recipe import NEEDS_CAPABILITY, Recipe, Weights, make_recipe
from api.engine.model.rotary import head_dim_of
from api.engine.model.vision_encoder import TABLE_PATCHES

# The picture processor of GLM-4.6V-Flash makes at most this many image tokens of a picture (4.8 megapixels).
LARGEST_PICTURE_TOKENS = 6144
SMALL_PICTURE_TOKENS = 1280  # 1 megapixel
PICTURE_STEP = 256
PICTURE_S = 4.0  # the largest picture should be read within this time, where the speed of the card is known

# The KV cache of a recipe that fits holds at least this many tokens; with COMFORTABLE_TOKENS it need not be traded.
LEAST_TOKENS, COMFORTABLE_TOKENS = 16_384, 65_536

# What is not a tensor of ours.
LIBRARIES_BYTES = 450 * MIB  # CUDA itself and the workspaces of cuBLAS
GRAPH_BYTES = 8 * MIB  # of a recorded step
RESERVE_SHARE, RESERVE_LEAST, RESERVE_MOST = 0.02, 160 * MIB, GIB  # for fragments and what another process may take

# Working memory of a step in bytes for each row, patch or logit, of the operations on CUDA; a test compares them with what
# a pretended card counts.
SAMPLING_BYTES = 48  # for each logit that is sampled: sorted scores, probabilities and their sums
ATTENTION_PARTS = 32  # into which the keys of a row are cut while decoding
DEQUANTIZED_BYTES = 128 * MIB  # of a matrix in full precision, while many rows are multiplied
SAMPLER_TABLE_BYTES = 3  # for each slot and token of the vocabulary: whether it was seen, and how often

# Shares of peak figures that are reached, for estimates.
BANDWIDTH_SHARE, PRODUCT_SHARE = 0.7, 0.5
RECIPES: tuple[Weights, ...] = ("bf16", "fp8", "nf4")
FORMAT_NAMES = {"plain": "16 bits", "fp8": "float8", "int8": "8 bits", "nf4": "NF4, 4.5 bits"}
KV_STEP = 256  # tokens
MOST_CONTEXTS = 4  # for each request at once: a tiny model does not take a whole card
EMBEDDINGS = "model.language_model.embed_tokens.weight"
PLAIN = ("model.visual.embeddings.position_embedding.weight",)  # no product is computed with it


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs to know of a model: its weights by name, and a few numbers of its config."""

    weights: Mapping[str, tuple[int, ...]]
    layers: int
    hidden: int
    inner: int  # width of the text model's MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int  # longest context that the model allows
    vision_layers: int
    vision_hidden: int
    vision_inner: int
    vision_head_dim: int
    patch_values: int  # numbers of a patch
    patches_per_token: int
    picture_tokens: int  # of the largest picture that the model's processor makes

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers, 16 bits each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


def shape_of(config: Any, weights: Mapping[str, tuple[int, ...]], picture_tokens: int | None = None) -> ModelShape:
    """`config` of transformers, `weights`: names and shapes."""
    text, vision = config.get_text_config(), config.vision_config
    block = weights.get("model.visual.blocks.0.mlp.gate_proj.weight", (vision.out_hidden_size,))
    return ModelShape(
        weights=weights,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim_of(text),
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_inner=block[0],
        vision_head_dim=vision.hidden_size // vision.num_heads,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        patches_per_token=vision.spatial_merge_size**2,
        picture_tokens=picture_tokens or LARGEST_PICTURE_TOKENS,
    )


@dataclass(frozen=True)
class Defaults:
    """What a card of some size serves unless it is set: the last of these whose size it reaches."""

    from_gib: float
    slots: int
    context_tokens: int
    thinking_tokens: int  # longest answer with its thought
    encoder_cache_bytes: int
    chunk_tokens: int = CHUNK_TOKENS  # longest part of a prompt in one step


ANSWER_TOKENS = 2048  # longest answer without a thought
BY_MEMORY = (
    Defaults(0.0, 8, 8_192, 4_096, 64 * MIB),
    Defaults(11.0, 16, 20_480, 8_192, 128 * MIB),
    Defaults(15.0, 16, 32_768, 8_192, 256 * MIB),
    Defaults(22.0, 32, 32_768, 8_192, 256 * MIB, 1024),
    Defaults(38.0, 64, 32_768, 16_384, 1024 * MIB, 1024),
)


def defaults_for(card: Card) -> Defaults:
    return [each for each in BY_MEMORY if card.total_bytes / GIB >= each.from_gib][-1]


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int
    detail: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    card: Card
    recipe: Recipe
    parts: tuple[Part, ...]  # all but the KV cache
    kv_token_bytes: int
    kv_tokens: int
    most_kv_tokens: int
    picture_tokens: int
    picture_reason: str
    slots: int
    context_tokens: int
    encoder_cache_bytes: int
    chunk_tokens: int
    loading_bytes: int  # most that is held while the weights are loaded
    read_bytes: int  # weights that a step reads
    sampling_bytes: int
    # Estimates by the kind of question; empty where the speed of the card is unknown.
    first_token_s: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def used_bytes(self) -> int:
        """Of all but the KV cache."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= min(LEAST_TOKENS, self.most_kv_tokens) and self.loading_bytes <= self.card.usable_bytes

    @property
    def missing_bytes(self) -> int:
        needed = max(self.used_bytes + LEAST_TOKENS * self.kv_token_bytes, self.loading_bytes)
        return max(needed - self.card.usable_bytes, 0)

    @property
    def token_ms(self) -> float | None:
        """The shortest time of a token: reading all weights once. None: the speed of the card is unknown."""
        return None if self.card.speed is None else self.read_bytes / self.card.speed.gb_per_s / 1e6

    def bytes_of(self, name: str) -> int:
        return sum(part.bytes for part in self.parts if part.name == name)

    def facts(self) -> dict[str, Any]:
        """For GET /info."""
        return {
            "card": self.card.describe(),
            "weights": self.recipe.name,
            "usable_bytes": self.card.usable_bytes,
            "parts": {part.name: part.bytes for part in self.parts}
            | {"KV cache": self.kv_tokens * self.kv_token_bytes},
            "kv_tokens": self.kv_tokens,
            "largest_picture_tokens": self.picture_tokens,
            "shortest_token_ms": None if self.token_ms is None else round(self.token_ms, 2),
        }


def plan(
    shape: ModelShape,
    card: Card,
    recipe: Recipe,
    config: EngineConfig,
    picture_tokens: int,
    picture_reason: str = "",
    itemsize: int = 2,
) -> MemoryPlan:
    """The plan of one recipe with pictures of up to `picture_tokens`. `itemsize` of the plain number format."""
    defaults = defaults_for(card)
    slots, chunk = config.slots or defaults.slots, config.prefill_chunk_tokens or defaults.chunk_tokens
    context = min(config.context_tokens or defaults.context_tokens, shape.positions)
    cache = defaults.encoder_cache_bytes if config.encoder_cache_bytes is None else config.encoder_cache_bytes
    weights = weight_parts(shape, recipe, itemsize)
    patches = picture_tokens * shape.patches_per_token
    vision = vision_bytes(shape, recipe, patches, itemsize)
    sampling = (slots + 1) * shape.vocabulary * SAMPLING_BYTES
    text = max(text_bytes(shape, recipe, chunk, itemsize), sampling)
    waiting = patches * waiting_bytes(shape, itemsize)  # kept while others are served between two slices of a picture
    sizes = sizes_for(slots + 1, chunk)
    graphs = len(sizes) * GRAPH_BYTES + text_bytes(shape, recipe, chunk + slots + 1, itemsize)
    buffers = step_buffer_bytes(shape, slots, chunk, itemsize)
    tables = (slots + 1) * shape.vocabulary * SAMPLER_TABLE_BYTES + 2 * itemsize * context * shape.head_dim
    tables += TABLE_PATCHES * table_bytes(shape, itemsize)
    parts = (
        *weights,
        Part("vision workspace", vision, f"a picture of {picture_tokens} tokens"),
        Part(
            "text workspace",
            max(text + waiting - vision, 0),
            f"chunks of {chunk} tokens, sampling; beyond that of vision",
        ),
        Part("staging", patches * shape.patch_values * itemsize, "pixels on their way to the card"),
        Part("step buffers", buffers, "logits, inputs, parts of attention"),
        Part("tables", tables, "of the sampler and of positions"),
        Part("encoder cache", cache, "features of recent pictures"),
        Part("CUDA graphs", graphs, f"{len(sizes)} sizes of a step, and what one works with"),
        Part("libraries", LIBRARIES_BYTES, "CUDA itself, cuBLAS"),
        Part("reserve", _reserve(card), "fragments, other processes"),
    )
    budget = card.usable_bytes - sum(part.bytes for part in parts)
    if config.kv_cache_bytes:
        budget = min(budget, config.kv_cache_bytes)
    token_bytes = shape.kv_token_bytes * itemsize // 2
    resident = sum(part.bytes for part in weights)
    # While a matrix is quantised it is there twice; the largest is that of the head.
    twice = 0 if recipe.text == "plain" else 2 * shape.vocabulary * shape.hidden
    most_kv_tokens = MOST_CONTEXTS * (slots + 1) * context
    kv_tokens = min(max(budget // token_bytes // KV_STEP * KV_STEP, 0), most_kv_tokens)
    return MemoryPlan(
        card=card,
        recipe=recipe,
        parts=parts,
        kv_token_bytes=token_bytes,
        kv_tokens=kv_tokens,
        most_kv_tokens=most_kv_tokens,
        picture_tokens=picture_tokens,
        picture_reason=picture_reason,
        slots=slots,
        context_tokens=min(context, kv_tokens),
        encoder_cache_bytes=cache,
        chunk_tokens=chunk,
        loading_bytes=resident + twice + LIBRARIES_BYTES,
        read_bytes=sum(part.bytes for part in weights if part.name in ("text layers", "head")),
        sampling_bytes=sampling,
        first_token_s=first_token_seconds(shape, card, picture_tokens),
    )


def _reserve(card: Card) -> int:
    return min(max(int(card.usable_bytes * RESERVE_SHARE), RESERVE_LEAST), RESERVE_MOST)


def choose(shape: ModelShape, card: Card, config: EngineConfig, itemsize: int = 2) -> MemoryPlan:
    """The plan of the recipe that `config.weights` names, or of the best that fits. Raises LoadError, which says what
    would help."""
    plans = candidates(shape, card, config, itemsize)
    if config.weights != "auto":
        needed = NEEDS_CAPABILITY[config.weights]
        if card.capability < needed:
            raise LoadError(
                f"GLM_WEIGHTS={config.weights} needs a card of compute capability {needed[0]}.{needed[1]} or later. "
                f"Given: {card.describe()}. Set GLM_WEIGHTS=auto."
            )
        named = plans[config.weights]
        chosen = next((each for each in named if each.fits), None)
        if chosen is None:
            raise LoadError(f"GLM_WEIGHTS={config.weights} does not fit. {_what_helps(named[-1], plans)}")
        return replace(chosen, reason=f"set by GLM_WEIGHTS; leaves {_room(chosen)}")
    fitting = {name: next((each for each in each_of if each.fits), None) for name, each_of in plans.items()}
    bf16, fp8, nf4 = (fitting.get(name) for name in RECIPES)
    if bf16 and bf16.kv_tokens >= min(COMFORTABLE_TOKENS, bf16.most_kv_tokens):
        return replace(bf16, reason=f"the checkpoint's own format leaves {_room(bf16)}")
    if fp8:
        why = f"bf16 leaves {_room(bf16)} only" if bf16 else "bf16 does not fit"
        return replace(fp8, reason=f"{why}; fp8 is nearly as exact and leaves {_room(fp8)}")
    if bf16:
        no_fp8 = "fp8 needs compute capability 8.9"
        return replace(bf16, reason=f"the checkpoint's own format fits, with {_room(bf16)}; {no_fp8}")
    if nf4:
        instead = "fp8 does not fit either" if card.has_fp8 else "fp8 needs compute capability 8.9"
        return replace(nf4, reason=f"bf16 does not fit, {instead}; nf4 leaves {_room(nf4)}")
    smallest = [each for each_of in plans.values() for each in each_of]
    if not smallest:
        raise LoadError(f"This card is too old: compute capability 7.5 or later is needed. Given: {card.describe()}.")
    raise LoadError(f"The model does not fit this card. {_what_helps(smallest[-1], plans)}")


CLASSES_GIB = (8, 12, 16, 24, 32, 48, 80, 141)  # in which cards are rented


def by_class(shape: ModelShape, config: EngineConfig) -> list[dict[str, Any]]:
    """What each class of card would serve of this model, for GET /info; a class that cannot hold it is left out."""
    found = []
    for size in CLASSES_GIB:
        try:
            chosen = choose(shape, pretended_card(size * GIB), config)
        except LoadError:
            continue
        found.append({
            "gib": size, "weights": chosen.recipe.name, "kv_tokens": chosen.kv_tokens, "slots": chosen.slots,
            "context_tokens": chosen.context_tokens, "largest_picture_tokens": chosen.picture_tokens,
        })  # fmt: skip
    return found


def candidates(
    shape: ModelShape, card: Card, config: EngineConfig, itemsize: int = 2
) -> dict[Weights, list[MemoryPlan]]:
    """The plans of each recipe that the card can compute, the best first."""
    asked = config.max_picture_tokens
    full, why = (
        picture_limit(shape, card) if not asked else (min(asked, shape.picture_tokens), "set by GLM_MAX_PICTURE_TOKENS")
    )
    small = min(full, SMALL_PICTURE_TOKENS)
    found: dict[Weights, list[MemoryPlan]] = {}
    for name in RECIPES:
        if card.capability < NEEDS_CAPABILITY[name]:
            continue
        found[name] = [plan(shape, card, make_recipe(name, capability=card.capability), config, full, why, itemsize)]
        if name == "bf16":  # as exact, and its embeddings need not be on the card
            on_host = replace(make_recipe(name), host_embeddings=True)
            found[name].append(plan(shape, card, on_host, config, full, why, itemsize))
        if name == "nf4":
            recipe = make_recipe(name, small=True, capability=card.capability)
            tokens, reason = (full, why) if asked else (small, "larger ones do not fit this card")
            found[name].append(plan(shape, card, recipe, config, tokens, reason, itemsize))
    return found


def picture_limit(shape: ModelShape, card: Card) -> tuple[int, str]:
    """Image tokens of the largest picture, and why: that of the model, or what the card reads within PICTURE_S."""
    full = shape.picture_tokens
    if card.speed is None:
        return full, "the limit of the model"
    tokens = full
    while tokens > SMALL_PICTURE_TOKENS and _seconds(_picture_operations(shape, tokens), card) > PICTURE_S:
        tokens -= PICTURE_STEP
    tokens = max(tokens, min(full, SMALL_PICTURE_TOKENS))
    if tokens == full:
        return full, "the limit of the model"
    return tokens, f"a larger one of up to {full} would take this card longer than about {PICTURE_S:.0f} s"


# The parts.


def weight_parts(shape: ModelShape, recipe: Recipe, itemsize: int = 2) -> tuple[Part, ...]:
    sizes = dict.fromkeys(("text layers", "head", "embeddings", "vision encoder"), 0)
    for name, dimensions in shape.weights.items():
        if name == EMBEDDINGS:
            sizes["embeddings"] += 0 if recipe.host_embeddings else math.prod(dimensions) * itemsize
            continue
        part, role = _part_of(name)
        rows, columns = dimensions[0], math.prod(dimensions[1:])
        matrix = len(dimensions) > 1 and name not in PLAIN
        sizes[part] += recipe.bytes_of(rows, columns, role, itemsize) if matrix else math.prod(dimensions) * itemsize
    if "lm_head.weight" not in shape.weights:  # shares the embeddings, but is kept as a matrix of its own
        sizes["head"] = recipe.bytes_of(shape.vocabulary, shape.hidden, "head", itemsize)
    details = {
        "text layers": f"{shape.layers} layers, {FORMAT_NAMES[recipe.text]}",
        "head": FORMAT_NAMES[recipe.head],
        "embeddings": "in host memory" if recipe.host_embeddings else FORMAT_NAMES["plain"],
        "vision encoder": f"{shape.vision_layers} blocks, {FORMAT_NAMES[recipe.vision]}",
    }
    return tuple(Part(name, size, details[name]) for name, size in sizes.items())


def waiting_bytes(shape: ModelShape, itemsize: int = 2) -> int:
    """For each patch of a picture between two slices: its state, cos and sin in float32."""
    return shape.vision_hidden * itemsize + 2 * 4 * shape.vision_head_dim


def table_bytes(shape: ModelShape, itemsize: int = 2) -> int:
    """For each patch of the position tables that are kept: learned positions, cos and sin in float32."""
    return shape.vision_hidden * itemsize + 2 * 4 * shape.vision_head_dim


def vision_bytes(shape: ModelShape, recipe: Recipe, patches: int, itemsize: int = 2) -> int:
    """Most bytes that encoding a picture takes besides its pixels."""
    hidden, inner = shape.vision_hidden, shape.vision_inner
    attention = (1 + 3 + 3 + 2) * hidden  # normed, qkv, the same rotated, attended twice
    # The sum, normed, both halves of the MLP and their product; inputs of a product in float8 are there twice.
    mlp = 2 * hidden + 3 * inner + (inner // 2 if recipe.vision == "fp8" else 0)
    scratch = DEQUANTIZED_BYTES if recipe.vision == "int8" else 0
    return patches * (waiting_bytes(shape, itemsize) + max(attention, mlp) * itemsize) + scratch


def text_bytes(shape: ModelShape, recipe: Recipe, rows: int, itemsize: int = 2) -> int:
    """Most bytes that the text model takes for a chunk of `rows` tokens, without logits."""
    heads = shape.heads + 2 * shape.kv_heads
    rows_of_all = 4 * shape.hidden + 2 * heads * shape.head_dim + 3 * shape.inner
    if recipe.text == "fp8":
        rows_of_all += shape.inner // 2
    scratch = DEQUANTIZED_BYTES if recipe.text == "nf4" else 0
    return rows * rows_of_all * itemsize + scratch


def step_buffer_bytes(shape: ModelShape, slots: int, chunk: int, itemsize: int = 2) -> int:
    """Buffers that recorded steps read and write: logits, inputs, and partial results of attention."""
    rows = slots + 1
    logits = 4 * (rows + MAX_CHUNKS) * shape.vocabulary
    attention = 4 * rows * shape.heads * ATTENTION_PARTS * (shape.head_dim + 1)
    return logits + attention + (chunk + rows) * shape.hidden * itemsize


# Speed.


def first_token_seconds(shape: ModelShape, card: Card, picture_tokens: int) -> dict[str, float]:
    """Seconds to the first token of a question with 60 tokens of text, and of some with a picture."""
    if card.speed is None:
        return {}
    pictures = {"text": 0, "a picture of 336 x 336": 144, "a picture of 1 megapixel": SMALL_PICTURE_TOKENS}
    if picture_tokens > SMALL_PICTURE_TOKENS:
        pictures[f"the largest picture ({picture_tokens} tokens)"] = picture_tokens
    return {
        name: _seconds(_text_operations(shape, 60) + _picture_operations(shape, tokens), card)
        for name, tokens in pictures.items()
    }


def _text_operations(shape: ModelShape, tokens: int) -> float:
    matrices = sum(math.prod(size) for name, size in shape.weights.items() if _part_of(name)[0] == "text layers")
    return 2.0 * matrices * tokens + 2.0 * shape.layers * shape.heads * shape.head_dim * tokens**2


def _picture_operations(shape: ModelShape, tokens: int) -> float:
    """Of the vision encoder, and of the text model for the tokens that it makes."""
    patches = tokens * shape.patches_per_token
    blocks = sum(math.prod(size) for name, size in shape.weights.items() if ".visual.blocks." in name)
    merger = sum(math.prod(size) for name, size in shape.weights.items() if ".visual.merger." in name)
    attention = 4.0 * shape.vision_layers * shape.vision_hidden * patches**2
    return 2.0 * blocks * patches + 2.0 * merger * tokens + attention + _text_operations(shape, tokens)


def _seconds(operations: float, card: Card) -> float:
    assert card.speed is not None
    return operations / (card.speed.tflops * 1e12 * PRODUCT_SHARE)


# After loading.


@dataclass(frozen=True)
class Measured:
    """What the card has said once the weights are loaded and the largest steps have been computed."""

    weights_bytes: int  # allocated, tables included
    workspace_bytes: int  # most beyond that in the largest steps
    free_bytes: int  # on the card, with the weights loaded and no KV cache


def kv_budget(plan: MemoryPlan, measured: Measured) -> int:
    """Bytes that the KV cache may take."""
    ahead = plan.bytes_of("encoder cache") + plan.bytes_of("CUDA graphs") + plan.bytes_of("reserve")
    return max(measured.free_bytes - ahead - max(measured.workspace_bytes, plan.sampling_bytes), 0)


def beside(plan: MemoryPlan, measured: Measured, kv_bytes: int) -> dict[str, tuple[int, int]]:
    """Planned and measured bytes of each quantity that can be measured."""
    weights = ("text layers", "head", "embeddings", "vision encoder", "tables", "step buffers")
    return {
        "weights": (sum(plan.bytes_of(name) for name in weights), measured.weights_bytes),
        "workspace": (
            sum(plan.bytes_of(f"{name} workspace") for name in ("vision", "text")) + plan.bytes_of("staging"),
            measured.workspace_bytes,
        ),
        "kv_cache": (plan.kv_tokens * plan.kv_token_bytes, kv_bytes),
    }


# Words.


def report(shape: ModelShape, card: Card, config: EngineConfig, itemsize: int = 2) -> tuple[str, bool]:
    """The plan as a table for people, and whether anything fits."""
    plans = candidates(shape, card, config, itemsize)
    lines = [f"Card: {card.describe()}"]
    try:
        chosen = choose(shape, card, config, itemsize)
    except LoadError as error:
        closest = min(
            (each for each_of in plans.values() for each in each_of), key=lambda each: each.missing_bytes, default=None
        )
        if closest is not None:
            lines += ["", f"The closest that would fit, {closest.recipe.name}:", *_table(closest)]
        return "\n".join([*lines, "", str(error)]), False
    lines += [f"Weights: {chosen.recipe.name} ({chosen.reason})", "", *_table(chosen), ""]
    lines += [
        f"Pictures of up to {chosen.picture_tokens} image tokens ({_megapixels(chosen)}): {chosen.picture_reason}.",
        f"{chosen.slots} requests at once, contexts of up to {min(chosen.context_tokens, chosen.kv_tokens)} tokens.",
        *_speed(chosen),
        "",
        "Instead:",
    ]
    for name in RECIPES:
        if name not in plans:
            needed = NEEDS_CAPABILITY[name]
            lines.append(f"  {name:5} needs compute capability {needed[0]}.{needed[1]}")
            continue
        best = next((each for each in plans[name] if each.fits), plans[name][-1])
        room = f"room for {_tokens(best.kv_tokens)}" if best.fits else f"{best.missing_bytes / GIB:.1f} GiB too large"
        speed = "" if best.token_ms is None else f", at least {best.token_ms:.1f} ms a token"
        lines.append(f"  {name:5} {room}{speed}{' (chosen)' if name == chosen.recipe.name else ''}")
    return "\n".join(lines), True


def _table(chosen: MemoryPlan) -> list[str]:
    lines = [f"  {part.name:18} {part.bytes / GIB:7.2f} GiB  {part.detail}".rstrip() for part in chosen.parts]
    kv = chosen.kv_tokens * chosen.kv_token_bytes
    lines.append(
        f"  {'KV cache':18} {kv / GIB:7.2f} GiB  {_tokens(chosen.kv_tokens)} of {chosen.kv_token_bytes // 1024} KiB"
    )
    lines.append(f"  {'all':18} {(chosen.used_bytes + kv) / GIB:7.2f} GiB  of {chosen.card.usable_bytes / GIB:.2f}")
    return lines


def _speed(chosen: MemoryPlan) -> list[str]:
    read = f"A step reads {chosen.read_bytes / GIB:.1f} GiB of weights"
    if chosen.token_ms is None:
        return [f"{read}; the bandwidth of this card is not known, so its speed is not either."]
    assert chosen.card.speed is not None
    likely = chosen.token_ms / BANDWIDTH_SHARE
    lines = [
        f"{read}: at {chosen.card.speed.gb_per_s:.0f} GB/s a token takes at least {chosen.token_ms:.1f} ms, "
        f"probably about {likely:.0f} ms ({BANDWIDTH_SHARE:.0%} of the bandwidth).",
        f"First token, at {PRODUCT_SHARE:.0%} of {chosen.card.speed.tflops:.0f} TFLOPS, and tokens that follow within 300 ms:",
    ]
    for name, seconds in chosen.first_token_s.items():
        lines.append(f"  {name:38} {seconds * 1000:7.0f} ms  {max(int((0.3 - seconds) * 1000 / likely), 0):4}")
    return lines


def _what_helps(closest: MemoryPlan, plans: Mapping[Weights, list[MemoryPlan]]) -> str:
    missing = math.ceil(closest.missing_bytes / GIB * 10) / 10
    taken = (closest.card.total_bytes - closest.card.usable_bytes) / GIB
    advice = [
        f"{closest.recipe.name} with {LEAST_TOKENS:,} tokens of KV cache needs {missing:.1f} GiB more than the "
        f"{closest.card.usable_bytes / GIB:.1f} GiB that are usable"
    ]
    fitting = [name for name, each_of in plans.items() if any(each.fits for each in each_of)]
    if fitting:
        advice.append(f"set GLM_WEIGHTS={fitting[0]} or auto")
    if closest.card.total_bytes * 0.03 + 0.2 * GIB < closest.card.total_bytes - closest.card.usable_bytes:
        advice.append(
            f"end what else uses the card ({taken:.1f} of {closest.card.total_bytes / GIB:.1f} GiB are taken)"
        )
    advice += [
        "take a card with more memory",
        "or set GLM_MODEL to a smaller model; GLM_MODEL=models/shapes is the bundled demo",
    ]
    return f"{closest.card.describe()}. {'; '.join(advice)}."


def _room(chosen: MemoryPlan) -> str:
    return f"{_tokens(chosen.kv_tokens)} of KV cache"


def _tokens(count: int) -> str:
    return f"{count:,} tokens"


def _megapixels(chosen: MemoryPlan) -> str:
    return f"{chosen.picture_tokens * 784 / 1e6:.1f} megapixels"


def _part_of(name: str) -> tuple[str, Role]:
    if ".visual." in name:
        return "vision encoder", "vision"
    return ("head", "head") if name == "lm_head.weight" else ("text layers", "text")
