"""The test of a gap between two groups of people: a score test, clustered by person.

A figure is a weighted mean over parts k (items, or items and classes) of ratios R_k = sum(num_k) / sum(den_k) of sums
over people. Where it makes no difference who belongs to which group, both share one ratio R0_k; a person's residual is
r_ik = num_ik - R0_k den_ik, and the gap sum_k w_k (R_ak - R_bk) has the variance V_a + V_b, where
V_g = sum_i c_gi (sum_k w_k r_ik / sqrt(D_gk E_gk))^2 with D_gk the group's sum of den and E_gk = sum_i c_gi den_ik.
The sum is over the people of both groups, each standing for c_gi people of g with as many pictures (by powers of two):
a small group in which nobody is wrong knows no variance of its own, and people of many pictures vary less for each
than people of one. Degrees of freedom: Welch and Satterthwaite. Rao 1948 (score tests); Boos 1992, The American
Statistician 46(4) (their form when answers are clustered). Sizes and power: `benchmarks/fairness_power.py`.

Legend: ... draws of a simulation, N memberships (a person in a group), K parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facemllm.scoring.metrics import Array

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Memberships:
    """People in two groups: their sums, whether they are in the `first`, how many pictures they have there. Who is in
    both has two memberships, whose places are `twice` (2, people). All but `twice` may have draws in front."""

    num_NK: Array
    den_NK: Array
    first_N: Mask
    pictures_N: Places
    twice: Places | None = None


@dataclass(frozen=True)
class Gap:
    """Gaps, first minus second, of every draw: their standard `error` if there is none in truth, `own_error` if it is
    what is seen, the degrees of freedom of their t test, and the `figure` of both groups together."""

    value: Array
    error: Array
    own_error: Array
    degrees: Array
    figure: Array

    def growth(self, *, share: bool) -> Array:
        """How the variance grows with a gap d in truth (2, ...): by b d - c d^2 of itself. That of a share f is as
        f (1 - f), that of an error in units as its square (here up to d^2); half of it lies in the group worse by d."""
        f = self.figure
        twice = 2 * f * (1 - f)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.stack([(2 * f - 1) / twice, 1 / twice] if share else [1 / f, 0 * f])
        return np.where((found[0] > 0) & np.isfinite(found).all(0), found, 0.0)


def measure(of: Memberships, weights_K: Array) -> Gap:
    """The gap of two groups. `weights` add up to one and are zero where a part does not occur in both."""
    sides: list[Array] = [of.first_N.astype(np.float64), (~of.first_N).astype(np.float64)]
    people = [side.sum(-1) for side in sides]
    num, den = ([np.einsum("...n,...nk->...k", side, sums) for side in sides] for sums in (of.num_NK, of.den_NK))
    den = [np.where(weights_K > 0, sums, 1.0) for sums in den]
    value = (weights_K * (num[0] / den[0] - num[1] / den[1])).sum(-1)
    pooled_K, total_K, asked_K = (num[0] + num[1]) / (den[0] + den[1]), den[0] + den[1], (of.den_NK > 0).sum(-2)
    scale_K = np.sqrt(asked_K / np.maximum(asked_K - 1, 1))  # the pooled ratio takes one of their degrees of freedom
    null_NK = (of.num_NK - pooled_K[..., None, :] * of.den_NK) * scale_K[..., None, :]
    # the same if the gap is in truth what is seen, alike in every part
    apart_NK = np.where(of.first_N[..., None], *((share / total_K)[..., None, :] for share in (den[1], -den[0])))
    own_NK = null_NK - value[..., None, None] * apart_NK * of.den_NK * scale_K[..., None, :]
    standing = [_standing_for(side, of.pictures_N) for side in sides]
    (one, two), own = (_variances(of, residuals, weights_K, den, standing) for residuals in (null_NK, own_NK))
    unsure = one**2 / np.maximum(people[0] - 1, 1) + two**2 / np.maximum(people[1] - 1, 1)
    everybody = people[0] + people[1]
    degrees = np.where(unsure > 0, (one + two) ** 2 / np.where(unsure > 0, unsure, 1.0), everybody - 2)
    own_error = np.sqrt(_total(of, own_NK, weights_K, den, *own) * everybody / (everybody - 1))
    error = np.sqrt(_total(of, null_NK, weights_K, den, one, two))
    return Gap(value, error, own_error, degrees, (weights_K * pooled_K).sum(-1))


def _standing_for(side_N: Array, pictures_N: Places) -> Array:
    """For how many people of a side each membership stands: as many as have about its number of pictures."""
    sizes_N = np.floor(np.log2(np.maximum(pictures_N, 1)))
    found = np.zeros(np.broadcast_shapes(side_N.shape, sizes_N.shape))
    for size in np.unique(sizes_N):
        alike = sizes_N == size
        ours = (side_N * alike).sum(-1) / np.maximum(alike.sum(-1), 1)
        found += alike * ours[..., None]
    return found


def _variances(
    of: Memberships, residual_NK: Array, weights_K: Array, den: list[Array], standing: list[Array]
) -> tuple[Array, Array]:
    found = []
    for den_K, standing_N in zip(den, standing, strict=True):
        expected_K = np.einsum("...n,...nk->...k", standing_N, of.den_NK)
        per_K = weights_K / np.sqrt(den_K * np.where(weights_K > 0, expected_K, 1.0))
        found.append((standing_N * np.einsum("...nk,...k->...n", residual_NK, per_K) ** 2).sum(-1))
    return found[0], found[1]


def _total(of: Memberships, residual_NK: Array, weights_K: Array, den: list[Array], one: Array, two: Array) -> Array:
    """Variance of the difference: people who are in both groups move them together."""
    if of.twice is None or not of.twice.size:
        return one + two
    first, second = (np.einsum("...nk,...k->...n", residual_NK, weights_K / den_K) for den_K in den)
    alone = np.sqrt((first**2 * of.first_N).sum(-1) * (second**2 * ~of.first_N).sum(-1))
    shared = (first[..., of.twice[0]] * second[..., of.twice[1]]).sum(-1) / np.where(alone > 0, alone, 1.0)
    return np.maximum(one + two - 2 * shared * np.sqrt(one * two), 0.0)
