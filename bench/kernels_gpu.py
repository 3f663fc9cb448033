"""Checks and times the CUDA kernels on the card at hand: `python -m bench.kernels_gpu [--dry] [--sweep] [SECTION ...]`.

Needs torch, Triton and `api/engine`, nothing else of the bundle. Every section prints its lines at once: `ok` or `WRONG`
with the relative error against float32, then microseconds in a CUDA graph, over more data than the caches hold.
`--dry` runs everything once in Triton's interpreter on the CPU, with tiny shapes. `--sweep` also tries other tiles.
The exit status is 1 if a result is wrong or a section fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from api.engine.cuda import attention, nf4, penalties, quantization, rotation, rows  # noqa: E402
from api.engine.cuda.operations import CudaOperations  # noqa: E402
from api.engine.model.operations import AttentionMetadata, TorchOperations, _rotate_exact  # noqa: E402
from api.engine.model.quantized_linear import bitsandbytes_ops  # noqa: E402
from api.engine.model.rotary import rotate  # noqa: E402
from api.engine.model.sampler import penalise_counts, penalise_seen  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float16 if DRY else torch.bfloat16  # the interpreter cannot multiply bfloat16
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, PAGE = (8, 2, 16, 96, 200, 16) if DRY else (32, 2, 128, 4096, 13696, 16)
VISION_HEADS = 2 if DRY else 12
TOTAL = HEADS + 2 * KV_HEADS
TOLERANCE = 0.01  # relative error by norm of bfloat16 results
MATRICES = (
    {"qkv": (48, 128), "gate_up": (80, 64)}
    if DRY
    else {
        "qkv": (4608, 4096),
        "out": (4096, 4096),
        "gate_up": (2 * 13696, 4096),
        "down": (4096, 13696),
        "head": (151552, 4096),
    }
)
LIBRARY_PAGE = 32 if DRY else 256  # tokens of a page, for torch's own attention
EDGES = [1, 15, 16, 17, 255, 256, 257]
COLD_BYTES = 200 * 2**20  # more than an L2 cache holds
failures: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    chosen = parser.parse_args()
    began = time.monotonic()
    say(f"torch {torch.__version__}, {DEVICE if DRY else torch.cuda.get_device_name()}, {DTYPE}")
    names = chosen.sections or [name for name in SECTIONS if chosen.sweep or name != "sweep"]
    with torch.inference_mode():
        for name in names:
            say(f"== {name} ({time.monotonic() - began:.1f} s)")
            torch.manual_seed(46)
            try:
                SECTIONS[name]()
            except Exception:
                failures.append(name)
                traceback.print_exc(limit=8, file=sys.stdout)
    say(f"{time.monotonic() - began:.1f} s, {'all right' if not failures else 'WRONG: ' + ', '.join(failures)}")
    return 1 if failures else 0


def say(text: str) -> None:
    print(text, flush=True)


def report(name: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    found, wanted = found.float(), wanted.float()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    right = error <= tolerance  # false for NaN
    if not right:
        failures.append(name)
    say(f"{'ok   ' if right else 'WRONG'} {error:8.1e} {name}")


def same(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    right = torch.equal(found, wanted)
    if not right:
        failures.append(name)
    say(f"{'ok   ' if right else 'WRONG'} {'bits':>8} {name}")


def timed(*calls: Callable[[], Any]) -> float:
    """Microseconds of one of the calls, which run one after another in a CUDA graph."""
    for call in calls:
        call()
    if DRY:
        return 0.0
    torch.cuda.synchronize()
    repeats = max(20 // len(calls), 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    best = float("inf")
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best * 1000 / repeats / len(calls)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE)


class Cache:
    """A KV cache that holds sequences of given lengths in random pages; everything else in it is NaN."""

    def __init__(self, lengths: list[int], width: int | None = None, page: int = PAGE) -> None:
        pages = [-(-length // page) for length in lengths]
        width = width or max(pages)
        order = torch.randperm(sum(pages) + 1, device=DEVICE)
        self.kv = poisoned((sum(pages) + 1) * page, 2 * KV_HEADS, HEAD_DIM)
        self.tables = torch.full((len(lengths), width), 2**30, dtype=torch.int32, device=DEVICE)
        self.rows = []
        at = 0
        for number, (length, count) in enumerate(zip(lengths, pages, strict=True)):
            self.tables[number, :count] = order[at : at + count]
            at += count
            tokens = torch.arange(length, device=DEVICE)
            self.rows.append(self.tables[number].long()[tokens // page] * page + tokens % page)
            self.kv[self.rows[-1]] = randn(length, 2 * KV_HEADS, HEAD_DIM)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def exact(self, number: int, q: torch.Tensor) -> torch.Tensor:
        """The last len(q) tokens of a sequence attend to it: [rows, heads, head_dim] in float32."""
        stored = self.kv[self.rows[number]].float().transpose(0, 1)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in stored.split(KV_HEADS))
        score = q.float().transpose(0, 1) @ k.transpose(1, 2) * HEAD_DIM**-0.5
        later = torch.ones(score.shape[1:], device=DEVICE, dtype=torch.bool).triu(score.shape[2] - len(q) + 1)
        return (score.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def decode() -> None:
    lengths = [*EDGES, 0, 70] if DRY else [*EDGES, 0, 70, 2047, 2048, 2049, 4100, 8192]
    cache, plan = Cache(lengths), plans()[0]
    q = randn(len(lengths), TOTAL, HEAD_DIM)[:, :HEADS]
    out = attention.paged_decode(
        q, cache.kv, cache.tables, cache.lengths, PAGE, poisoned(len(lengths), HEADS, HEAD_DIM), None, plan
    )
    exact = torch.cat([cache.exact(i, q[i : i + 1]) if n else torch.zeros_like(q[:1]) for i, n in enumerate(lengths)])
    report("paged_decode, ragged lengths", out, exact)
    for number, length in enumerate(lengths):
        if length and not DRY:
            report(f"  length {length}", out[number], exact[number])
    number = len(lengths) - 1
    wide = torch.full((1, cache.tables.shape[1] + 77), 2**30, dtype=torch.int32, device=DEVICE)
    wide[:, : cache.tables.shape[1]] = cache.tables[number]
    alone = attention.paged_decode(q[number:], cache.kv, wide, cache.lengths[number:], PAGE, plan=plan)
    same("a row alone, with a wider table", alone, out[number:])
    if DRY:
        return
    scratch = attention.decode_scratch(len(lengths), HEADS, HEAD_DIM, DEVICE, plan)
    graph, static = torch.cuda.CUDAGraph(), torch.empty_like(out)
    with torch.cuda.graph(graph):
        attention.paged_decode(q, cache.kv, cache.tables, cache.lengths, PAGE, static, scratch, plan)
    shorter = (cache.lengths - 1).clamp_min(0)
    eager = attention.paged_decode(q, cache.kv, cache.tables, shorter, PAGE, plan=plan)
    cache.lengths.copy_(shorter)
    graph.replay()
    same("a CUDA graph after the lengths have changed", static, eager)


def plans() -> tuple[attention.DecodePlan, attention.PrefillPlan]:
    if DRY:
        return attention.DecodePlan(splits=4, block=32), attention.PrefillPlan(queries=32, keys=16)
    return attention.plans_for(torch.cuda.get_device_capability())


def decode_calls(number: int, length: int, plan: attention.DecodePlan) -> list[Callable[[], Any]]:
    """Calls that read different parts of a cache larger than the processor's own."""
    copies = max(min(COLD_BYTES // (number * length * 2 * KV_HEADS * HEAD_DIM * 2), 20), 1) if not DRY else 1
    pages = -(-length // PAGE)
    kv = randn(1, 2 * KV_HEADS, HEAD_DIM).expand(copies * number * pages * PAGE, -1, -1).contiguous()
    tables = torch.randperm(copies * number * pages, device=DEVICE, dtype=torch.int32).view(copies, number, pages)
    lengths = torch.full((number,), length, dtype=torch.int32, device=DEVICE)
    q, out = randn(number, TOTAL, HEAD_DIM)[:, :HEADS], poisoned(number, HEADS, HEAD_DIM)
    scratch = attention.decode_scratch(number, HEADS, HEAD_DIM, DEVICE, plan)
    return [
        lambda table=table: attention.paged_decode(q, kv, table, lengths, PAGE, out, scratch, plan) for table in tables
    ]


def decode_speed() -> None:
    for number in (1, 2) if DRY else (1, 4, 16, 64):
        line = f"rows {number:3}:"
        for length in (17,) if DRY else (256, 1024, 4096, 8192):
            us = timed(*decode_calls(number, length, plans()[0]))
            rate = number * length * 2 * KV_HEADS * HEAD_DIM * 2 / max(us, 1e-9) / 1e3
            line += f"  {length:5}: {us:7.1f} us {rate:5.0f} GB/s"
        say(line)
    number, length = (2, 17) if DRY else (16, 1024)
    cache = Cache([length] * number)
    cache.kv.nan_to_num_()
    q = randn(number, TOTAL, HEAD_DIM)
    mask = torch.zeros(number, 1, 1, cache.tables.shape[1] * PAGE, dtype=DTYPE, device=DEVICE)
    metadata = AttentionMetadata(0, number, cache.tables.long(), mask, cache.lengths)
    plain = timed(lambda: TorchOperations(PAGE).attend_decode(q, cache.kv, metadata))
    say(f"torch by gathering, {number} rows of {length}: {plain:.1f} us")
    call = decode_calls(number, length, plans()[0])[0]
    call()
    began, repeats = time.perf_counter(), 1 if DRY else 200
    for _ in range(repeats):
        call()
    say(f"host time of a call outside of a graph (two kernels): {(time.perf_counter() - began) / repeats * 1e6:.1f} us")


def prefill() -> None:
    plan = plans()[1]
    for first, count in [(0, 1), (0, 17), (5, 3), (250, 23)] if DRY else [(0, 1), (0, 257), (5, 3), (2048, 512)]:
        cache = Cache([first + count])
        q = randn(count, TOTAL, HEAD_DIM)[:, :HEADS]
        out = attention.paged_prefill(
            q, cache.kv, cache.tables, count, PAGE, first, out=poisoned(count, HEADS, HEAD_DIM), plan=plan
        )
        report(f"paged_prefill of {count} after {first}", out, cache.exact(0, q))
    firsts, counts = ([3, 0, 30], [7, 17, 1]) if DRY else ([0, 300, 17, 2048, 1], [257, 64, 1, 100, 255])
    cache = Cache([a + b for a, b in zip(firsts, counts, strict=True)])
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    q = randn(sum(counts), TOTAL, HEAD_DIM)[:, :HEADS]
    out = attention.paged_prefill(
        q, cache.kv, cache.tables, max(counts) + 9, PAGE, starts=starts,
        firsts=torch.tensor(firsts, dtype=torch.int32, device=DEVICE), out=torch.full_like(q, float("nan")).contiguous(),
        plan=plan,
    )  # fmt: skip
    exact = torch.cat([cache.exact(i, part) for i, part in enumerate(q.split(counts))])
    report("paged_prefill of several sequences", out, exact)


def prefill_speed() -> None:
    for count, first in [(17, 5)] if DRY else [(64, 0), (512, 0), (512, 2048), (512, 8192), (2048, 0), (16, 4096)]:
        cache = Cache([first + count])
        q = randn(count, TOTAL, HEAD_DIM)
        metadata = AttentionMetadata(0, count, cache.tables[0], first=first)
        flops = 4 * HEADS * HEAD_DIM * count * (first + count / 2)
        out = poisoned(count, HEADS, HEAD_DIM)
        ours = timed(
            lambda q=q, c=cache, n=count, f=first, o=out: attention.paged_prefill(
                q[:, :HEADS], c.kv, c.tables, n, PAGE, f, out=o, plan=plans()[1]
            )
        )
        line = f"{count:5} after {first:5}: {ours:7.1f} us {flops / max(ours, 1e-9) / 1e6:5.0f} TFLOP/s"
        cache.kv.nan_to_num_()
        gathered = CudaOperations(PAGE)
        gathered.use_plain(["prefill"])
        try:
            theirs = timed(lambda q=q, c=cache, m=metadata, g=gathered: g.attend_prefill(q, c.kv, m))
            report(f"{line}; gathered, SDPA: {theirs:.1f} us", gathered.attend_prefill(q, cache.kv, metadata),
                   out.view(count, -1))  # fmt: skip
        except Exception as error:
            say(f"{line}; gathered, SDPA: {error}")


def library() -> None:
    """Torch's own attention over a block table, which wants pages of 256 tokens, beside the kernels of this project."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        say("this torch has none")
        return
    page, longest, splits = LIBRARY_PAGE, 40 if DRY else 8192, 16
    attend = _library_stand_in if DRY else varlen.varlen_attn
    decode, prefill = plans()

    def arguments(cache: Cache, counts: list[int], causal: bool) -> tuple[list[Any], dict[str, Any]]:
        k, v = cache.kv.view(-1, page, 2 * KV_HEADS, HEAD_DIM).split(KV_HEADS, dim=2)
        starts, ends = (torch.tensor([0, *each], device=DEVICE).cumsum(0).int() for each in (counts, cache.lengths.tolist()))
        options = {
            "window_size": (-1, 0 if causal else -1), "enable_gqa": True, "seqused_k": cache.lengths,
            "block_table": cache.tables, "num_splits": splits,
        }  # fmt: skip
        return [k, v, starts, ends, max(counts), longest], options

    lengths = [1, 15, 17, 40] if DRY else [1, 255, 256, 257, 1000, 4100, 8192]
    cache = Cache(lengths, page=page)
    cache.kv.nan_to_num_()  # the library multiplies what it masks
    cache.tables.masked_fill_(cache.tables == 2**30, 0)  # entries after the last page are of earlier sequences
    q = randn(len(lengths), HEADS, HEAD_DIM)
    given, options = arguments(cache, [1] * len(lengths), causal=False)
    exact = torch.cat([cache.exact(number, q[number : number + 1]) for number in range(len(lengths))])
    report("library, decoding", attend(q, *given, **options), exact)
    if not DRY:
        out = poisoned(len(lengths), HEADS, HEAD_DIM)
        varlen.varlen_attn_out(out, q, *given, **options)
        say(f"its result {'is' if torch.equal(out, attend(q, *given, **options)) else 'IS NOT'} in the tensor that it is given")
    for number, length in [(2, 40)] if DRY else [(1, 256), (1, 1024), (1, 8192), (16, 1024), (64, 1024)]:
        cache, q = Cache([length] * number, page=page), randn(number, HEADS, HEAD_DIM)
        cache.kv.nan_to_num_()
        out, scratch = poisoned(number, HEADS, HEAD_DIM), attention.decode_scratch(number, HEADS, HEAD_DIM, DEVICE, decode)
        given, options = arguments(cache, [1] * number, causal=False)
        theirs = timed(lambda q=q, g=given, o=options: attend(q, *g, **o))
        ours = timed(
            lambda q=q, c=cache, o=out, s=scratch: attention.paged_decode(q, c.kv, c.tables, c.lengths, page, o, s, decode)
        )
        say(f"decode, {number} rows of {length}: library {theirs:.1f} us, kernel {ours:.1f} us")
    for count, first in [(17, 5)] if DRY else [(64, 0), (512, 0), (512, 2048), (16, 4096)]:
        cache, q = Cache([first + count], page=page), randn(count, HEADS, HEAD_DIM)
        cache.kv.nan_to_num_()
        out = poisoned(count, HEADS, HEAD_DIM)
        given, options = arguments(cache, [count], causal=True)
        report(f"library, {count} after {first}", attend(q, *given, **options), cache.exact(0, q))
        theirs = timed(lambda q=q, g=given, o=options: attend(q, *g, **o))
        ours = timed(
            lambda q=q, c=cache, n=count, f=first, o=out: attention.paged_prefill(
                q, c.kv, c.tables, n, page, f, out=o, plan=prefill
            )
        )
        say(f"prefill, {count} after {first}: library {theirs:.1f} us, kernel {ours:.1f} us")


def _library_stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, *_: Any,
    window_size: tuple[int, int], seqused_k: torch.Tensor, block_table: torch.Tensor, **__: Any,
) -> torch.Tensor:  # fmt: skip
    """What the documentation of torch's attention says, for a run without a card."""
    outs = []
    for number, length in enumerate(seqused_k.tolist()):
        keys, values = (part[block_table[number].long()].flatten(0, 1)[:length].transpose(0, 1) for part in (k, v))
        part = q[starts[number] : starts[number + 1]].transpose(0, 1)
        later = torch.ones(part.shape[1], length, dtype=torch.bool).triu(length - part.shape[1] + 1)
        keys, values = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (keys, values))
        mask = torch.zeros(later.shape, dtype=q.dtype).masked_fill(later & (window_size[1] == 0), -torch.inf)
        outs.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask).transpose(0, 1))
    return torch.cat(outs)


def rotate_and_store() -> None:
    for number in (3,) if DRY else (1, 64, 512):
        qkv, kv = randn(number, TOTAL, HEAD_DIM), randn(2 * number + 9, 2 * KV_HEADS, HEAD_DIM)
        cos, sin = randn(1000, HEAD_DIM), randn(1000, HEAD_DIM)
        positions = torch.randint(0, 1000, (number,), device=DEVICE, dtype=torch.int32)
        slots = torch.randperm(len(kv), device=DEVICE)[:number]
        slots[number // 2 + 1 :: 7] = -1
        turned = rotate(qkv[:, :-KV_HEADS], cos[positions.long()][:, None], sin[positions.long()][:, None])
        wanted = torch.cat([turned, qkv[:, -KV_HEADS:]], 1)
        stored = kv.clone()
        stored[slots[slots >= 0]] = wanted[slots >= 0][:, HEADS:]
        for kind, args in (("table", (cos, sin)), ("rows", (cos[positions.long()], sin[positions.long()]))):
            ours, cache = qkv.clone(), kv.clone()
            rotation.rotate_store(ours, *args, cache, slots, positions if kind == "table" else None)
            report(f"rotate_store by {kind}, {number} rows", ours, wanted)
            report("  what it stored", cache, stored)
        us = timed(lambda q=qkv, k=kv, s=slots, p=positions, c=cos, d=sin: rotation.rotate_store(q, c, d, k, s, p))
        say(f"rotate_store, {number} rows: {us:.1f} us")
    number = 24 if DRY else 4096
    qkv = randn(number, 3 * VISION_HEADS * HEAD_DIM)
    cos, sin = torch.randn(number, HEAD_DIM, device=DEVICE), torch.randn(number, HEAD_DIM, device=DEVICE)
    q, k, v = qkv.view(number, 3, VISION_HEADS, HEAD_DIM).unbind(1)
    wanted = torch.stack([*(_rotate_exact(t, cos[:, None], sin[:, None]) for t in (q, k)), v], 1).flatten(1)
    report(f"rotate_image, {number} patches", rotation.rotate_image(qkv.clone(), cos, sin, VISION_HEADS), wanted)
    say(f"rotate_image, {number} patches: {timed(lambda: rotation.rotate_image(qkv, cos, sin, VISION_HEADS)):.1f} us")


def penalties_of_texts() -> None:
    size = 9000 if DRY else 151_552
    for number in (2,) if DRY else (1, 64):
        seen = torch.rand(number, size, device=DEVICE) < 0.01
        counts = torch.randint(0, 4, (number, size), dtype=torch.int16, device=DEVICE) * seen
        slots = torch.arange(number, dtype=torch.int32, device=DEVICE)
        logits = torch.randn(number, size, device=DEVICE)
        on, off = (torch.full((3, number), value, device=DEVICE) for value in (1.1, 0.0))
        off[0] = 1
        wanted = penalise_counts(penalise_seen(logits, seen, on[0][:, None]), counts, on[1][:, None], on[2][:, None])
        found = logits.clone()
        penalties.penalise(found, seen, counts, slots, *on)
        report(f"penalties, {number} rows", found, wanted)
        times = [timed(lambda a=found, t=(seen, counts, slots), p=each: penalties.penalise(a, *t, *p)) for each in (on, off)]
        say("penalties, {} rows: {:.1f} us; without any {:.1f} us".format(number, *times))


def norms_and_activation() -> None:
    eps = 1e-5
    for number in (3,) if DRY else (1, 16, 64, 512):
        x, delta, norm1, norm2 = randn(number, HIDDEN), randn(number, HIDDEN), randn(HIDDEN), randn(HIDDEN)
        gate_up = randn(number, 2 * INNER)
        torchs = TorchOperations(PAGE)
        y, normed = torchs.add_norm(x, delta, norm1, norm2, eps)
        ours = rows.add_norm(x, delta, norm1, norm2, eps)
        report(f"add_norm, {number} rows: sum", ours[0], y)
        report("  normed", ours[1], normed)
        report("rms_norm", rows.rms_norm(x, norm1, eps), F.rms_norm(x, (HIDDEN,), norm1, eps))
        report("add_rms_norm", rows.add_rms_norm(x, delta, norm1, eps)[1], F.rms_norm(x + delta, (HIDDEN,), norm1, eps))
        gate, up = gate_up.chunk(2, -1)
        report("silu_mul", rows.silu_mul(gate_up), F.silu(gate) * up)
        times = [
            timed(lambda a=x, b=delta, c=norm1, d=norm2: rows.add_norm(a, b, c, d, eps)),
            timed(lambda a=x, b=delta, c=norm1, d=norm2, t=torchs: t.add_norm(a, b, c, d, eps)),
            timed(lambda a=gate_up: rows.silu_mul(a)),
            timed(lambda a=gate, b=up: F.silu(a).mul_(b)),
        ]
        say("add_norm {:.1f} us (torch {:.1f}), silu_mul {:.1f} us (torch {:.1f})".format(*times))


def float8() -> None:
    if not DRY and torch.cuda.get_device_capability() < (8, 9):
        say("no float8 on this device")
        return
    for number in (3,) if DRY else (1, 64, 512):
        x = randn(number, HIDDEN)
        values, scales = quantization.quantize_rows(x)
        tolerance = 0.1 if DRY else 0.05  # the interpreter cuts off
        report(f"quantize_rows, {number} rows", values.float() * scales, x, tolerance)
        product, row = torch.randn(number, 2 * INNER, device=DEVICE), scales
        column, bias = torch.rand(2 * INNER, device=DEVICE), randn(2 * INNER)
        exact = product * row * column + bias.float()
        report("rescale", quantization.rescale(product, row, column, bias, dtype=DTYPE), exact)
        gate, up = exact.chunk(2, -1)
        report("rescale gated", quantization.rescale(product, row, column, bias, True, DTYPE), F.silu(gate) * up)
        norm, delta = randn(HIDDEN), randn(number, HIDDEN)
        exact, fused = (add(x, delta, norm, norm, 1e-5)[1] for add in (rows.add_norm, rows.add_norm_float8))
        report("add_norm_float8", fused.values.float() * fused.scales, exact, tolerance)
        wide, scales = product.to(DTYPE), torch.rand(2 * INNER, device=DEVICE)
        times = (
            timed(lambda a=x: quantization.quantize_rows(a)),
            timed(
                lambda p=wide, r=row, s=scales: quantization.quantize_rows(
                    quantization.rescale(p, r, s, None, True, DTYPE)
                )
            ),
            timed(lambda a=x, d=delta, n=norm: rows.add_norm(a, d, n, n, 1e-5)),
            timed(lambda a=x, d=delta, n=norm: rows.add_norm_float8(a, d, n, n, 1e-5)),
        )
        say(
            "quantize_rows {:.1f} us; rescale and quantize {:.1f} us; "
            "add_norm {:.1f} us, to float8 {:.1f} us".format(*times)
        )


def four_bits() -> None:
    """Products in NF4: the kernel for few rows, bitsandbytes, and cuBLAS with weights in 16 bits. GB/s of weights."""
    ops = bitsandbytes_ops()
    others = ((128, 4), (128, 8), (32, 4), (64, 4, 2), (64, 4, 4)) if "--sweep" in sys.argv else ()
    for name, (features, depth) in MATRICES.items():
        weight = randn(features, depth)
        values, scales = ops.quantize_4bit(weight, nf4.BLOCK, "nf4", torch.uint8)
        copies = 1 if DRY else max(COLD_BYTES // values.nbytes, 1)
        parts = [(values.clone(), scales.clone()) for _ in range(copies)]
        few = min(features, 512)
        last = values.flatten()[-few * depth // 2 :], scales[-few * depth // nf4.BLOCK :]
        unpacked = ops.dequantize_4bit(*last, nf4.BLOCK, "nf4", (few, depth), torch.float32)
        bias = randn(features)
        for number in (2,) if DRY else (2, 4, 16, 64):
            x = randn(number, depth)
            exact = F.linear(x.float(), unpacked, bias[-few:].float())
            line = ""
            swept = name in ("out", "gate_up") and number in (2, 64)  # each plan is compiled for each tile of rows
            plans = [nf4.Nf4Plan(), *(nf4.Nf4Plan(*other) for other in others if swept)]
            for plan in plans:
                try:
                    found = nf4.nf4_product(x, values, scales, features, bias, plan)
                except Exception as error:
                    line += f"\n        {tuple(plan)}: {str(error)[:80]}"
                    continue
                if plan is plans[0]:
                    report(f"{name} in NF4, {number} rows", found[:, -few:], exact)
                    alone = nf4.nf4_product(x[:1].contiguous(), values, scales, features, bias, plan)
                    same("  a row alone", alone[0], found[0])
                elif not float((found[:, -few:] - exact).norm()) <= TOLERANCE * float(exact.norm()):
                    report(f"{name} in NF4, {number} rows, {tuple(plan)}", found[:, -few:], exact)
                calls = [
                    lambda p=p, x=x, n=features, b=bias, plan=plan: nf4.nf4_product(x, *p, n, b, plan) for p in parts
                ]
                line += speed(str(tuple(plan)), values.nbytes + scales.nbytes, calls)
            theirs = [
                lambda p=p, x=x, s=(features, depth): ops.gemm_4bit(x, p[0], s, p[1], nf4.BLOCK, "nf4", None)
                for p in parts
            ]
            line += speed("bitsandbytes", values.nbytes + scales.nbytes, theirs)
            line += speed("cuBLAS", weight.nbytes, [lambda x=x, w=weight, b=bias: F.linear(x, w, b)])
            say(line.strip("\n"))


def speed(name: str, read: int, calls: list[Callable[[], Any]]) -> str:
    try:
        us = timed(*calls)
    except Exception as error:
        return f"\n        {name}: {str(error)[:80]}"
    return f"\n        {name:20} {us:7.1f} us {read / max(us, 1e-9) / 1e3:5.0f} GB/s"


def images() -> None:
    ours, theirs = CudaOperations(PAGE), TorchOperations(PAGE)
    for patches, frames in [(24, 1), (24, 2)] if DRY else [(1024, 1), (1024, 2), (4096, 1), (8192, 1)]:
        qkv = randn(patches, 3 * VISION_HEADS * HEAD_DIM)
        cos, sin = torch.randn(2, patches, HEAD_DIM, device=DEVICE).clamp(-1, 1)
        wanted = theirs.attend_image(qkv, cos, sin, frames, VISION_HEADS)
        report(
            f"attend_image, {patches} patches", ours.attend_image(qkv.clone(), cos, sin, frames, VISION_HEADS), wanted
        )
        us = timed(lambda a=qkv, c=cos, s=sin, f=frames: ours.attend_image(a, c, s, f, VISION_HEADS))
        plain = timed(lambda a=qkv, c=cos, s=sin, f=frames: theirs.attend_image(a, c, s, f, VISION_HEADS))
        flops = 4 * VISION_HEADS * HEAD_DIM * patches * patches / frames
        say(
            f"{patches} patches: {us:.1f} us {flops / max(us, 1e-9) / 1e6:.0f} TFLOP/s (torch operations {plain:.1f} us)"
        )


def sweep() -> None:
    """Other tiles for decoding and for prompts."""
    Decode, Prefill = attention.DecodePlan, attention.PrefillPlan
    shapes = [(1, 17)] if DRY else [(1, 256), (1, 1024), (1, 8192), (16, 1024), (64, 1024)]
    say(f"decode, us for {shapes}")
    for plan in [
        Decode(), Decode(least=128), Decode(32, 64, 4, 4, 128), Decode(least=256), Decode(32, 128, 4, 2, 128),
        Decode(32, 128, 8, 2, 128), Decode(32, 32, 2, 4, 64), Decode(32, 32, 4, 4, 128), Decode(16, 64, 4, 4, 128),
    ]:  # fmt: skip
        attempt(plan, lambda p=plan: [timed(*decode_calls(*shape, p)) for shape in shapes])
    chunks = [(17, 5)] if DRY else [(64, 0), (512, 0), (512, 2048), (16, 4096)]
    say(f"prefill, us for {chunks}")
    for plan in [
        Prefill(128, 64, 8, 3), Prefill(128, 128, 8, 2), Prefill(64, 64, 4, 3), Prefill(16, 64, 4, 3),
    ]:  # fmt: skip
        attempt(plan, lambda p=plan: [timed(prefill_call(*chunk, p)) for chunk in chunks])


def prefill_call(count: int, first: int, plan: attention.PrefillPlan) -> Callable[[], Any]:
    cache, q = Cache([first + count]), randn(count, TOTAL, HEAD_DIM)[:, :HEADS]
    out = poisoned(count, HEADS, HEAD_DIM)
    return lambda: attention.paged_prefill(q, cache.kv, cache.tables, count, PAGE, first, out=out, plan=plan)


def attempt(plan: Any, measure: Callable[[], list[float]]) -> None:
    try:
        say(f"{tuple(plan)!s:20} " + " ".join(f"{us:8.1f}" for us in measure()))
    except Exception as error:
        say(f"{tuple(plan)!s:20} {str(error)[:80]}")


SECTIONS = {
    "decode": decode,
    "prefill": prefill,
    "rotation": rotate_and_store,
    "rows": norms_and_activation,
    "penalties": penalties_of_texts,
    "float8": float8,
    "nf4": four_bits,
    "images": images,
    "decode-speed": decode_speed,
    "prefill-speed": prefill_speed,
    "library": library,
    "sweep": sweep,
}


if __name__ == "__main__":
    sys.exit(main())
