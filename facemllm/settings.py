"""One configuration: `params.yaml`, overlaid by a profile and by `--set a.b=c`, read once into frozen typed settings.

`load("ci", ["training.workers=2"])` reads `params.yaml`, lays `profiles/ci.yaml` over it (mappings merge, anything else
replaces), then the overrides. An unknown key, a wrong type or an impossible value is refused with the key's path, the
file or flag it came from, and what would be allowed. Nothing else in the project reads configuration.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from facemllm.errors import UserError

PARAMS = "params.yaml"
PROFILES = "profiles"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Section(BaseModel):
    """Base of every settings block: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Storage(Section):
    """Where things are kept; relative paths start at the project folder."""

    home: str
    runs: str


class Source(Section):
    """One dataset: its key in the ledger, the folder it lies in (null for `render`), and its reader's options."""

    name: str
    root: str | None = None
    options: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = {}


class Data(Section):
    """Sources of faces, joined into one table, and the split by identity where a source has none of its own.

    `identities`, `images_per_identity` and `image_size` size the renderer; `max_side` bounds imported ones (pixels).
    Pictures whose perceptual hashes differ in at most `near_duplicate_bits` of 256 bits count as the same.
    """

    sources: Annotated[list[Source], Field(min_length=1)]
    ledger: str | None
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
    def _splits_leave_room(self) -> Data:
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


class Annotation(Section):
    """Who describes the faces, and how the Ray Data job is cut."""

    annotator: Literal["oracle", "endpoint", "local"]
    batch_size: Positive
    concurrency: Positive
    vision_language: VisionLanguage
    endpoint: Endpoint
    experts: Experts

    @model_validator(mode="after")
    def _annotator_is_described(self) -> Annotation:
        if self.annotator != "oracle" and self.vision_language.model is None:
            raise ValueError(f"annotator: {self.annotator} needs vision_language.model")
        if self.annotator == "endpoint" and self.endpoint.base_url is None:
            raise ValueError("annotator: endpoint needs endpoint.base_url, as in http://127.0.0.1:8000/v1")
        return self


Weight = Annotated[float, Field(ge=0)]


class Forms(Section):
    """How often a training question is asked in each way (`facemllm.tasks.asking`); evaluation asks in every way that
    has a weight. `dialogue` asks on where an answer opens a further question."""

    native: Annotated[float, Field(gt=0)]
    statement: Weight
    lettered: Weight
    dialogue: Weight


class Mixture(Section):
    """How many training faces of each source there are: at most `caps` by its name; then, with a temperature above 1,
    large sources are thinned towards equal shares (share of a source ~ faces ** (1 / temperature))."""

    caps: dict[str, Positive]
    temperature: Annotated[float, Field(ge=1)]


class Qa(Section):
    """Which tasks become questions, how they are asked, and of which faces.

    `reasons` says why a sensitive task is asked; without one it is refused. `held_out` names attributes that appear in
    no training conversation and are asked at evaluation alone, as the task `zero_shot` (Face-MLLM's zero-shot attribute
    analysis). `unseen_wordings`: evaluation also asks in wordings that training does not use. `balance`: yes/no
    questions whose answers are lopsided in a source are thinned (0 = not at all, 1 = to equal numbers).
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    reasons: dict[str, str | None]
    forms: Forms
    unseen_wordings: bool
    held_out: list[str]
    balance: Share
    mixture: Mixture


class Quality(Section):
    """Limits of the checks on the tables. The shares are of faces: with a caption, with attributes that exclude each
    other, with a caption that contradicts a label. A group that a filter thins by more than `group_loss` beyond the
    average is named."""

    min_rows: Positive
    min_box_pixels: Positive
    caption_share: Share
    contradiction_share: Share
    disagreement_share: Share
    group_loss: Share


class Versioning(Section):
    """The data repository (git + DVC) and its remote. null: folders under `storage.home`."""

    repository: str | None
    remote: str | None
    restore: str | None


class Segmentation(Section):
    """FaceInsight's segmentation branch. Its place in the configuration; not built yet, so it cannot be enabled."""

    enabled: bool
    mode: Literal["append", "add"]

    @model_validator(mode="after")
    def _not_yet(self) -> Segmentation:
        if self.enabled:
            raise ValueError("the segmentation branch is not built yet; set enabled: false (docs/limits.md)")
        return self


class Knowledge(Section):
    """FaceInsight's correlation and logic modules. Their place in the configuration; not built yet."""

    enabled: bool
    tau: Share
    omega: Share
    gcn_layers: Positive
    bce_weight: Annotated[float, Field(ge=0)]
    logic_weight: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _not_yet(self) -> Knowledge:
        if self.enabled:
            raise ValueError("the knowledge modules are not built yet; set enabled: false (docs/limits.md)")
        return self


class Model(Section):
    """The LLaVA-layout model: an embedded preset built from scratch, or a published base."""

    preset: Literal["tiny", "hub"]
    base: str | None
    image_size: Annotated[int, Field(ge=32, le=1024)]
    segmentation: Segmentation
    knowledge: Knowledge

    @model_validator(mode="after")
    def _base_matches_preset(self) -> Model:
        if (self.preset == "hub") != (self.base is not None):
            raise ValueError("preset: hub needs base: <hub id or folder>; preset: tiny takes base: null")
        return self


Trains = Literal["frozen", "lora", "full"]


class Trainable(Section):
    """What a stage may change, module by module."""

    tower: Trains
    projector: Trains
    embeddings: Trains
    language: Trains

    @model_validator(mode="after")
    def _lora_is_for_the_language_model(self) -> Trainable:
        for name in ("tower", "projector", "embeddings"):
            if getattr(self, name) == "lora":
                raise ValueError(f"{name}: lora is for the language model alone; choose frozen or full")
        if {self.tower, self.projector, self.embeddings, self.language} == {"frozen"}:
            raise ValueError("a stage must train something; every module is frozen")
        return self


class Lora(Section):
    """Low-rank adapters of the language model, merged before a stage is written."""

    rank: Positive
    alpha: Positive
    dropout: Share


class Stage(Section):
    """One training stage as data. Learning rates are per optimiser step; `steps` counts optimiser steps.

    `tasks` weighs each turn of a task in the draw of `turns_per_image` turns of a face; `batch_images` is over all
    workers. `objective: caption_words` predicts the caption's words from the mean image token through the tied word
    embeddings (no language-model pass); `answers` is the next-token loss on answer tokens.
    """

    trains: Trainable
    tasks: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    objective: Literal["caption_words", "answers"]
    steps: Positive
    batch_images: Positive
    turns_per_image: Positive
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    tower_rate: Share
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["cosine", "warmup_stable_decay"]
    warmup: Share
    decay: Share
    clip: Annotated[float, Field(gt=0)]
    augment: bool


class Stages(Section):
    """The three stages of Face-MLLM, in order."""

    align: Stage
    instruct: Stage
    specialize: Stage


class Training(Section):
    """How training is launched. `threads: 0` shares the cores among the workers."""

    workers: Positive
    threads: Annotated[int, Field(ge=0)]
    use_gpu: bool
    precision: Literal["auto", "bf16", "fp32"]
    checkpoint_every: Positive
    max_failures: Annotated[int, Field(ge=0)]
    lora: Lora
    stages: Stages


class Evaluation(Section):
    """Predictions on held-out identities and their statistics.

    Of `generated_faces` faces the closed questions are also answered by free generation, to compare; `disturbed_faces`
    faces are asked again blurred, dark, as poor JPEG and occluded. A group of fewer than `min_group` people gets no
    fairness figure.
    """

    split: Literal["validation", "test"]
    batch_images: Positive
    bootstrap: Annotated[int, Field(ge=100)]
    baseline_pixels: Annotated[int, Field(ge=8, le=64)]
    max_new_tokens: Positive
    generated_faces: Annotated[int, Field(ge=0)]
    disturbed_faces: Annotated[int, Field(ge=0)]
    min_group: Annotated[int, Field(ge=2)]


class Threshold(Section):
    """What a figure must reach. It stands under `task`, `task.item` or `closed_mean`."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Threshold:
        if (self.min is None) == (self.max is None):
            raise ValueError("give exactly one of min and max")
        return self


class Promotion(Section):
    """What the gate asks for, and how long a run waits for a person.

    A threshold of null is not asked for. `every_task` refuses a model when the data hold no label of a task in
    `qa.tasks`; else such a task is left out. `fairness_gap` is the largest difference between two groups of people that
    a task may be shown to have, in the task's own unit; null is not asked for. `champion_margin` is in the figure's own
    unit for shares, and a share of the champion's error for errors.
    """

    model_name: str
    thresholds: dict[str, Threshold | None]
    above_majority: bool
    every_task: bool
    fairness_gap: dict[str, Annotated[float, Field(gt=0)] | None]
    champion_margin: Annotated[float, Field(ge=0)]
    wait_minutes: Annotated[float, Field(ge=0)]


class Tracking(Section):
    """MLflow. `uri: null` means the local server that `facemllm services` keeps."""

    uri: str | None
    experiment: str


RAY_PORTS = 320


class Services(Section):
    """Ports of a laptop run, on loopback; Ray, which cannot be kept there, takes `ray_port` and the 320 after it."""

    mlflow_port: Port
    ray_port: Port
    staging_port: Port
    production_port: Port
    start_timeout_s: Positive

    @model_validator(mode="after")
    def _ports_differ(self) -> Services:
        ports = [self.mlflow_port, self.ray_port, self.staging_port, self.production_port]
        if len(set(ports)) < len(ports):
            raise ValueError("each service needs a port of its own")
        rays = range(self.ray_port, self.ray_port + RAY_PORTS + 1)
        if rays.stop > 65536 or any(port in rays for port in ports if port != self.ray_port):
            raise ValueError(f"Ray takes ports {rays.start} to {rays.stop - 1}; keep the others out, below 65536")
        return self


class Serving(Section):
    """Limits of the model server. `max_pixels` is for all images of one request together."""

    max_body_mb: Annotated[float, Field(gt=0)]
    max_pixels: Positive
    max_question_chars: Positive
    max_instances: Positive
    batch_size: Positive
    threads: Positive


class Cost(Section):
    """Rates for the cost report; null leaves the price out."""

    price_per_hour: Annotated[float, Field(ge=0)] | None


class Size(Section):
    """What one task of the pipeline asks a cluster for."""

    cpu: str
    memory: str
    gpus: Annotated[int, Field(ge=0)]


class Cluster(Section):
    """What only Kubeflow on a cluster needs: image, shared workspace, sizes of tasks."""

    image: str
    workspace_claim: str
    steps: Size
    training: Size


class Settings(Section):
    """Everything a run needs to know. `profile` is the name it was loaded under."""

    profile: str = "laptop"
    seed: int
    storage: Storage
    data: Data
    annotation: Annotation
    qa: Qa
    quality: Quality
    versioning: Versioning
    model: Model
    training: Training
    evaluation: Evaluation
    promotion: Promotion
    tracking: Tracking
    services: Services
    serving: Serving
    cost: Cost
    cluster: Cluster

    @model_validator(mode="after")
    def _stages_train_on_known_tasks(self) -> Settings:
        for name, stage in self.stages().items():
            if missing := set(stage.tasks) - set(self.qa.tasks):
                raise ValueError(f"training.stages.{name}.tasks names {sorted(missing)}, absent from qa.tasks")
        return self

    def stages(self) -> dict[str, Stage]:
        """The training stages by name, in order."""
        return {name: getattr(self.training.stages, name) for name in Stages.model_fields}

    @property
    def home(self) -> Path:
        """Folder of the store, caches and local services, absolute."""
        return (root() / self.storage.home).resolve()

    @property
    def runs(self) -> Path:
        """Folder of run folders, absolute."""
        return (root() / self.storage.runs).resolve()


def root() -> Path:
    """The project folder: the nearest one upward from the working directory that holds `params.yaml`."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / PARAMS).is_file():
            return folder
    raise UserError(f"no {PARAMS} here or above {Path.cwd()}; run this inside the project folder")


def load(profile: str = "laptop", overrides: Sequence[str] = ()) -> Settings:
    """Read `params.yaml`, the profile and the overrides (`a.b=value`, value in YAML) into settings.

    Raises UserError naming the key, where it was set and what is allowed.
    """
    folder = root()
    if Path(profile).name != profile:
        raise UserError(f"--profile {profile!r}: give the plain name of a file in {PROFILES}/")
    values = _read(folder / PARAMS)
    origins = dict.fromkeys(_leaves(values), PARAMS)
    overlay = folder / PROFILES / f"{profile}.yaml"
    if not overlay.is_file():
        known = sorted(p.stem for p in (folder / PROFILES).glob("*.yaml"))
        raise UserError(f"no profile '{profile}' ({PROFILES}/{profile}.yaml); choose one of {', '.join(known)}")
    over = _read(overlay)
    origins |= dict.fromkeys(_leaves(over), f"{PROFILES}/{profile}.yaml")
    values = _merge(values, over)
    for text in overrides:
        key, value = _parse_override(text)
        origins[key] = f"--set {text}"
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
    values["profile"] = profile
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, origins)) from None


def digest_text(settings: Section | Mapping[str, Any]) -> str:
    """Canonical JSON of a settings block: what a step's key is made from."""
    data = settings.model_dump() if isinstance(settings, BaseModel) else settings
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path.name}{where}: not valid YAML; {getattr(error, 'problem', error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path.name}: expected a mapping of settings, found {type(data).__name__}")
    return data


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        keys.append(path)
        if isinstance(value, Mapping):
            keys += _leaves(value, f"{path}.")
    return keys


def _parse_override(text: str) -> tuple[str, Any]:
    key, found, raw = text.partition("=")
    if not found or not all(key.strip().split(".")):
        raise UserError(f"--set {text}: expected KEY=VALUE, as in --set training.workers=2")
    try:
        return key.strip(), yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML") from None


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = next((origins[k] for k in _upward(key) if k in origins), PARAMS)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), _allowed(first["loc"][:-1]), n=1)
        message = "unknown key" + (f"; did you mean '{close[0]}'?" if close else "")
    elif first["type"] == "missing":
        message = "is required and missing"
    elif "input" in first and not isinstance(first["input"], Mapping | BaseModel):
        message += f" (found {first['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {key or 'settings'}: {message}{more}"


def _upward(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _allowed(location: Sequence[str | int]) -> list[str]:
    model: Any = Settings
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))
