"""What all settings share, and those of the data: sources, annotation, questions, checks, versions."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every settings block: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def seconds(text: str) -> float:
    """A time such as 12h or 7d in seconds. Raises ValueError for another form, and below an hour: that long a result
    may be made, and nothing name it yet."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([hd])", text.strip())
    if found is None or (time := float(found[1]) * {"h": 3600, "d": 86_400}[found[2]]) < 3600:
        raise ValueError("give a time of an hour or more, as in 12h or 7d")
    return time


class Storage(Section):
    """Where things are kept; relative paths start at the project folder. `facemllm gc` leaves what was used in the time
    `gc_older_than`."""

    home: str
    runs: str
    gc_older_than: str

    @field_validator("gc_older_than")
    @classmethod
    def _a_time(cls, value: str) -> str:
        seconds(value)
        return value


class Source(Section):
    """One dataset: its key in the ledger, the folder it lies in (null for `render`), and its reader's options."""

    name: str
    root: str | None = None
    options: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = {}


class Ingest(Section):
    """Sources of faces, joined into one table, and the split by identity where a source has none of its own.

    `identities`, `images_per_identity` and `image_size` size the renderer; `max_side` bounds imported ones (pixels).
    `links` are folders beside a source's own that links in it may lead to: DVC's cache, a hub's blobs.
    Pictures whose perceptual hashes differ in at most `near_duplicate_bits` of 256 bits count as the same.
    """

    sources: Annotated[list[Source], Field(min_length=1)]
    ledger: str | None
    links: list[str]
    max_side: Annotated[int, Field(ge=32, le=4096)]
    near_duplicate_bits: Annotated[int, Field(ge=0, le=15)]
    identities: Positive
    images_per_identity: Positive
    image_size: Annotated[int, Field(ge=32, le=1024)]
    validation_share: Share
    test_share: Share
    workers: Annotated[int, Field(ge=0)]
    shard_mb: Positive

    @model_validator(mode="after")
    def _splits_leave_room(self) -> Ingest:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must leave a training split (sum below 1)")
        return self


class VisionLanguage(Section):
    """The model that looks and describes: its name at an endpoint, or a folder or hub id for `local`."""

    model: str | None
    max_tokens: Positive
    temperature: Annotated[float, Field(ge=0, le=2)]
    image_side: Annotated[int, Field(ge=32, le=2048)]


class Endpoint(Section):
    """An OpenAI-compatible API. The key is read from the environment variable `key_variable`; prices are per million
    tokens; `max_requests` and `max_tokens` stop the job before it asks for more. `parallel` is of each Ray task."""

    base_url: str | None
    key_variable: str
    third_party: bool
    parallel: Positive
    timeout_s: Annotated[float, Field(gt=0)]
    retries: Annotated[int, Field(ge=0)]
    max_requests: Positive | None
    max_tokens: Positive | None
    input_price: Annotated[float, Field(ge=0)] | None
    output_price: Annotated[float, Field(ge=0)] | None


class Experts(Section):
    """Small models that fill what a source lacks; `models` is the folder of their weights."""

    fields: list[Literal["landmarks", "head_pose"]]
    models: str | None

    @model_validator(mode="after")
    def _need_weights(self) -> Experts:
        if self.fields and self.models is None:
            raise ValueError("fields needs models: <folder of MediaPipe's .tflite files>")
        return self


class Annotate(Section):
    """Who describes the faces, and how the Ray Data job is cut: `concurrency` tasks at once. `launcher: here` runs them
    in a Ray of the process's own or in that of RAY_ADDRESS; `rayjob` has the workflow's step make a RayJob of KubeRay
    with room for all of them, and wait for it."""

    annotator: Literal["oracle", "endpoint", "local"]
    batch_size: Positive
    concurrency: Positive
    launcher: Literal["here", "rayjob"]
    vision_language: VisionLanguage
    endpoint: Endpoint
    experts: Experts

    @model_validator(mode="after")
    def _annotator_is_described(self) -> Annotate:
        if self.annotator != "oracle" and self.vision_language.model is None:
            raise ValueError(f"annotator: {self.annotator} needs vision_language.model")
        if self.annotator == "endpoint" and self.endpoint.base_url is None:
            raise ValueError("annotator: endpoint needs endpoint.base_url, as in http://127.0.0.1:8000/v1")
        if self.annotator == "endpoint" and self.launcher == "rayjob":
            raise ValueError(
                "launcher: rayjob spreads tasks over machines, and those that ask an endpoint share its budget in a "
                "database of one machine; set launcher: here, where endpoint.parallel asks more at once"
            )
        return self


class Forms(Section):
    """Weights of the ways of asking (`facemllm.tasks.asking`) in training's draw of questions, those of an item's
    statements together; evaluation asks in every way that has a weight. `dialogue` asks on where an answer opens a
    further question."""

    native: Annotated[float, Field(gt=0)]
    statement: Weight
    lettered: Weight
    dialogue: Weight


class Mixture(Section):
    """How many training faces of each source there are: at most `caps` by its name; then, with a temperature above 1,
    large sources are thinned towards equal shares (share of a source ~ faces ** (1 / temperature))."""

    caps: dict[str, Positive]
    temperature: Annotated[float, Field(ge=1)]


class Reformat(Section):
    """Which tasks become questions, how they are asked, and of which faces.

    `reasons` says why a sensitive task is asked; without one it is refused. `held_out` names attributes that appear in
    no training conversation and are asked at evaluation alone, as the task `zero_shot` (Face-MLLM's zero-shot attribute
    analysis). Faces that show one of `held_out_combinations`, each two characteristics or more
    (`facemllm.tasks.characteristics`), are not trained on. `unseen_wordings`: evaluation also asks in wordings that
    training does not use. `balance`: yes/no questions whose answers are lopsided in a source are thinned (0 = not at
    all, 1 = to equal numbers).
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    reasons: dict[str, str | None]
    forms: Forms
    unseen_wordings: bool
    held_out: list[str]
    held_out_combinations: list[Annotated[list[str], Field(min_length=2)]]
    balance: Share
    mixture: Mixture

    @field_validator("tasks")
    @classmethod
    def _names_each_once(cls, tasks: list[str]) -> list[str]:
        if twice := sorted({name for name in tasks if tasks.count(name) > 1}):
            raise ValueError(f"names {', '.join(twice)} twice")
        return tasks

    @field_validator("held_out_combinations")
    @classmethod
    def _differ(cls, combinations: list[list[str]]) -> list[list[str]]:
        found = [frozenset(names) for names in combinations]
        for names, own in zip(combinations, found, strict=True):
            if len(own) < len(names) or found.count(own) > 1:
                raise ValueError(f"names {', '.join(names)} twice")
        return combinations


class Validate(Section):
    """Limits of the checks on the tables. The shares are of faces: with a caption, with attributes that exclude each
    other, with a caption that contradicts a label. A group that a filter thins by more than `group_loss` beyond the
    average is named."""

    min_rows: Positive
    min_box_pixels: Positive
    caption_share: Share
    contradiction_share: Share
    disagreement_share: Share
    group_loss: Share


class Version(Section):
    """The data repository (git + DVC) and its remote. null: folders under `storage.home`."""

    repository: str | None
    remote: str | None
    restore: str | None
