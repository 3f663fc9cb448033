"""The operations of a model on a CUDA device: the kernels of this room, torch's products and torch's image attention.

Implements api.engine.model.operations.Operations. Beyond the interface:

- `rotate_store` takes cos and sin [rows, head_dim] too, which need not be spread over the heads, or with `positions`
  [rows] the tables [positions, head_dim] of `Rotary`. Slot -1 writes nothing.
- `attend_decode` and `attend_prefill` take int32 or int64 pages and lengths. With `starts` and `firsts` in its metadata,
  `attend_prefill` computes chunks of several sequences in one launch.
- `out` is where attention writes its result, for buffers that a CUDA graph keeps.

May be captured in a CUDA graph after one run of the same operations, which compiles the kernels. `prepare` keeps the
room that decoding needs. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from api.engine.cuda.attention import DecodeScratch, decode_scratch, paged_decode, paged_prefill, plans_for
from api.engine.cuda.linear import CudaFp8Linear, CudaLinear, CudaNf4Linear
from api.engine.cuda.penalties import penalise
from api.engine.cuda.rotation import rotate_image, rotate_store
from api.engine.cuda.rows import add_norm, add_norm_float8, silu_mul
from api.engine.model.linear import Linear, Role
from api.engine.model.operations import AttentionMetadata, Frames, TorchOperations, each_frame
from api.engine.model.recipe import BF16, LINEARS, Format, Recipe

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

# What may be computed by a kernel of this room or by plain torch.
Path = Literal["decode", "prefill", "norms", "rotation", "activation", "image", "images", "penalties", "float8", "nf4"]
PATHS: tuple[Path, ...] = get_args(Path)


class CudaOperations(TorchOperations):
    """`capability` is the device's compute capability, by which tiles are chosen.

    Paths that `use_plain` names are computed by torch: attention over gathered keys and values.
    """

    needs_masks = False
    ragged = True

    def __init__(self, page_tokens: int, capability: tuple[int, int] = (9, 0), recipe: Recipe = BF16) -> None:
        super().__init__(page_tokens, recipe)
        # cuDNN's attention builds a plan for every new size of a picture, while users wait.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._linears: dict[Format, Callable[..., Linear]] = {
            **LINEARS,
            "plain": partial(CudaLinear, activate=self.activate),
            "fp8": partial(CudaFp8Linear, uses_kernels=lambda: "float8" not in self._plain),
            "nf4": partial(CudaNf4Linear, activate=self.activate, uses_kernel=lambda: "nf4" not in self._plain),
        }  # fmt: skip
        self._plain: frozenset[Path] = frozenset()
        self._decode_plan, self._prefill_plan = plans_for(capability)
        self._scratch: DecodeScratch | None = None

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False, role: Role = "text"
    ) -> Linear:
        return self.recipe.linear(role, weight, bias, gated, self._linears)

    def use_plain(self, paths: Iterable[Path]) -> None:
        """From now on these paths, and no others, are computed by plain torch."""
        self._plain = frozenset(paths)
        self.needs_masks = "decode" in self._plain
        self.ragged = "prefill" not in self._plain

    @property
    def penalise(self) -> Callable[..., None] | None:
        """penalties.penalise. None: the sampler of the host lowers the logits of tokens that a text has."""
        return None if "penalties" in self._plain else penalise

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half of a row) * second half: [rows, 2 * inner] -> [rows, inner]."""
        if "activation" in self._plain:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        return silu_mul(gate_up)

    def prepare(self, rows: int, heads: int, head_dim: int, device: torch.device) -> None:
        """Keep room for decoding up to `rows` rows, so that calls and CUDA graphs share it."""
        self._scratch = decode_scratch(rows, heads, head_dim, device, self._decode_plan)

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        delta_norm: torch.Tensor,
        next_norm: torch.Tensor,
        eps: float,
        following: Linear | None = None,
    ) -> tuple[torch.Tensor, Any]:
        if "norms" in self._plain:
            return super().add_norm(x, delta, delta_norm, next_norm, eps)
        compute = add_norm_float8 if self._in_float8(following) else add_norm
        return compute(x.contiguous(), delta.contiguous(), delta_norm, next_norm, eps)

    def _in_float8(self, linear: Linear | None) -> TypeGuard[CudaFp8Linear]:
        """Whether it takes rows in float8."""
        return isinstance(linear, CudaFp8Linear) and "float8" not in self._plain

    def rotate_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if "rotation" in self._plain:
            return self._rotate_store_plain(qkv, cos, sin, kv, slot_mapping, positions)
        if cos.ndim == 3:  # spread over the heads: those of the first hold for all
            cos, sin = cos[:, 0], sin[:, 0]
        return rotate_store(qkv, cos, sin, kv, slot_mapping, positions)

    def attend_decode(
        self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if "decode" in self._plain:
            return super().attend_decode(qkv, kv, metadata)
        assert metadata.lengths is not None
        rows, heads = len(qkv), qkv.shape[1] - kv.shape[1]
        scratch = self._scratch
        if scratch is not None and (scratch.parts.shape[0] < rows or scratch.parts.shape[1] != heads):
            scratch = None
        attended = paged_decode(
            qkv[:, :heads], kv, metadata.pages, metadata.lengths, self._page_tokens, out, scratch, self._decode_plan
        )
        return attended.view(rows, -1)

    def attend_prefill(
        self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, heads = len(qkv), qkv.shape[1] - kv.shape[1]
        if "prefill" in self._plain:
            return self._attend_gathered(qkv, kv, metadata)
        pages = metadata.pages if metadata.pages.ndim == 2 else metadata.pages[None]
        attended = paged_prefill(
            qkv[:, :heads], kv, pages, metadata.max_rows or rows, self._page_tokens,
            metadata.first, metadata.starts, metadata.firsts, out, self._prefill_plan,
        )  # fmt: skip
        return attended.view(rows, -1)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        if "image" in self._plain:
            return super().attend_image(qkv, cos, sin, frames, heads)
        patches = len(qkv)
        q, k, v = (
            rotate_image(qkv.contiguous(), cos, sin, heads).view(frames, patches // frames, 3, heads, -1).unbind(2)
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [frames, heads, patches of a frame, head_dim]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(patches, -1)

    def attend_images(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: Frames, heads: int
    ) -> torch.Tensor:
        if "images" in self._plain:
            return super().attend_images(qkv, cos, sin, frames, heads)
        if frames.starts is None or not self._has_ragged_images(qkv):
            return each_frame(self.attend_image, qkv, cos, sin, frames, heads)
        q, k, v = rotate_image(qkv.contiguous(), cos, sin, heads).view(len(qkv), 3, heads, -1).unbind(1)
        longest = max(frames.patches)
        # One split: otherwise the longest frame would decide in how many parts the others are added up.
        attended = varlen.varlen_attn(q, k, v, frames.starts, frames.starts, longest, longest, num_splits=1)
        assert isinstance(attended, torch.Tensor)  # a pair only where the sums of the probabilities are asked for
        return attended.reshape(len(qkv), -1)

    def _has_ragged_images(self, qkv: torch.Tensor) -> bool:
        """Whether torch's attention over frames of several sizes is for such numbers."""
        return varlen is not None and qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16)

    def _rotate_store_plain(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """As the interface has it: rows without a slot are not supported."""
        if positions is not None:
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
        if cos.ndim == 2:
            turned = qkv.shape[1] - kv.shape[1] // 2
            values = (len(qkv), kv.shape[1] // 2, qkv.shape[2])
            cos = torch.cat([cos[:, None].expand(-1, turned, -1), cos.new_ones(values)], dim=1)
            sin = torch.cat([sin[:, None].expand(-1, turned, -1), sin.new_zeros(values)], dim=1)
        return super().rotate_store(qkv, cos, sin, kv, slot_mapping)

    def _attend_gathered(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """One sequence: its keys and values are gathered, and torch's flash attention aligns the rows with the last."""
        (rows, total, _), kv_heads = qkv.shape, kv.shape[1] // 2
        end = metadata.first + rows
        stored = self._read(kv, metadata.pages.flatten())[:end]
        q = qkv[:, : total - 2 * kv_heads].transpose(0, 1)[None]
        k, v = stored.transpose(0, 1)[None].split(kv_heads, dim=1)
        group = q.shape[1] // kv_heads
        k, v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        mask = causal_lower_right(rows, end)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).reshape(rows, -1)
