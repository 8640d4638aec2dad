"""How often the test of a gap between two groups of people (`facemllm.scoring.gaps`) shows one: where there is none
(its size, .05 by right) and where one is injected (its power), for every kind of metric.

Two pictures a person, who is read well or badly as a whole: abilities differ from person to person. A gap is in points
of the figure, or in per cent of the mean error for errors in units. `detectable` is the mean minimum detectable
difference at .05, and `at it` the power at this gap, .80 by right.

    python -m benchmarks.fairness_power --draws 4000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.common import report
from facemllm.scoring import stats
from facemllm.scoring.gaps import Gap, Memberships, measure

Array = np.ndarray[Any, np.dtype[Any]]
PICTURES = 2
GROUPS = ((20, 100), (40, 40), (80, 80), (160, 160))
GAPS = (0.10, 0.15, 0.20)
MEAN_ERROR = 8.0
CLASSES = ((0.8, 0.2), (0.6, 0.3, 0.1), (0.5, 0.25, 0.15, 0.1), (0.4, 0.25, 0.15, 0.1, 0.05, 0.05))
"""Shares of the classes of the items that the balanced accuracy is over."""


def _able(random: np.random.Generator, level: Array) -> Array:
    """Abilities of people around a level, from 0 to 1: their answers to one question correlate by some 0.1."""
    return random.beta(8 * level, 8 * (1 - level))


def accuracy(random: np.random.Generator, lower: Array) -> tuple[Array, Array]:
    right = random.binomial(PICTURES, _able(random, 0.85 - lower)).astype(float)
    return right[..., None], np.full((*right.shape, 1), float(PICTURES))


def balanced_accuracy(random: np.random.Generator, lower: Array) -> tuple[Array, Array]:
    able, nums, dens = _able(random, 0.85 - lower), [], []
    for shares in CLASSES:
        asked = np.eye(len(shares))[random.choice(len(shares), size=lower.shape, p=shares)]
        nums.append(asked * random.binomial(PICTURES, able)[..., None])
        dens.append(asked * PICTURES)
    return np.concatenate(nums, -1), np.concatenate(dens, -1)


def units(random: np.random.Generator, lower: Array) -> tuple[Array, Array]:
    scale = MEAN_ERROR * (1 + lower) * random.gamma(4, 0.25, lower.shape) / np.sqrt(2 / np.pi)
    return (abs(random.normal(size=(PICTURES, *lower.shape))).sum(0) * scale)[..., None], np.full(
        (*lower.shape, 1), 2.0
    )


def facts(random: np.random.Generator, lower: Array) -> tuple[Array, Array]:
    able, nums, dens = _able(random, 0.72 - lower), 0.0, 0.0
    for _ in range(PICTURES):
        true, more = random.integers(8, 11, lower.shape), random.integers(-1, 2, lower.shape)
        shared = random.binomial(true, able)
        nums, dens = nums + 2.0 * shared, dens + true + np.maximum(true + more, shared)
    return np.asarray(nums)[..., None], np.asarray(dens)[..., None]


KINDS: dict[str, Callable[[np.random.Generator, Array], tuple[Array, Array]]] = {
    "balanced accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "error in units": units,
    "fact F1": facts,
}


def drawn(kind: str, draws: int, first: int, second: int, gap: float | Array = 0.0, seed: int = 0) -> Gap:
    """Gaps of `draws` test sets of so many people in two groups, the first worse by `gap`."""
    inside = np.broadcast_to(np.arange(first + second) < first, (draws, first + second))
    lower = np.where(inside, np.asarray(gap)[..., None], 0.0)
    num, den = KINDS[kind](np.random.default_rng(seed), lower)
    asked = [(den * side[..., None]).any(-2) for side in (inside, ~inside)]
    return measure(Memberships(num, den, inside, np.full(inside.shape, PICTURES)), weights(kind, asked[0] & asked[1]))


def weights(kind: str, known: Array) -> Array:
    """Weights of a macro mean over the parts that both groups have."""
    sizes = [len(shares) for shares in CLASSES] if kind == "balanced accuracy" else [1]
    item = np.repeat(np.arange(len(sizes)), sizes)
    of_item = np.stack([known[..., item == one].sum(-1) for one in range(len(sizes))], -1)
    return known / np.maximum(of_item, 1)[..., item] / (of_item > 0).sum(-1, keepdims=True)


def shown(gap: Gap, beyond: float = 0.0) -> Array:
    """In which draws p is below .05 that the gap exceeds `beyond`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * t.sf(np.maximum(abs(gap.value) - beyond, 0) / gap.error, gap.degrees) < 0.05


def detectable(kind: str, gap: Gap) -> float:
    """The mean minimum detectable difference at .05."""
    sure = zip(gap.error, gap.degrees, gap.growth(share=kind != "error in units").T, strict=True)
    return float(
        np.mean([stats.minimum_detectable_difference(error, df, growth=growth) for error, df, growth in sure if error])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    draws = parser.parse_args().draws
    print("| metric | people | size | " + " | ".join(f"gap {gap:.2f}" for gap in GAPS) + " | detectable | at it |")
    print("|---|---|---|" + "---|" * (len(GAPS) + 2))
    sizes = []
    for kind in KINDS:
        for first, second in GROUPS:
            none = drawn(kind, draws, first, second)
            sizes.append(float(shown(none).mean()))
            power = [shown(drawn(kind, draws, first, second, gap, seed)).mean() for seed, gap in enumerate(GAPS, 1)]
            size = detectable(kind, none)
            at_it = shown(drawn(kind, draws, first, second, size / (MEAN_ERROR if kind == "error in units" else 1), 9))
            cells = [f"{share:.3f}"[1:] if share < 0.9995 else "1" for share in (sizes[-1], *power)]
            print(f"| {kind} | {first}, {second} | {' | '.join(cells)} | {size:.3g} | {at_it.mean():.2f} |", flush=True)
    report("test of a gap between groups", {"least_size": min(sizes), "most_size": max(sizes)}, ["numpy"], draws=draws)


if __name__ == "__main__":
    main()
