"""One configuration: `params.yaml`, overlaid by a profile and by `--set a.b=c`, read once into frozen typed settings.

`load("ci", ["train.workers=2"])` reads `params.yaml`, lays `profiles/ci.yaml` over it (mappings merge, anything else
replaces), then the overrides. An unknown key, a wrong type or an impossible value is refused with the key's path, the
file or flag it came from, and what would be allowed. Nothing else in the project reads configuration.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from facemllm.errors import UserError
from facemllm.settings.cluster import GROUPS, Cluster
from facemllm.settings.data import Annotate, Ingest, Reformat, Section, Storage, Validate, Version
from facemllm.settings.mappings import empties, leaves, merge, parse_override, read_mapping
from facemllm.settings.operations import Cost, Evaluate, Promote, Services, Tracking
from facemllm.settings.serve import Serve
from facemllm.settings.train import STEP_NAMES, Model, Stage, Train

PARAMS = "params.yaml"
ON_CLUSTER = "@cluster"
"""In place of an override: all of the profile's `cluster.overrides`, as the pods of a run have them."""
PROFILES = "profiles"
REPORTS = "forgotten"
"""Folder under `storage.home` with a report of everything that was forgotten."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[^/]+:")
_FORMER = {
    **{"data": "ingest", "annotation": "annotate", "qa": "reformat", "quality": "validate", "versioning": "version"},
    **{
        "above_majority": "above_constant",
        "training": "train",
        "evaluation": "evaluate",
        "promotion": "promote",
        "serving": "serve",
    },
}

warnings.filterwarnings("ignore", 'Field name "validate" in "Settings" shadows', UserWarning)


class Settings(Section):
    """Everything a run needs to know. `profile` is the name it was loaded under."""

    profile: str = "laptop"
    seed: int
    storage: Storage
    ingest: Ingest
    annotate: Annotate
    reformat: Reformat
    validate: Validate  # type: ignore[assignment]  # hides a deprecated method of pydantic that nothing calls
    version: Version
    model: Model
    train: Train
    evaluate: Evaluate
    promote: Promote
    tracking: Tracking
    services: Services
    serve: Serve
    cost: Cost
    cluster: Cluster

    @model_validator(mode="after")
    def _stages_train_on_known_tasks(self) -> Settings:
        for name, stage in self.stages().items():
            if missing := set(stage.tasks) - set(self.reformat.tasks):
                raise ValueError(f"train.stages.{name}.tasks names {sorted(missing)}, absent from reformat.tasks")
        knowledge = self.model.knowledge
        if knowledge.enabled and (missing := set(knowledge.tasks) - set(self.reformat.tasks)):
            raise ValueError(f"model.knowledge.tasks names {sorted(missing)}, absent from reformat.tasks")
        return self

    @model_validator(mode="after")
    def _pods_are_of_steps(self) -> Settings:
        known = [*GROUPS, *STEP_NAMES, *self.stages()]
        for name in self.cluster.steps:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else f"; give one of {', '.join(sorted(known))}"
                raise ValueError(f"cluster.steps.{name}: there is no such step{hint}")
        return self

    def stages(self) -> dict[str, Stage]:
        """The training stages by name, in order."""
        return dict(self.train.stages)

    @property
    def home(self) -> Path:
        """Folder of the store, caches and local services, absolute."""
        return (root() / self.storage.home).resolve()

    @property
    def runs(self) -> Path:
        """Folder of run folders, absolute."""
        return (root() / self.storage.runs).resolve()

    @property
    def signing(self) -> Path:
        """Folder of the keys of this machine, of its own policy and decisions, and of the checkpoint, absolute."""
        return self.home / "signing"

    @property
    def policy_file(self) -> Path:
        """The file that says who may decide: `promote.policy`, else the laptop's own."""
        given = self.promote.policy
        return self.signing / "policy.yaml" if given is None else (root() / given).resolve()

    @property
    def decisions(self) -> str | Path:
        """The decisions repository: the address or path of `promote.decisions`, else the laptop's own folder."""
        given = self.promote.decisions
        if given is None:
            return self.signing / "decisions"
        return given if is_address(given) else (root() / given).resolve()

    @property
    def corrections(self) -> Path | None:
        """The folder of corrections that users of the server sent; None where none are taken."""
        given = self.serve.feedback.folder
        return None if given is None else (root() / given).resolve()

    @property
    def answers(self) -> Path:
        """The folder of answers that `serve.retention` keeps."""
        return self.home / "answers"

    @property
    def checkpoint(self) -> Path:
        """The file that remembers the newest history of decisions seen."""
        return self.signing / "checkpoint.json"


def is_address(place: str) -> bool:
    """Whether git would take this for an address (`https://...`, `host:path`) and not for a path."""
    return _ADDRESS.match(place) is not None


def root() -> Path:
    """The project folder: the nearest one upward from the working directory that holds `params.yaml`."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / PARAMS).is_file():
            return folder
    raise UserError(f"no {PARAMS} here or above {Path.cwd()}; run this inside the project folder")


def load(profile: str = "laptop", overrides: Sequence[str] = ()) -> Settings:
    """Read `params.yaml`, the profile and the overrides (`a.b=value`, value in YAML; `@cluster` stands for all of the
    profile's `cluster.overrides`) into settings.

    Raises UserError naming the key, where it was set and what is allowed.
    """
    folder = root()
    if Path(profile).name != profile:
        raise UserError(f"--profile {profile!r}: give the plain name of a file in {PROFILES}/")
    values = read_mapping(folder / PARAMS)
    origins = dict.fromkeys(leaves(values), PARAMS)
    overlay = folder / PROFILES / f"{profile}.yaml"
    if not overlay.is_file():
        known = sorted(p.stem for p in (folder / PROFILES).glob("*.yaml"))
        raise UserError(f"no profile '{profile}' ({PROFILES}/{profile}.yaml); choose one of {', '.join(known)}")
    over = read_mapping(overlay)
    origins |= dict.fromkeys(leaves(over), f"{PROFILES}/{profile}.yaml")
    values = merge(values, over)
    for text in _laid_out(profile, overrides):
        parts, value = parse_override(text, values)
        key = ".".join(parts)
        below = leaves(value, f"{key}.") if isinstance(value, Mapping) else []
        origins = {k: v for k, v in origins.items() if k != key} | dict.fromkeys([key, *below], f"--set {text}")
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        if empties(values, nested):
            raise UserError(f"--set {text}: an empty mapping changes nothing; set its keys one by one")
        values = merge(values, nested)
    values["profile"] = profile
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, origins)) from None


def _laid_out(profile: str, overrides: Sequence[str]) -> Iterator[str]:
    for place, text in enumerate(overrides):
        if text == ON_CLUSTER:
            laid = load(profile, overrides[:place]).cluster.overrides
            yield from (f"{key}={json.dumps(value)}" for key, value in laid.items())
        else:
            yield text


def plain() -> Settings:
    """What `params.yaml` says by itself: no profile, no override. Raises UserError as `load` does."""
    values = read_mapping(root() / PARAMS)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, dict.fromkeys(leaves(values), PARAMS))) from None


def serving(given: Mapping[str, Any], origin: str) -> Serve:
    """The section `serve` with these keys, the others as in `params.yaml`. Raises UserError as `load` does."""
    values = dict(given)
    with suppress(ValidationError):  # whole: it needs no params.yaml, which a server may not have
        return Serve.model_validate(values)
    values = merge(plain().serve.model_dump(), given)
    try:
        return Serve.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, dict.fromkeys(leaves(values), origin))) from None


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    first, spoken_of = error.errors()[0], 1
    location = [part for part in first["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _allowed(location[:-1]), n=1)
        message = "unknown key" + (f"; did you mean '{close[0]}'?" if close else "")
        if location[:2] == ["promote", "thresholds"]:
            message += f"""; a figure of an item is set as 'promote.thresholds."{location[2]}.ITEM".max=VALUE'"""
        if now := _FORMER.get(str(location[-1])):
            message = f"unknown key; {location[-1]} is now {now}"
    elif first["type"] in ("model_type", "dict_type"):
        keys = ", ".join(_allowed(location))
        message = f"is a section; set one of its keys{': ' if keys else ''}{keys} (found {first['input']!r})"
    elif first["type"] == "missing":
        message = "is required and missing"
        lacks = [e["loc"] for e in error.errors() if e["type"] == "missing" and e["loc"][:-1] == first["loc"][:-1]]
        if len(lacks) > 1:
            message = f"required and missing: {', '.join(str(one[-1]) for one in lacks)}"
            key, spoken_of = key.rpartition(".")[0], len(lacks)
    elif "input" in first and not isinstance(first["input"], Mapping | BaseModel):
        message += f" (found {first['input']!r})"
    more = f" (and {error.error_count() - spoken_of} more)" if error.error_count() > spoken_of else ""
    return f"{_where(key, message, origins)}: {key or 'settings'}: {message}{more}"


def _where(key: str, message: str, origins: Mapping[str, str]) -> str:
    """Who set a key: of a section as a whole, the last --set within it; of all settings, the last that is spoken of."""
    for name, origin in reversed(list(origins.items())):
        if origin.startswith("--set") and (name.startswith(f"{key}.") if key else name in message):
            return origin
    upward = reversed([*accumulate(key.split("."), "{}.{}".format)])
    return next((origins[name] for name in upward if name in origins), PARAMS)


def _allowed(location: Sequence[str | int]) -> list[str]:
    model: Any = Settings
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else next(iter(get_args(model)[-1:]), None)
        if isinstance(model, UnionType):
            model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
