"""Settings of the model and of its training."""

from __future__ import annotations

import re
from math import isqrt
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from facemllm.settings.cluster import GROUPS
from facemllm.settings.data import Positive, Section, Share, Weight


def is_grid(tokens: int) -> bool:
    """Whether so many tokens are those of a square grid, or of one and a token of the whole."""
    return isqrt(tokens) ** 2 in (tokens, tokens - 1)


class Segmentation(Section):
    """FaceInsight's second visual input: a map of face parts, encoded by a small ViT of its own.

    `mode`: `none` (no branch), `append` (its tokens stand behind the image's) or `add` (they are added to them).
    The map is read at `side` pixels and cut into patches of `patch`; `width`, `layers` and `heads` are the encoder's.
    `tokens`, a square or a square and one, is how many `append` makes. `drop` is the share of training faces whose map
    is withheld, so that the model does without one too.
    """

    mode: Literal["none", "append", "add"]
    tokens: Positive
    drop: Share
    side: Annotated[int, Field(ge=8, le=512)]
    patch: Positive
    width: Positive
    layers: Positive
    heads: Positive

    @model_validator(mode="after")
    def _divides(self) -> Segmentation:
        if self.side % self.patch:
            raise ValueError(f"side: {self.side} is no multiple of patch: {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads: {self.heads}")
        if not is_grid(self.tokens):
            raise ValueError(f"tokens: {self.tokens} is neither a square nor a square and one, such as 9 or 10")
        return self


class Knowledge(Section):
    """FaceInsight's correlation and logic modules.

    Characteristics are the closed answers of `tasks`. `tau` drops edges of the co-occurrence graph, `omega` weighs the
    neighbours that are left, `gcn_layers` refine the characteristics' text embeddings along it. They give scores, with
    `bce_weight` in the loss, and `prompt_tokens` soft tokens to the language model. A logical relation that more than
    `audit` of the training labels break is not enforced; the others weigh `logic_weight`.
    """

    enabled: bool
    tasks: Annotated[list[str], Field(min_length=1)]
    tau: Share
    omega: Share
    gcn_layers: Positive
    prompt_tokens: Annotated[int, Field(ge=0, le=64)]
    bce_weight: Weight
    logic_weight: Weight
    audit: Share


TINY_STRIDE = 16
"""Pixels of an image to a pixel of what the tower of the preset `tiny` makes of it."""


class Model(Section):
    """The model. `preset`: `tiny` is built from scratch, `hub` is the published image-text model `base`, `parts` joins
    the vision tower `tower` and the language model `language`; each a hub id or a folder.

    `image_size` is the side of the pictures that a model is shown, pixels. For a `base` whose processor takes any
    (Qwen-VL, SmolVLM, LLaVA-NeXT and -OneVision) it decides how many tokens a picture becomes, and is noted in
    config.json; where the processor makes every picture of one size (Gemma, PaliGemma, InternVL), it must be no less.
    LLaVA-1.5 and `parts` go by their processor alone."""

    preset: Literal["tiny", "hub", "parts"]
    base: str | None
    tower: str | None
    language: str | None
    image_size: Annotated[int, Field(ge=32, le=1024)]
    segmentation: Segmentation
    knowledge: Knowledge

    @model_validator(mode="after")
    def _names_match_preset(self) -> Model:
        needed = {"tiny": [], "hub": ["base"], "parts": ["tower", "language"]}[self.preset]
        for name in ("base", "tower", "language"):
            if (getattr(self, name) is not None) != (name in needed):
                wanted = "<hub id or folder>" if name in needed else "null"
                raise ValueError(f"preset: {self.preset} takes {name}: {wanted}")
        if self.preset == "tiny" and self.image_size % TINY_STRIDE:
            raise ValueError(f"image_size: {self.image_size} is no multiple of {TINY_STRIDE}, as preset: tiny needs")
        return self

    @property
    def origin(self) -> str:
        """What training starts from, in words."""
        if self.preset == "parts":
            return f"{self.tower} and {self.language}"
        return self.base or "the embedded `tiny` preset, built from scratch"


Trains = Literal["frozen", "lora", "full"]


Module = Literal["tower", "projector", "segmentation", "knowledge", "embeddings", "language"]


class Trainable(Section):
    """What a stage may change, module by module."""

    tower: Trains
    projector: Trains
    segmentation: Trains
    knowledge: Trains
    embeddings: Trains
    language: Trains

    @model_validator(mode="after")
    def _lora_is_for_the_language_model(self) -> Trainable:
        modes = self.model_dump()
        for name, mode in modes.items():
            if mode == "lora" and name != "language":
                raise ValueError(f"{name}: lora is for the language model alone; choose frozen or full")
        if set(modes.values()) == {"frozen"}:
            raise ValueError("a stage must train something; every module is frozen")
        return self


class Lora(Section):
    """Low-rank adapters of the language model, merged before a stage is written."""

    rank: Positive
    alpha: Positive
    dropout: Share


STEP_NAMES = {
    *("ingest", "annotate", "reformat", "validate", "version", "evaluate"),
    *("gate", "register", "deploy", "await_approval", "release"),
}
"""Of the other steps, which a stage cannot have."""


class Stage(Section):
    """One training stage as data. Learning rates are per optimiser step; `steps` counts optimiser steps.

    `tasks` weighs each turn of a task in the draw of `turns_per_image` turns of a face; `batch_images` is over all
    workers. `objective: caption_words` predicts the caption's words from the mean image token through the tied word
    embeddings (no language-model pass); `answers` is the next-token loss on answer tokens. `optimizer: muon` moves the
    weights of linear and convolutional layers by Muon, all else by AdamW, as `adamw` does all. `rates` multiplies the
    learning rate of single modules; those it does not name have the rate as it is. `disturb` is the chance of each
    picture, where the stage augments, to be dimmed, to be blurred and to be covered in part. The first `small_pictures`
    of the steps show pictures at two thirds of their side, where the tower takes them. `number_smoothing` spreads the
    target of a number over its neighbours, a Gaussian of so many steps between answers. With `answers`, a class weighs
    as its share among the answers to its question to the power of `-class_weights`, and the mean image token goes on
    predicting the words of a face's caption, if it has one, by a loss of weight `caption_words`. `after` names the
    stage it goes on from; null is the one before it in the list.
    """

    trains: Trainable
    tasks: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    objective: Literal["caption_words", "answers"]
    steps: Positive
    batch_images: Positive
    turns_per_image: Positive
    optimizer: Literal["adamw", "muon"]
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    rates: dict[Module, Annotated[float, Field(gt=0, le=100)]]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["cosine", "warmup_stable_decay"]
    warmup: Share
    decay: Share
    clip: Annotated[float, Field(gt=0)]
    augment: bool
    disturb: Annotated[float, Field(ge=0, lt=1)]
    small_pictures: Share
    number_smoothing: Annotated[float, Field(ge=0)]
    class_weights: Annotated[float, Field(ge=0, le=1)]
    caption_words: Annotated[float, Field(ge=0)]
    after: Annotated[str | None, Field(exclude_if=lambda after: after is None)] = None


class Train(Section):
    """How training is launched. `launcher: here` trains in the step's own process, with a Ray of its own or that of
    RAY_ADDRESS; `rayjob` makes a RayJob of KubeRay and waits for it. `threads: 0` shares the cores among the workers.

    `storage` is where checkpoints are kept, a folder or s3://bucket/prefix; null is the step's own folder. With
    `min_workers`, a run that loses machines goes on with as many workers as are left, and grows again. `sharding`:
    `replicate` has the whole model on every worker, `full` shards parameters, gradients and moments over them.

    None of the following changes what is learnt, up to floating point. Faces share a row of the language model up to
    `row_tokens`; a worker's faces go through it `micro_images` at a time (batch normalisation sees as many); a frozen
    tower that sees faces as they are is asked once for each (`feature_cache`); `recompute` keeps fewer activations,
    `compile` makes kernels of its own. A loss that rises to `divergence` times its best level stops the stage.
    """

    launcher: Literal["here", "rayjob"]
    workers: Positive
    min_workers: Positive | None
    threads: Annotated[int, Field(ge=0)]
    use_gpu: bool
    precision: Literal["auto", "bf16", "fp32"]
    checkpoint_every: Positive
    max_failures: Annotated[int, Field(ge=0)]
    storage: str | None
    sharding: Literal["replicate", "full"]
    row_tokens: Annotated[int, Field(ge=0)]
    micro_images: Annotated[int, Field(ge=0)]
    feature_cache: bool
    recompute: bool
    compile: bool
    divergence: Annotated[float, Field(ge=0)]
    lora: Lora
    stages: Annotated[dict[str, Stage], Field(min_length=1)]

    @field_validator("storage")
    @classmethod
    def _is_a_place(cls, storage: str | None) -> str | None:
        bucket = re.fullmatch(r"s3://[^/\s]+(/.*)?", storage or "")
        folder = storage and not re.match(r"[A-Za-z0-9+.-]+:/", storage)
        if storage is not None and not (bucket or folder):
            raise ValueError("is neither a folder nor s3://bucket/prefix; null keeps checkpoints in the step's folder")
        return storage

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        """The stages as a chain, each after the one that it goes on from."""
        listed = list(stages)
        before = {name: stages[name].after or one for name, one in zip(listed, [None, *listed], strict=False)}
        following: dict[str | None, str] = {}
        for name, after in before.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in STEP_NAMES | set(GROUPS):
                raise ValueError(f"{name}: a stage needs a name of its own in a-z, 0-9 and _, other than a step's")
            if after is not None and after not in stages:
                others = ", ".join(one for one in listed if one != name)
                raise ValueError(f"{name}.after: {after!r} is none of the stages {others}")
            if after in following:
                start = f"goes on from {after}" if after else "comes first"
                raise ValueError(f"{name} {start}, as {following[after]} does; say with `after` which comes first")
            following[after] = name
        chain: list[str] = []
        while (onward := following.get(chain[-1] if chain else None)) is not None:
            chain.append(onward)
        if len(chain) < len(listed):
            raise ValueError(f"{', '.join(sorted(set(listed) - set(chain)))}: these go on from one another in a circle")
        return {name: stages[name] for name in chain}

    def before(self, stage: str) -> str | None:
        """The stage that `stage` goes on from; None for the first."""
        names = list(self.stages)
        place = names.index(stage)
        return names[place - 1] if place else None

    @model_validator(mode="after")
    def _fewest_are_no_more_than_most(self) -> Train:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        return self
