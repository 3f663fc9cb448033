"""Which implementation computes what on this very machine: the compiled kernels, or torch with oneDNN.

Decided from the times of both (speed.py). A result that is not that of torch is not used, however quick, and the default is
kept unless the other one is clearly quicker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from api.engine.kernels.build import has_fast_products
from api.engine.model.rotary import head_dim_of

Key = tuple[int, int, bool]  # out_features, in_features, gated

ROWS = (1, 4, 8, 16, 64, 256)
PICTURE_ROWS = (256,)  # the vision encoder has no small products
ALL_ROWS = 2**40
MARGIN = 1.10  # times as fast as the default, to take its place
AGREEMENT = 0.75  # of the rounds must agree that it is faster
TOLERANCE = 0.02  # relative error between the two: in bfloat16 both round
KINDS = ("decode", "prefill", "picture")  # of attention


@dataclass(frozen=True)
class Product:
    key: Key
    count: int  # matrices of this shape
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        features, inputs, gated = self.key
        return f"product {features} x {inputs}{' gated' if gated else ''}"

    @property
    def bytes(self) -> int:
        return 2 * self.count * self.key[0] * self.key[1]


@dataclass(frozen=True)
class ModelShape:
    """What the trial depends on, of a model."""

    products: tuple[Product, ...]
    heads: int
    kv_heads: int
    head_dim: int
    picture_heads: int
    picture_head_dim: int


@dataclass
class Times:
    """Shortest times of one operation in milliseconds, for each number of rows: what disturbs a machine makes longer ones.
    `faster` is the median of torch's time over that of the kernel in the same round, `agreed` the share of rounds on the side
    of that median."""

    rows: list[int]
    compiled: list[float]
    torch: list[float]
    faster: list[float]
    agreed: list[float]
    error: float  # relative, between the two
    steady: list[bool]  # whether a row's result was the same among any rows: the kernel's, torch's

    def quicker(self, at: int, default: str) -> str:
        """`compiled` or `torch`."""
        if self.error > TOLERANCE:
            return "torch"
        other = "compiled" if default == "torch" else "torch"
        gains = (self.faster[at], self.torch[at] / self.compiled[at])
        gain = min(gains) if other == "compiled" else 1 / max(gains)
        return other if gain > MARGIN and self.agreed[at] >= AGREEMENT else default

    def text(self) -> str:
        pairs = zip(self.rows, self.compiled, self.torch, strict=True)
        return ", ".join(f"{rows} rows {ours:.3g}/{theirs:.3g}" for rows, ours, theirs in pairs)


@dataclass(frozen=True)
class Choice:
    """`limits`: rows up to which the panels multiply a matrix, and oneDNN above; matrices that were not tried have
    `default_limit`. `by_torch` are the kinds of attention that torch computes."""

    default_limit: int
    limits: dict[Key, int] = field(default_factory=dict)
    by_torch: frozenset[str] = frozenset()
    findings: dict[str, str] = field(default_factory=dict)  # for `GET /info`

    def limit(self, key: Key) -> int:
        return self.limits.get(key, self.default_limit)

    @property
    def signature(self) -> str:
        """What distinguishes the computed numbers from those of another choice, or nothing for the default."""
        changed = sorted(f"{key}{limit}" for key, limit in self.limits.items() if limit != self.default_limit)
        parts = " ".join([*changed, *sorted(self.by_torch)])
        return hashlib.blake2b(parts.encode(), digest_size=4).hexdigest() if parts else ""


def default_choice(reason: str | None = None) -> Choice:
    """Without a trial, for a `reason`: with AMX, which only oneDNN uses, products are left to oneDNN."""
    limit = ALL_ROWS if has_fast_products() else 0
    findings = {} if reason is None else {"products": f"{_words(limit)}; {reason}", "attention": f"compiled; {reason}"}
    return Choice(limit, findings=findings)


def shape_of(config: Any) -> ModelShape:
    """Of a config of transformers. Its products are those of the layers; those that occur once keep the default."""
    text, vision = config.get_text_config(), config.vision_config
    dim, layers, hidden = head_dim_of(text), text.num_hidden_layers, text.hidden_size
    heads, kv_heads, inner = text.num_attention_heads, text.num_key_value_heads, text.intermediate_size
    width, wide = vision.hidden_size, vision.out_hidden_size
    keys: dict[Key, tuple[int, tuple[int, ...]]] = {
        ((heads + 2 * kv_heads) * dim, hidden, False): (layers, ROWS),
        (hidden, heads * dim, False): (layers, ROWS),
        (2 * inner, hidden, True): (layers, ROWS),
        (hidden, inner, False): (layers, ROWS),
        (text.vocab_size, hidden, False): (1, ROWS),
    }
    for key in ((3 * width, width, False), (width, width, False), (2 * wide, width, True), (width, wide, False)):
        keys.setdefault(key, (vision.depth, PICTURE_ROWS))
    products = tuple(Product(key, *rest) for key, rest in keys.items())
    return ModelShape(products, heads, kv_heads, dim, vision.num_heads, width // vision.num_heads)


def decide(shape: ModelShape, times: dict[str, Times], free_bytes: int, steady: bool) -> Choice:
    """`steady`: one implementation for each product, whatever the number of rows. `free_bytes` of memory limit what is kept
    twice."""
    default_limit = default_choice().default_limit
    default = "compiled" if default_limit else "torch"
    products = [product for product in shape.products if product.name in times]
    limits = {product.key: _limit(times[product.name], default) for product in products}
    twice = sum(product.bytes for product in products if 0 < limits[product.key] < ALL_ROWS)
    note = ""
    if twice and 1.25 * (sum(product.bytes for product in shape.products) + twice) > free_bytes:
        steady, note = True, f"; no memory for {twice >> 20} MiB of weights in two forms"
    if steady:
        limits = {product.key: _single(times[product.name], default) for product in products}
    by_torch = frozenset(kind for kind in KINDS if times[f"attention {kind}"].quicker(0, "compiled") == "torch")
    if steady and times["attention decode"].error <= TOLERANCE:
        by_torch -= {"decode"}  # torch pads the rows of a group to the longest
    findings = {}
    for product in products:
        findings[product.name] = f"{_words(limits[product.key])}; {_figures(times[product.name])}{note}"
    for kind in KINDS:
        name = f"attention {kind}"
        findings[name] = f"{'torch' if kind in by_torch else 'compiled'}; {_figures(times[name])}"
    findings["a text at any load"] = _promise(products, times, limits, by_torch)
    return Choice(default_limit, limits, by_torch, findings)


def _limit(times: Times, default: str) -> int:
    """One limit: the largest number of rows for which the kernel is kept, with oneDNN for all above."""
    winners = [times.quicker(at, default) for at in range(len(times.rows))]
    if winners[-1] == "compiled":
        return ALL_ROWS
    return max((rows for rows, winner in zip(times.rows, winners, strict=True) if winner == "compiled"), default=0)


def _single(times: Times, default: str) -> int:
    """The quicker of the two over all rows, the default unless the other is clearly quicker."""
    gain = sum(times.torch) / sum(times.compiled)
    if times.error > TOLERANCE or (gain < 1 / MARGIN and times.steady[1]):
        return 0
    return ALL_ROWS if gain > MARGIN or default == "compiled" else 0


def _words(limit: int) -> str:
    if limit == ALL_ROWS:
        return "compiled"
    return f"compiled up to {limit} rows, oneDNN above" if limit else "oneDNN"


def _figures(times: Times) -> str:
    wrong = f"; the results differ by {times.error:.2g}, so torch's are used" if times.error > TOLERANCE else ""
    single = f"{times.compiled[0]:.3g}/{times.torch[0]:.3g}" if times.rows == [0] else times.text()
    return f"ms compiled/torch: {single}{wrong}"


def _promise(
    products: Iterable[Product], times: dict[str, Times], limits: dict[Key, int], by_torch: frozenset[str]
) -> str:
    if "decode" in by_torch:
        return "may differ at near ties of two tokens: torch's attention pads the rows of a group to the longest"
    divided = [p.name for p in products if 0 < limits[p.key] < ALL_ROWS]
    if divided:
        return f"may differ at near ties of two tokens: rows decide who computes {', '.join(divided)}"
    unsteady = [p.name for p in products if not times[p.name].steady[0 if limits[p.key] else 1]]
    if unsteady:
        return f"may differ at near ties of two tokens: by the number of rows a sum of {', '.join(unsteady)} differs"
    return "the same: no row's result depends on other rows"
