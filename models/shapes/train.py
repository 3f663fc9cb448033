"""Trains the demo model from scratch: `python -m models.shapes.train`.

Two stages. First the vision encoder alone learns what each 28x28 cell shows: dense supervision, because the loss of the
answers alone teaches it slowly. Then the whole model learns the answers, with two auxiliary tasks: the cells, and the
shapes that each name in a question refers to, because looking up a shape by its name is otherwise learned last. Seeded;
the state is saved regularly, and the same command resumes from it. With several processes (by default one for each core)
each draws its own pictures, and gradients are averaged.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, Glm4vForConditionalGeneration
from transformers.models.glm4v import modeling_glm4v

from models.shapes.checkpoint import FOLDER, MAX_CELLS, MIN_CELLS, config_for, train_tokenizer, write_processing
from models.shapes.pictures import COLORS, MAX_ITEMS, SHAPES, WORD_LETTERS, Item, Scene
from models.shapes.training_rows import Batch, RowMaker, collate, draw, grids

COLOR_IDS = {name: i + 1 for i, name in enumerate(COLORS)}
SHAPE_IDS = {name: i + 1 for i, name in enumerate(SHAPES)}
CHARS = "0123456789" + WORD_LETTERS
CHAR_IDS = {char: i + 1 for i, char in enumerate(CHARS)}
AUXILIARY_WEIGHT = 0.3  # of the auxiliary losses in the second stage
MENTION_LAYER = 3  # text layers after which a name is resolved; the rest can copy from it to the answer
EASY_SHARE = 0.25  # first part of the second stage, with at most three shapes in a picture


def equal_length_attention(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """Replaces Glm4vVisionAttention.forward for images of one size: one call for all instead of one for each."""
    tokens, pictures = hidden_states.shape[0], len(cu_seqlens) - 1
    q, k, v = self.qkv(hidden_states).reshape(tokens, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = modeling_glm4v.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (x.reshape(pictures, tokens // pictures, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    # In bfloat16 on a CPU, forward and backward are twice as fast as with the fused attention.
    weights = torch.softmax(torch.matmul(q * self.scaling, k.transpose(-1, -2)), dim=-1)
    return self.proj(torch.matmul(weights, v).transpose(1, 2).reshape(tokens, -1))


class CellHeads(nn.Module):
    """Predicts from each image token what covers its cell (colour, shape, letter), whether it is a centre, and the box."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(COLORS) + 1, len(SHAPES) + 1, len(CHARS) + 1, 1, 4)
        self.read = nn.Linear(width, sum(self.sizes))

    def loss(self, cells: torch.Tensor, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """cells [n, width]; targets: those of `cell_targets`."""
        color, shape, char, center, box = self.read(cells).split(self.sizes, dim=-1)
        t_color, t_shape, t_char, t_center, t_box = targets
        covered = (t_color > 0).float()
        loss = F.cross_entropy(color, t_color) + F.cross_entropy(shape, t_shape) + F.cross_entropy(char, t_char)
        loss = loss + F.binary_cross_entropy_with_logits(center.squeeze(-1), t_center)
        off = (box - t_box).abs().sum(-1)
        return loss + 3 * (off * covered).sum() / covered.sum().clamp(min=1)


class MentionHead(nn.Module):
    """Predicts from the last token of a name how many shapes it refers to, and colour, shape and box of the first."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (MAX_ITEMS + 1, len(COLORS) + 1, len(SHAPES) + 1, 4)
        self.read = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, sum(self.sizes)))

    def loss(self, names: torch.Tensor, referents: list[tuple[Item, ...]]) -> torch.Tensor:
        """names: hidden states [n, width]; referents: the shapes of each."""
        count, color, shape, box = self.read(names).split(self.sizes, dim=-1)
        to = lambda values: torch.tensor(values, device=names.device)  # noqa: E731
        present = to([bool(items) for items in referents])
        loss = F.cross_entropy(count, to([len(items) for items in referents]))
        if not present.any():
            return loss
        first = [items[0] for items in referents if items]
        loss = loss + F.cross_entropy(color[present], to([COLOR_IDS[i.color] for i in first]))
        loss = loss + F.cross_entropy(shape[present], to([SHAPE_IDS[i.shape] for i in first]))
        return loss + 3 * (box[present] - to([i.box for i in first])).abs().sum(-1).mean()


def cell_targets(scene: Scene, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """For each cell: colour id, shape id, letter id (0 = none), centre 0/1, box [4] in shares of the picture."""
    rows, columns = grid
    color, shape, char = (np.zeros((rows, columns), np.int64) for _ in range(3))
    center = np.zeros((rows, columns), np.float32)
    box = np.zeros((rows, columns, 4), np.float32)
    best = np.full((rows, columns), 0.12, np.float32)  # least overlap of a covered cell
    for item in scene.items:
        overlap = _overlap(item.box, grid)
        x, y = item.center
        r, c = min(rows - 1, int(y * rows)), min(columns - 1, int(x * columns))
        overlap[r, c] = 2.0  # the cell of the centre always counts
        won = overlap > best
        best[won], color[won], shape[won], box[won] = overlap[won], COLOR_IDS[item.color], SHAPE_IDS[item.shape], item.box
        center[r, c] = 1
    for letter, char_box in scene.char_boxes:
        overlap = _overlap(char_box, grid)
        won = overlap > best
        best[won], char[won] = overlap[won], CHAR_IDS[letter]
    return color.ravel(), shape.ravel(), char.ravel(), center.ravel(), box.reshape(-1, 4)


def _overlap(box: tuple[float, float, float, float], grid: tuple[int, int]) -> np.ndarray:
    """Share of each cell [rows, columns] that the box covers."""
    rows, columns = grid
    x1, y1, x2, y2 = box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows
    xs, ys = np.arange(columns), np.arange(rows)
    across = np.clip(np.minimum(x2, xs + 1) - np.maximum(x1, xs), 0, 1)
    down = np.clip(np.minimum(y2, ys + 1) - np.maximum(y1, ys), 0, 1)
    return (down[:, None] * across[None]).astype(np.float32)


@dataclass
class SharedGradients:
    """The gradients of the processes of one machine, in shared memory: `values` [processes, parameters]."""

    values: torch.Tensor
    barrier: Barrier


def sample_grids(rng: random.Random) -> list[tuple[int, int]]:
    """Two grids for a step. Those with the most or fewest cells are more frequent, as large and small pictures get them."""
    every = grids()
    frequent = [(rows, columns) for rows, columns in every if not MIN_CELLS < rows * columns < 0.75 * MAX_CELLS]
    return [rng.choice(frequent if rng.random() < 0.6 else every) for _ in range(2)]


class Trainer:
    """One process's share of the training."""

    def __init__(self, options: argparse.Namespace, rank: int = 0, shared: SharedGradients | None = None):
        self.options, self.rank, self.shared = options, rank, shared
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        modeling_glm4v.Glm4vVisionAttention.forward = equal_length_attention
        self.tokenizer = AutoTokenizer.from_pretrained(options.state)
        self.model = Glm4vForConditionalGeneration(config_for(self.tokenizer)).to(self.device)
        self.model.model.language_model.set_attn_implementation("eager")
        width = self.model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({"cells": CellHeads(width), "mentions": MentionHead(width)}).to(self.device)
        self.image_id = self.model.config.image_token_id
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizers = self._optimizers()
        self.step = 0
        self.parts: dict[str, float] = {}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for the rest."""
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            inside = parameter.ndim == 2 and (".blocks." in name or ".layers." in name or ".merger." in name)
            (matrices if inside else rest).append(parameter)
        rest += self.heads.parameters()
        muon = torch.optim.Muon(matrices, lr=self.options.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4)
        adam = torch.optim.AdamW(rest, lr=self.options.lr, betas=(0.9, 0.98), weight_decay=0.0)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return [muon, adam]

    def run(self) -> None:
        options = self.options
        self._resume()
        dense_steps = options.dense_steps
        bar = tqdm(total=options.steps, initial=self.step, disable=self.rank > 0, mininterval=10, smoothing=0.05)
        saved, shown = time.monotonic(), []
        while self.step < options.steps:
            rng = random.Random(f"{options.seed}/{self.step}/{self.rank}")
            # The same sizes in every process, so that none waits for another.
            here = sample_grids(random.Random(f"{options.seed}/{self.step}"))
            loss = self._learn_cells(rng, here) if self.step < dense_steps else self._learn_answers(rng, here)
            self._average_gradients()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self._set_rate(dense_steps)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            shown.append(loss)
            bar.update()
            if (self.step % 20 == 0 or self.step == options.steps) and self.rank == 0:
                bar.set_postfix(loss=f"{np.mean(shown[-20:]):.4f}", **{k: f"{v:.4f}" for k, v in self.parts.items()})
            if self.rank == 0 and (time.monotonic() - saved > options.save_every_s or self.step == options.steps):
                self._save()
                saved = time.monotonic()

    def _set_rate(self, dense_steps: int) -> None:
        """Warm-up in each stage; cosine decay to a hundredth in the second."""
        if self.step < dense_steps:
            share = min(1.0, (self.step + 1) / 50)
        else:
            done = (self.step - dense_steps) / max(1, self.options.steps - dense_steps)
            share = min(1.0, (self.step - dense_steps + 1) / 80) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share

    def _encode(self, groups) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run the vision encoder; returns the features of each group [n, cells, width] and the loss of the cells."""
        features, losses = [], []
        for grid, patches, scenes in groups:
            pixels = torch.from_numpy(patches).to(self.device).flatten(0, 1)
            thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * len(scenes), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                cells = self.model.model.visual(pixels, grid_thw=thw).pooler_output.float()
            targets = [cell_targets(scene, grid) for scene in scenes]
            stacked = [torch.from_numpy(np.concatenate(t)).to(self.device) for t in zip(*targets, strict=True)]
            losses.append(self.heads["cells"].loss(cells, tuple(stacked)) * len(scenes))
            features.append(cells.view(len(scenes), grid[0] * grid[1], -1))
        return features, sum(losses, torch.zeros(())) / max(1, sum(len(g[2]) for g in groups))

    def _learn_cells(self, rng: random.Random, here: list[tuple[int, int]]) -> float:
        groups = []
        for grid in here:
            pictures = [draw(rng, grid) for _ in range(self.options.rows // 2)]
            groups.append((grid, np.stack([p.patches for p in pictures]), [p.scene for p in pictures]))
        loss = self._encode(groups)[1]
        loss.backward()
        return loss.item()

    def _learn_answers(self, rng: random.Random, here: list[tuple[int, int]]) -> float:
        """One step over all rows, in two batches of rows of similar length, to save padding."""
        done = (self.step - self.options.dense_steps) / (self.options.steps - self.options.dense_steps)
        maker = RowMaker(self.tokenizer, rng, most_items=3 if done < EASY_SHARE else MAX_ITEMS)
        rows = sorted((maker.row(here) for _ in range(self.options.rows)), key=lambda row: len(row.ids))
        cut = 3 * len(rows) // 4
        batches = [collate(part, self.image_id) for part in (rows[:cut], rows[cut:])]
        learned = [int((batch.labels != -100).sum()) for batch in batches]
        self.parts = {"answers": 0.0, "cells": 0.0, "mentions": 0.0}
        total = 0.0
        for batch, tokens in zip(batches, learned, strict=True):
            losses = self._answer_losses(batch)
            share = tokens / sum(learned)
            loss = share * (losses["answers"] + AUXILIARY_WEIGHT * (losses["cells"] + losses["mentions"]))
            loss.backward()
            total += loss.item()
            for name, value in losses.items():
                self.parts[name] += share * value.item()
        return total

    def _answer_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        features, cells_loss = self._encode(batch.groups)
        to = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        language = self.model.model.language_model
        embeds = language.embed_tokens(to(batch.ids))
        cells = torch.cat([features[group][index] for group, index in batch.picture_order])
        embeds = embeds.masked_scatter(to(batch.image_slots)[..., None], cells)
        blocked = torch.where(to(batch.mask), 0.0, torch.finfo(torch.float32).min)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            hidden = language(
                inputs_embeds=embeds, position_ids=to(batch.positions), attention_mask=blocked, use_cache=False, output_hidden_states=True
            )
            labels = to(batch.labels)
            learned = labels != -100
            logits = self.model.lm_head(hidden.last_hidden_state[learned]).float()
        answers = F.cross_entropy(logits, labels[learned])
        return {"answers": answers, "cells": cells_loss, "mentions": self._mentions_loss(batch, hidden.hidden_states[MENTION_LAYER])}

    def _mentions_loss(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        if not batch.mentions:
            return torch.zeros((), device=self.device)
        rows, tokens, referents = zip(*batch.mentions, strict=True)
        return self.heads["mentions"].loss(hidden[list(rows), list(tokens)].float(), list(referents))

    def _average_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.shared:
            self.shared.values[self.rank] = torch.cat([p.grad.flatten() for p in self.parameters])
            self.shared.barrier.wait()
            mean = self.shared.values.mean(0)
            self.shared.barrier.wait()  # the next gradients must not be written before all have read these
            for parameter, part in zip(self.parameters, mean.split([p.numel() for p in self.parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))

    def _save(self) -> None:
        path = self.options.state / "state.pt"
        state = {"step": self.step, "model": self.model.state_dict(), "heads": self.heads.state_dict()}
        torch.save({**state, "optimizers": [o.state_dict() for o in self.optimizers]}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        write_checkpoint(self.model, self.tokenizer, self.options.out)

    def _resume(self) -> None:
        path = self.options.state / "state.pt"
        if self.options.init and not path.exists():
            known = Glm4vForConditionalGeneration.from_pretrained(self.options.init, dtype=torch.float32)
            self.model.load_state_dict(known.state_dict())
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]


def write_checkpoint(model: Glm4vForConditionalGeneration, tokenizer, folder: Path) -> None:
    """Write the weights in bfloat16, half their size, and all files that loading needs."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    write_processing(folder, tokenizer)


def work(rank: int, options: argparse.Namespace, shared: SharedGradients) -> None:
    torch.set_num_threads(1)
    Trainer(options, rank, shared).run()


def train_in_processes(options: argparse.Namespace) -> None:
    """Data parallelism with one thread for each process: faster than more threads on small matrices."""
    size = sum(p.numel() for p in Trainer(options).parameters)
    context = mp.get_context("spawn")
    shared = SharedGradients(torch.zeros(options.processes, size).share_memory_(), context.Barrier(options.processes))
    mp.spawn(work, (options, shared), nprocs=options.processes, daemon=True)


def main() -> None:
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the checkpoint is written")
    parser.add_argument("--state", type=Path, default=FOLDER / ".train", help="folder of the state that a run resumes from")
    parser.add_argument("--init", type=Path, help="checkpoint to start from, with --dense-steps 0; default: from scratch")
    parser.add_argument("--steps", type=int, default=6200)
    parser.add_argument("--dense-steps", type=int, default=1600, help="steps of the first stage")
    parser.add_argument("--rows", type=int, default=16, help="rows (about one picture each) of a step in each process")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else min(2, cpus))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every-s", type=float, default=300.0)
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.state / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(options.init) if options.init else train_tokenizer(options.seed)
        write_processing(options.state, tokenizer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly exit ends the child processes too
    if options.processes > 1:
        train_in_processes(options)
    else:
        Trainer(options).run()


if __name__ == "__main__":
    main()
