"""The vision encoder of the families that the engine computes: one or several images at a time, in slices of one or more
blocks.

The arithmetic of Glm4vVisionModel (transformers 5.23, models.glm4v.modeling_glm4v) and of GlmOcrVisionModel, which has
biases and norms of queries and keys, but no learned positions and no norm after the embedding. A slice has a time limit, so that
decoding requests never wait for a large image as a whole. Engine thread only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.image_processor import PixelPatches
from api.engine.model.linear import Linear
from api.engine.model.operations import Frames, Operations, VisionBlock
from api.engine.model.weight_source import WeightSource

Grid = tuple[int, int, int]  # frames, rows, columns, in patches
# Learned position embeddings [patches, hidden], cos and sin [patches, head_dim] of a grid.
Table = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
TOWER = "model.visual"
PIXEL_ROWS = 1024  # patches whose bytes become numbers at once
TABLE_PATCHES = 2**14  # position tables of the latest image sizes are kept, together of at most so many patches


@dataclass
class Progress:
    """The state of images between two blocks."""

    x: torch.Tensor  # [patches, hidden]
    cos: torch.Tensor  # [patches, head_dim], float32
    sin: torch.Tensor
    frames: Frames
    images: tuple[int, ...]  # patches of each
    block: int = 0  # index of the next block


class VisionEncoder:
    def __init__(self, source: WeightSource, operations: Operations) -> None:
        config, linear = source.config.vision_config, partial(operations.linear, role="vision")
        self._operations = operations
        self.dtype, self.device = source.dtype, source.device
        self.merge = config.spatial_merge_size
        self.patch_size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self._heads, self._eps = config.num_heads, config.rms_norm_eps
        # Multiplications of a patch with one other in attention, as a part of those with the weights of a block.
        hidden, inner = config.hidden_size, config.out_hidden_size
        self._attention_share = 2 * hidden / (4 * hidden**2 + 3 * hidden * inner)
        embed = source.take(f"{TOWER}.patch_embed.proj.weight")
        self._embed = linear(
            embed.flatten(1), source.find(f"{TOWER}.patch_embed.proj.bias")
        )  # strides equal the kernel
        self._embed_norm = source.find(f"{TOWER}.post_conv_layernorm.weight")
        self._positions = source.find(f"{TOWER}.embeddings.position_embedding.weight")
        self._inverse_frequencies = _inverse_frequencies(config).to(self.device)
        self._blocks = [_block(source, f"{TOWER}.blocks.{number}", linear) for number in range(config.depth)]
        self._fused = [operations.fuse_block(block, self._heads, self._eps) for block in self._blocks]
        self._norm = source.take(f"{TOWER}.post_layernorm.weight")
        down = source.take(f"{TOWER}.downsample.weight")
        self._downsample = linear(down.permute(0, 2, 3, 1).flatten(1), source.find(f"{TOWER}.downsample.bias"))
        merger = f"{TOWER}.merger"
        self._merge_in = linear(source.take(f"{merger}.proj.weight"), source.find(f"{merger}.proj.bias"))
        self._merge_norm = source.take(f"{merger}.post_projection_norm.weight")
        self._merge_norm_bias = source.take(f"{merger}.post_projection_norm.bias")
        self._merge_gate_up = linear(*_gate_up(source, merger), gated=True)
        self._merge_down = linear(source.take(f"{merger}.down_proj.weight"), source.find(f"{merger}.down_proj.bias"))
        self._tables: OrderedDict[Grid, Table] = OrderedDict()

    def begin(self, patches: Any, grid: Grid, keep_table: bool = True) -> Progress:
        """One image; see `begin_several`."""
        return self.begin_several([patches], [grid], None, keep_table)

    def begin_several(
        self, patches: list[Any], grids: list[Grid], starts: torch.Tensor | None = None, keep_table: bool = True
    ) -> Progress:
        """Images to be encoded together. `starts`: as in Frames.

        `patches`: PixelPatches, or numbers [patches, channels * frames * height * width] in the order of the image
        processor; tensors on the device are taken as they are. `keep_table`: use and fill the cache of position tables."""
        numbers = [self._numbers(each) for each in patches]
        tables = [self._table(grid) if keep_table else self._make_table(grid) for grid in grids]
        images = tuple(map(len, numbers))
        x = self._embed(_joined(numbers))
        if self._embed_norm is not None:
            x = F.rms_norm(x, self._embed_norm.shape, self._embed_norm, self._eps)
        learned = [table[0] for table in tables if table[0] is not None]
        x = x + _joined(learned) if learned else x
        frames = tuple(rows * columns for frames, rows, columns in grids for _ in range(frames))
        cos, sin = (_joined(parts) for parts in zip(*(table[1:] for table in tables), strict=True))
        return Progress(x, cos, sin, Frames(frames, starts), images)

    def features_of(self, progress: Progress, features: torch.Tensor) -> list[torch.Tensor]:
        """Features of each image, from those of all that were encoded together."""
        if len(progress.images) == 1:
            return [features]
        parts = features.split([patches // self.merge**2 for patches in progress.images])
        return [part.clone() for part in parts]  # each can be freed alone

    def _numbers(self, patches: Any) -> torch.Tensor:
        """Patches as numbers of the encoder's type: [patches, channels * frames * height * width]."""
        if not isinstance(patches, PixelPatches):
            return torch.as_tensor(patches).to(self.device, self.dtype)
        pixels = torch.as_tensor(patches.pixels).to(self.device)
        scale = torch.as_tensor(patches.scale).to(self.device, self.dtype)
        (count, colours, area), frames = pixels.shape, patches.frames
        numbers = torch.empty(count, colours, frames, area, dtype=self.dtype, device=self.device)
        first = torch.arange(colours, dtype=torch.int32, device=self.device)[:, None] * scale.shape[1]
        for start in range(0, count, PIXEL_ROWS):  # indices take four times the memory of what they are made from
            rows = slice(start, start + PIXEL_ROWS)
            indices = pixels[rows].int().add_(first)
            found = scale.view(-1).index_select(0, indices.view(-1)).view(indices.shape)
            numbers[rows] = found[:, :, None]
        return numbers.view(count, -1)

    def advance(self, progress: Progress, limit_s: float) -> torch.Tensor | None:
        """Compute as many blocks as fit into `limit_s`, at least one. Returns features [image tokens, hidden] of the text
        model after the last block, else None."""
        now = time.monotonic()
        deadline = now + limit_s
        while progress.block < len(self._blocks):
            began = now
            progress.x = self._run(progress)
            progress.block += 1
            now = time.monotonic()
            if now + (now - began) > deadline:  # the merger takes about as long as a block
                return None
        return self._merge(progress.x)

    def advance_blocks(self, progress: Progress, blocks: int) -> torch.Tensor | None:
        """Compute so many blocks, the merger counting as the last. Returns what `advance` returns."""
        for _ in range(blocks):
            if progress.block == len(self._blocks):
                return self._merge(progress.x)
            progress.x = self._run(progress)
            progress.block += 1
        return None

    def blocks_left(self, progress: Progress) -> int:
        """With the merger."""
        return len(self._blocks) + 1 - progress.block

    def block_work(self, progress: Progress) -> int:
        """What a block costs, in patches of an image so small that its attention costs nothing."""
        sizes = progress.frames.patches
        return sum(sizes) + int(sum(size**2 for size in sizes) * self._attention_share)

    def drop_tables(self) -> None:
        """Empty the cache of position tables."""
        self._tables.clear()

    def _run(self, progress: Progress) -> torch.Tensor:
        x, block, fused = progress.x, self._blocks[progress.block], self._fused[progress.block]
        if fused and progress.frames.alike:
            return fused(x, progress.cos, progress.sin, len(progress.frames.patches))
        x = x + block.out(self._attend(x, block, progress))  # what attention takes is free again before the MLP
        hidden = F.rms_norm(x, block.norm2.shape, block.norm2, self._eps)
        return x + block.down(block.gate_up(hidden))

    def _attend(self, x: torch.Tensor, block: VisionBlock, progress: Progress) -> torch.Tensor:
        qkv = block.qkv(F.rms_norm(x, block.norm1.shape, block.norm1, self._eps))
        if block.q_norm is not None and block.k_norm is not None:
            qkv = self._normed(qkv, block.q_norm, block.k_norm)
        frames = progress.frames
        if frames.alike:
            return self._operations.attend_image(qkv, progress.cos, progress.sin, len(frames.patches), self._heads)
        return self._operations.attend_images(qkv, progress.cos, progress.sin, frames, self._heads)

    def _normed(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        """Queries and keys of qkv [patches, 3 * heads * head_dim] normed for each head."""
        q, k, v = qkv.view(len(qkv), 3, self._heads, -1).unbind(1)
        q, k = F.rms_norm(q, q_norm.shape, q_norm, self._eps), F.rms_norm(k, k_norm.shape, k_norm, self._eps)
        return torch.stack([q, k, v], dim=1).view(qkv.shape)

    def _merge(self, x: torch.Tensor) -> torch.Tensor:
        """Merge squares of neighbouring patches into image tokens."""
        x = F.rms_norm(x, self._norm.shape, self._norm, self._eps)
        x = self._merge_in(self._downsample(x.view(-1, self.merge**2 * x.shape[-1])))
        x = F.gelu(F.layer_norm(x, x.shape[-1:], self._merge_norm, self._merge_norm_bias))
        return self._merge_down(self._merge_gate_up(x))

    def _table(self, grid: Grid) -> Table:
        table = self._tables.pop(grid, None) or self._make_table(grid)
        self._tables[grid] = table
        while sum(len(each[1]) for each in self._tables.values()) > TABLE_PATCHES:
            self._tables.popitem(last=False)
        return table

    def _make_table(self, grid: Grid) -> Table:
        """Learned positions, where there are any, are resized to the grid."""
        frames, rows, columns = grid
        # Patches come in squares of `merge` x `merge`, row by row of squares.
        squares = (rows // self.merge, self.merge, columns // self.merge, self.merge)
        y, x = (torch.arange(size, device=self.device) for size in (rows, columns))
        y, x = torch.meshgrid(y, x, indexing="ij")
        y, x = (t.reshape(squares).transpose(1, 2).flatten().float() for t in (y, x))
        learned = None if self._positions is None else self._resized(self._positions, y, x, rows, columns)
        angles = torch.cat([y[:, None] * self._inverse_frequencies, x[:, None] * self._inverse_frequencies], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        learned = None if learned is None else learned.repeat(frames, 1)
        return learned, cos.repeat(frames, 1), sin.repeat(frames, 1)

    def _resized(
        self, positions: torch.Tensor, y: torch.Tensor, x: torch.Tensor, rows: int, columns: int
    ) -> torch.Tensor:
        side = int(len(positions) ** 0.5)
        learned = positions.float().view(side, side, -1).permute(2, 0, 1)[None]
        at = torch.stack([(x + 0.5) / columns * 2 - 1, (y + 0.5) / rows * 2 - 1], dim=-1)[None, :, None]
        resized = F.grid_sample(learned, at, mode="bicubic", align_corners=False, padding_mode="border")
        return resized[0, :, :, 0].T.to(self.dtype).contiguous()


def _joined(parts: Items[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _block(source: WeightSource, name: str, linear: Callable[..., Linear]) -> VisionBlock:
    def product(part: str) -> Linear:
        return linear(source.take(f"{name}.{part}.weight"), source.find(f"{name}.{part}.bias"))

    return VisionBlock(
        norm1=source.take(f"{name}.norm1.weight"),
        qkv=product("attn.qkv"),
        out=product("attn.proj"),
        norm2=source.take(f"{name}.norm2.weight"),
        gate_up=linear(*_gate_up(source, f"{name}.mlp"), gated=True),
        down=product("mlp.down_proj"),
        q_norm=source.find(f"{name}.attn.q_norm.weight"),
        k_norm=source.find(f"{name}.attn.k_norm.weight"),
    )


def _gate_up(source: WeightSource, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one product for both halves."""
    weight = torch.cat([source.take(f"{name}.gate_proj.weight"), source.take(f"{name}.up_proj.weight")])
    gate, up = source.find(f"{name}.gate_proj.bias"), source.find(f"{name}.up_proj.bias")
    return weight, None if gate is None or up is None else torch.cat([gate, up])


def _inverse_frequencies(config: Any) -> torch.Tensor:
    """Frequencies [head_dim / 4] of one axis, as Glm4vVisionRotaryEmbedding computes them."""
    dim = config.hidden_size // config.num_heads // 2
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
