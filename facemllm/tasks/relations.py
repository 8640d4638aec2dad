"""Logical relations between attributes of one face, read from `relations.yaml` beside this file.

After FaceInsight (arXiv 2504.15624), whose own list is not published; exclusion and dependency are the two kinds of
LogicalConsistency (github HaiyuWu/LogicalConsistency). Names are those of CelebA, MAAD-Face and LFWA. Labels break
some relations in practice, so the rate in the ground truth is measured beside the model's.
Legend: F faces, A attributes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from facemllm.errors import UserError, one_line

Mask = npt.NDArray[np.bool_]
Kind = Literal["exclusive", "exactly_one", "at_least_one", "excludes", "implies"]


class Relation(BaseModel):
    """`exclusive`: at most one of `names` is true; `exactly_one`, `at_least_one` of them; `excludes`: where `given` is
    true, none of `names` is; `implies`: where `given` is true, at least one of `names` is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    names: tuple[str, ...]
    given: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> Relation:
        conditional = self.kind in ("excludes", "implies")
        if conditional != (self.given is not None):
            raise ValueError(f"given: {self.kind} {'needs an attribute' if conditional else 'takes none'} here")
        if len(self.names) < (least := 1 if conditional else 2):
            raise ValueError(f"names: {self.kind} needs {least} or more")
        if len({*self.attributes}) < len(self.attributes):
            raise ValueError("names: an attribute stands here twice")
        return self

    @property
    def attributes(self) -> tuple[str, ...]:
        """Every attribute that it speaks of."""
        return self.names if self.given is None else (self.given, *self.names)

    def __str__(self) -> str:
        words = {"exclusive": "at most one of", "exactly_one": "exactly one of", "at_least_one": "at least one of"}
        listed = (" or " if self.kind == "implies" else ", ").join(self.names)
        return f"{words[self.kind]} {listed}" if self.given is None else f"{self.given} {self.kind} {listed}"

    def within(self, known: Container[str]) -> Relation | None:
        """What it still says where only `known` attributes are spoken of; None for nothing."""
        names = tuple(name for name in self.names if name in known)
        whole = names == self.names
        if self.given is not None and self.given not in known:
            return None
        if self.kind in ("at_least_one", "implies"):
            return self if whole else None
        if len(names) < (2 if self.given is None else 1):
            return None
        kind = "exclusive" if self.kind == "exactly_one" and not whole else self.kind
        return self.model_copy(update={"kind": kind, "names": names})

    def forces(self, other: Relation) -> bool:
        """Whether one true name at most, or exactly one, leaves the other relation no way to be broken."""
        places = {name: place for place, name in enumerate(self.names)}
        if self.kind not in ("exclusive", "exactly_one") or not places.keys() >= {*other.attributes}:
            return False
        true_FA = np.eye(len(places) + (self.kind == "exclusive"), len(places), dtype=bool)
        return not other.check(places, true_FA, np.ones_like(true_FA))[1].any()

    def check(self, places: Mapping[str, int], true_FA: Mask, known_FA: Mask) -> tuple[Any, Any]:
        """On which faces enough is known to check it, and on which what is true breaks it. `places` gives the column of
        each attribute; an unknown one must not be true."""
        names = [places[name] for name in self.names]
        true_FN, known_FN = true_FA[:, names], known_FA[:, names]
        if self.kind == "exclusive":
            return known_FN.sum(1) > 1, true_FN.sum(1) > 1
        if self.kind == "exactly_one":
            return known_FN.all(1), true_FN.sum(1) != 1
        if self.kind == "at_least_one":
            return known_FN.all(1), ~true_FN.any(1)
        given = places[str(self.given)]
        if self.kind == "excludes":
            return known_FA[:, given] & known_FN.any(1), true_FA[:, given] & true_FN.any(1)
        return known_FA[:, given] & known_FN.all(1), true_FA[:, given] & ~true_FN.any(1)


def load(path: Path) -> tuple[Relation, ...]:
    """The relations of a YAML file. Raises UserError naming file, entry (counted from 1) and key that is wrong."""
    try:
        entries: Any = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as relations: {one_line(error)}") from None
    try:
        found = TypeAdapter(tuple[Relation, ...]).validate_python(entries)
    except ValidationError as error:
        first = error.errors()[0]
        entry, keys = first["loc"][:1], ".".join(map(str, first["loc"][1:]))
        where = "".join([f": entry {int(place) + 1}" for place in entry] + ([f": {keys}"] if keys else []))
        raise UserError(f"{path}{where}: {first['msg'].removeprefix('Value error, ')}") from None
    said = [str(relation) for relation in found]
    for place, text in enumerate(said):
        if text in said[:place]:
            raise UserError(f"{path}: entry {place + 1}: names: entry {said.index(text) + 1} says the same")
    return found


RELATIONS = load(Path(__file__).with_name("relations.yaml"))
