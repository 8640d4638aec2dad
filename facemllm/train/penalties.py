"""Losses of the characteristics' scores: cross-entropy where a label is known, and penalties of broken relations.

FaceInsight's logic loss is not published. A penalty here is the probability that a relation is broken when each
characteristic is true with its own probability, independent of the others: one minus the probability inside the
semantic loss of Xu and others (ICML 2018, arXiv 1711.11157), bounded, and so weighed alike for all kinds. It is
multilinear in the probabilities, and never thresholded: it has a gradient wherever one can mend.
Legend: B rows, A characteristics, R relations, K members of the largest relation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from facemllm.tasks.characteristics import UNKNOWN, Characteristics
from facemllm.tasks.relations import Kind, Relation

_BROKEN: Mapping[Kind, tuple[float, float, float]] = {
    "exclusive": (1.0, -1.0, -1.0),
    "exactly_one": (1.0, 0.0, -1.0),
    "at_least_one": (0.0, 1.0, 0.0),
    "excludes": (1.0, -1.0, 0.0),
    "implies": (0.0, 1.0, 0.0),
}
"""How likely a relation is broken where its `given` is true: weights of 1, of none of its names being true, of one."""


class Penalties(nn.Module):
    """The penalty of each relation that the names of the characteristics can tell; `relations` are those, in order. Its
    tensors move with the module and are no part of its state."""

    members_RK: Tensor
    given_R: Tensor
    weights_R3: Tensor

    def __init__(self, relations: Iterable[Relation], names: Sequence[str]) -> None:
        super().__init__()
        self.relations = _within(relations, names)
        places = {name: place for place, name in enumerate(names)}
        nothing, certain = len(names), len(names) + 1  # columns of probability 0 and 1, for what a relation lacks
        widest = max((len(relation.names) for relation in self.relations), default=0)
        members = [
            [*(places[name] for name in relation.names), *[nothing] * (widest - len(relation.names))]
            for relation in self.relations
        ]
        given = [certain if relation.given is None else places[relation.given] for relation in self.relations]
        weights = [_BROKEN[relation.kind] for relation in self.relations]
        rows = len(self.relations)
        self.register_buffer("members_RK", torch.tensor(members).long().reshape(rows, widest), persistent=False)
        self.register_buffer("given_R", torch.tensor(given).long(), persistent=False)
        self.register_buffer("weights_R3", torch.tensor(weights).reshape(rows, 3), persistent=False)

    def forward(self, probability_BA: Tensor) -> Tensor:
        """Penalties (rows, relations) in 0..1, in single precision or better: 0 where a relation surely holds, 1 where
        it is surely broken."""
        probability_BA = _precise(probability_BA)
        ends_B2 = probability_BA.new_tensor([0.0, 1.0]).expand(len(probability_BA), 2)
        padded_BA = torch.cat([probability_BA, ends_B2], dim=1)
        member_BRK = padded_BA[:, self.members_RK]
        given_BR = padded_BA[:, self.given_R]
        none_BR = torch.ones_like(given_BR)
        one_BR = torch.zeros_like(given_BR)
        for p_BR in member_BRK.unbind(2):
            one_BR = one_BR * (1 - p_BR) + none_BR * p_BR
            none_BR = none_BR * (1 - p_BR)
        always_R, none_R, one_R = self.weights_R3.to(probability_BA.dtype).unbind(1)
        # rounding alone can take it below zero
        return (given_BR * (always_R + none_R * none_BR + one_R * one_BR)).clamp(min=0)


def bce(logits_BA: Tensor, labels_BA: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy summed over the known labels (1 true, 0 false, -1 unknown), and how many are known."""
    logits_BA = _precise(logits_BA)
    known_BA = labels_BA != UNKNOWN
    targets_BA = labels_BA.clamp(min=0).to(logits_BA.dtype)
    loss_BA = functional.binary_cross_entropy_with_logits(logits_BA, targets_BA, reduction="none")
    return torch.where(known_BA, loss_BA, 0.0).sum(), known_BA.sum()


@dataclass(frozen=True, kw_only=True)
class Audited:
    """On how many rows the labels tell enough to check a relation (`spoken`), and on how many they break it."""

    relation: Relation
    spoken: int
    broken: int

    @property
    def rate(self) -> float | None:
        """The share that is broken; None where no row can be checked."""
        return self.broken / self.spoken if self.spoken else None


def audit(relations: Iterable[Relation], characteristics: Characteristics) -> list[Audited]:
    """Hold the labels against every relation that the characteristics can tell."""
    true_RN, known_RN = characteristics.labels_RN == 1, characteristics.labels_RN != UNKNOWN
    places = {name: place for place, name in enumerate(characteristics.names)}
    found = []
    for relation in _within(relations, characteristics.names):
        spoken, broken = relation.check(places, true_RN, known_RN)
        found.append(Audited(relation=relation, spoken=int(spoken.sum()), broken=int((spoken & broken).sum())))
    return found


def enforced(audited: Iterable[Audited], limit: float) -> list[Relation]:
    """The relations that at most this share of the labels break, without those that one before them forces anyway. One
    that no label could be held against is not enforced: nothing vouches for it."""
    kept: list[Relation] = []
    for found in audited:
        borne = found.rate is not None and found.rate <= limit
        if borne and not any(relation.forces(found.relation) for relation in kept):
            kept.append(found.relation)
    return kept


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _within(relations: Iterable[Relation], names: Sequence[str]) -> tuple[Relation, ...]:
    known = set(names)
    return tuple(left for relation in relations if (left := relation.within(known)) is not None)
