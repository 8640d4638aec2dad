"""A specialist to compare with: a residual conv net with a linear head for every closed item and number.

What one would train who wants these answers and no language: the tower of the `tiny` preset (He et al. 2016, 1.6 M
parameters) on standardised pictures as there, its mean-pooled grid, cross-entropy with square-root-inverse class
weights, smooth L1 for numbers, AdamW at 2e-3 along a cosine over the seconds given, mirrored, shifted and relit faces
as in training of ours. An item that a face is not asked about has no loss there.

Shapes: B faces of a batch, S image side, C classes of an item, F features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from facemllm import tasks
from facemllm.model.inputs import normalise
from facemllm.model.tiny import FaceTower, FaceTowerConfig, standardized
from facemllm.scoring import metrics
from facemllm.scoring.sheet import Key, Sheet
from facemllm.train.augment import apply_changes, draw_changes
from facemllm.train.data import mirror_text

BATCH, RATE, DECAY, WARM_UP = 64, 2e-3, 0.05, 0.05
HEAVIEST = 3.0
UNKNOWN = -1


@dataclass(frozen=True)
class Item:
    """One output: a class of `values`, or a number (no values) standardised by `mean` and `spread`.

    `mirrored` is the class in a mirrored face by class; a number whose words name a side changes its `sign`.
    """

    key: Key
    values: tuple[str, ...]
    weight_C: Tensor
    mirrored: Tensor
    mean: float = 0.0
    spread: float = 1.0
    low: float = 0.0
    high: float = 0.0
    sign: float = 1.0

    @property
    def width(self) -> int:
        """Outputs of its head."""
        return max(1, len(self.values))


def items_of(train: Sheet) -> list[Item]:
    """The items that have a head: asked in training, answered by a class or a number, with two answers at least."""
    found = []
    for key, rows in train.rows.items():
        metric, question = metrics.of(tasks.get(key[0])), train.questions[key]
        answers = [train.answers[row] for row in rows]
        if metric.answers == "facts" or not question.options or len(set(answers)) < 2:
            continue
        texts = {option.value: option.text for option in question.options}
        if metric.answers == "number":
            numbers = np.array([float(answer) for answer in answers])
            sided = any(mirror_text(text) != text for text in texts.values())
            limits = {"low": float(numbers.min()), "high": float(numbers.max()), "sign": -1.0 if sided else 1.0}
            scale = {"mean": float(numbers.mean()), "spread": float(numbers.std())}
            found.append(Item(key, (), torch.ones(1), torch.zeros(1, dtype=torch.long), **scale, **limits))
            continue
        values = tuple(sorted(set(answers)))
        share_C = torch.tensor([answers.count(value) / len(answers) for value in values])
        weight_C = (1 / share_C).sqrt()
        weight_C = (weight_C / (weight_C * share_C).sum()).clamp(max=HEAVIEST)
        by_text = {text: value for value, text in texts.items()}
        other = [by_text.get(mirror_text(texts.get(value, value)), value) for value in values]
        swapped = [name if name in values else value for name, value in zip(other, values, strict=True)]
        mirrored = torch.tensor([values.index(value) for value in swapped])
        found.append(Item(key, values, weight_C, mirrored))
    return found


class Specialist(nn.Module):
    """Pictures (B, 3, S, S) to all items' outputs (B, sum of widths), side by side."""

    def __init__(self, items: Sequence[Item], side: int) -> None:
        super().__init__()
        self.items = list(items)
        config = FaceTowerConfig(image_size=side)
        tower = FaceTower(config)
        self.stem, self.stages = tower.stem, tower.stages
        self.heads = nn.Linear(config.hidden_size, sum(item.width for item in items))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Outputs of all heads."""
        grid_BFGG = self.stages(F.relu(self.stem(standardized(x_BCSS).contiguous(memory_format=torch.channels_last))))
        return self.heads(grid_BFGG.mean((2, 3)))


def targets_of(items: Sequence[Item], sheet: Sheet) -> dict[Key, Tensor]:
    """By item: the class (`UNKNOWN` where it is not asked) or the standardised number (NaN), one an image."""
    found = {}
    for item in items:
        said = np.full(len(sheet.images), UNKNOWN if item.values else np.nan)
        for row in sheet.rows[item.key]:
            answer = sheet.answers[row]
            known = item.values.index(answer) if item.values else (float(answer) - item.mean) / item.spread
            said[sheet.faces[row]] = known
        found[item.key] = torch.from_numpy(said).long() if item.values else torch.from_numpy(said).float()
    return found


def _loss(model: Specialist, out_BH: Tensor, targets: Mapping[Key, Tensor], rows: Tensor, mirror_B: Tensor) -> Tensor:
    total = out_BH.new_zeros(())
    parts = out_BH.float().split([item.width for item in model.items], dim=1)
    for item, part in zip(model.items, parts, strict=True):
        wanted_B = targets[item.key][rows]
        if item.values:
            swapped_B = torch.where(wanted_B >= 0, item.mirrored[wanted_B.clamp(min=0)], wanted_B)
            wanted_B = torch.where(mirror_B, swapped_B, wanted_B)
            missed = F.cross_entropy(part, wanted_B, item.weight_C, ignore_index=UNKNOWN, reduction="sum")
            total = total + missed / (wanted_B != UNKNOWN).sum().clamp(min=1)
            continue
        if item.sign < 0:
            turned_B = (-(wanted_B * item.spread + item.mean) - item.mean) / item.spread
            wanted_B = torch.where(mirror_B, turned_B, wanted_B)
        known_B = wanted_B.isfinite()
        if known_B.any():
            total = total + F.smooth_l1_loss(part[known_B, 0], wanted_B[known_B])
    return total / len(model.items)


def train(
    sheet: Sheet, pixels: NDArray[np.uint8], image_processor: Any, seconds: float, seed: int, *, bf16: bool
) -> tuple[Specialist, int]:
    """A specialist trained for so many seconds on a sheet's images, `pixels` in their order; and images seen.

    The learning rate follows the clock, so that it has come to its end when the time has.
    """
    items = items_of(sheet)
    targets = targets_of(items, sheet)
    torch.manual_seed(seed)
    model = Specialist(items, pixels.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.98), weight_decay=DECAY, fused=True)
    generator = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    images_trained, started = 0, time.perf_counter()
    model.train()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        if len(order) < BATCH:
            order = np.concatenate([order, generator.permutation(len(pixels))])
        rows, order = np.sort(order[:BATCH]), order[BATCH:]
        changes = draw_changes(generator, len(rows), pixels.shape[1])
        shown_BSSC = apply_changes(torch.from_numpy(pixels[rows]), changes)
        warm = min(1.0, share / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out_BH = model(normalise(shown_BSSC, image_processor))
        _loss(model, out_BH, targets, torch.from_numpy(rows), torch.from_numpy(changes.mirror)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        images_trained += len(rows)
    return model.eval(), images_trained


@torch.inference_mode()
def answer(model: Specialist, sheet: Sheet, pixels: NDArray[np.uint8], image_processor: Any) -> list[str | None]:
    """Answers to the questions of a sheet in their own form, in its order; None to what has no head."""
    blocks = (torch.from_numpy(pixels[at : at + 256]) for at in range(0, len(pixels), 256))
    out_BH = torch.cat([model(normalise(block, image_processor)) for block in blocks])
    said: list[str | None] = [None] * len(sheet.answers)
    for item, part in zip(model.items, out_BH.split([item.width for item in model.items], dim=1), strict=True):
        for row in sheet.rows.get(item.key, ()):
            own = part[sheet.faces[row]]
            if item.values:
                said[row] = item.values[int(own.argmax())]
            else:
                said[row] = f"{min(max(float(own[0]) * item.spread + item.mean, item.low), item.high):.4f}"
    return said
