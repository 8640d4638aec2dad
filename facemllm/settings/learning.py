"""Settings of the model and of its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from facemllm.settings.base import Positive, Section, Share


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
