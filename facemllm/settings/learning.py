"""Settings of the model and of its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from facemllm.settings.base import Positive, Section, Share, Weight


class Segmentation(Section):
    """FaceInsight's second visual input: a map of face parts, encoded by a small ViT of its own.

    `mode`: `none` (no branch), `append` (its tokens stand behind the image's) or `add` (they are added to them).
    The map is read at `side` pixels and cut into patches of `patch`; `width`, `layers` and `heads` are the encoder's.
    `tokens`, a square or a square and one, is how many `append` makes. `drop` is the share of training faces whose map is withheld, so that the model does without one too.
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


class Stage(Section):
    """One training stage as data. Learning rates are per optimiser step; `steps` counts optimiser steps.

    `tasks` weighs each turn of a task in the draw of `turns_per_image` turns of a face; `batch_images` is over all
    workers. `objective: caption_words` predicts the caption's words from the mean image token through the tied word
    embeddings (no language-model pass); `answers` is the next-token loss on answer tokens. `rates` multiplies the
    learning rate of single modules; those it does not name have the rate as it is.
    """

    trains: Trainable
    tasks: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    objective: Literal["caption_words", "answers"]
    steps: Positive
    batch_images: Positive
    turns_per_image: Positive
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    rates: dict[Module, Annotated[float, Field(gt=0, le=100)]]
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
