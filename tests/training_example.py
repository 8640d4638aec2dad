"""Forty coloured squares with a bright half, and what is asked of them: a few seconds are enough to learn them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from facemllm import settings
from facemllm.knowledge.relations import Relation
from facemllm.model.branches import Graph, extend
from facemllm.model.prompts import Frame
from facemllm.model.tiny import build_tiny
from facemllm.settings import Stage
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from facemllm.train import stages
from facemllm.train.batches import Batch, Batcher, Faces
from facemllm.train.data import map_cache, pixel_cache, read_turns, tokenise, vocabulary_texts
from facemllm.train.loop import Job, Outcome, run_stage
from facemllm.train.loss import StepLoss
from facemllm.train.packing import Planner

COLORS = {"red hair": (200, 40, 40), "green hair": (40, 200, 40), "blue hair": (40, 40, 200)}
SIDES = ("turned 25 degrees left", "turned 25 degrees right")
TASKS = {"attributes": 1.0, "head_pose": 1.0, "caption": 0.2}
BRANCHES = ("model.segmentation.mode=append", "model.knowledge.enabled=true")
KNOWN = (*COLORS, "left")  # characteristics of the knowledge branch


def face(number: int) -> tuple[np.ndarray, str, str]:
    """A coloured square with a bright half: which colour and which side are what there is to learn."""
    generator = np.random.default_rng(number)
    color = list(COLORS)[number % 3]
    side = number // 3 % 2
    pixels = np.clip(generator.normal(COLORS[color], 12, (64, 64, 3)), 0, 255).astype(np.uint8)
    pixels[:, 32 * side : 32 * side + 32] //= 2
    return pixels, color, SIDES[side]


def png(pixels: np.ndarray) -> dict[str, Any]:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return {"bytes": encoded.getvalue(), "path": None}


def conversation(number: int, split: str = "train") -> dict[str, Any]:
    """One row of the table; every third face has no map of its parts."""
    pixels, color, side = face(number)
    asked = [
        ("caption", "open", "Describe this face.", [], f"A face with {color}; head {side}."),
        ("attributes", "choice", "Which hair?", list(COLORS), color),
        ("attributes", "boolean", "Is the hair red?", ["yes", "no"], "yes" if color == "red hair" else "no"),
        ("head_pose", "number", "How is the head turned?", list(SIDES), side),
    ]
    messages = []
    for place, (_, _, question, _, answer) in enumerate(asked):
        image = [{"type": "image", "text": None}] if place == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    parts = np.random.default_rng(number).integers(0, 19, (64, 64), dtype=np.uint8)
    turn = {"template": "t", "follows": False}
    return {
        "conversation_id": f"c{number}",
        "image_id": f"i{number}",
        "images": [png(pixels)],
        "segmentation": png(parts) if number % 3 else None,
        "split": split,
        "source": "toy",
        "subject_id": f"s{number}",
        "messages": messages,
        "turns": [
            {
                **turn,
                "template": f"{t}.{f}",
                "sample_id": f"{number}-{k}",
                "task": t,
                "form": f,
                "options": o,
                "answer": a,
            }
            for k, (t, f, _, o, a) in enumerate(asked)
        ],
    }


def stage(**changes: Any) -> Stage:
    """A short stage that trains everything."""
    given = {
        "trains": dict.fromkeys(stages.MODULES, "full"),
        "tasks": TASKS,
        "objective": "answers",
        "steps": 8,
        "batch_images": 6,
        "turns_per_image": 3,
        "learning_rate": 1e-3,
        "rates": {"tower": 0.5},
        "weight_decay": 0.05,
        "schedule": "warmup_stable_decay",
        "warmup": 0.1,
        "decay": 0.5,
        "clip": 1.0,
        "augment": True,
    }
    return Stage.model_validate(given | changes)


def trains(**modes: str) -> dict[str, str]:
    """Which modules a stage trains; those not named are frozen."""
    return dict.fromkeys(stages.MODULES, "frozen") | modes


MODES = {
    "align": (trains(tower="full", projector="full", embeddings="full"), "caption_words"),
    "instruct": (trains(projector="full", embeddings="full", language="full"), "answers"),
    "specialize": (trains(tower="full", projector="full", embeddings="full", language="full"), "answers"),
    "projector": (trains(projector="full"), "answers"),
    "adapters": (trains(projector="full", language="lora"), "answers"),
}


class Toy:
    """The table, its pixels and corpus, and fresh presets; with `overrides`, such as `BRANCHES`, of the profile."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        torch.set_num_threads(1)
        self.settings = settings.load("laptop", ["model.image_size=32", *overrides])
        self.branches = bool(overrides)
        with TableWriter(folder / "table", CONVERSATIONS) as writer:
            writer.write(conversation(n, "test" if n % 5 == 4 else "train") for n in range(40))
        self.table = open_table(folder / "table", CONVERSATIONS)
        self.turns = read_turns(self.table, "train")
        self.cache = folder / "cache"
        model, self.processor = self.fresh()
        self.frame = Frame.of(model, self.processor)
        self.corpus = tokenise(self.turns, self.frame)
        self.pixels = pixel_cache(self.table, self.processor.image_processor, self.cache)
        self.faces = Faces(self.pixels)
        if self.branches:
            shown = [face(number)[1:] for number in self.corpus.pixel_row]
            labels = np.array([[c == name for name in COLORS] + [s == SIDES[0]] for c, s in shown]).astype(np.int8)
            labels[::5, 3] = -1
            maps = map_cache(self.table, self.processor, self.cache)
            self.faces = Faces(self.pixels, maps, labels, (Relation(kind="exactly_one", names=tuple(COLORS)),))

    def fresh(self, seed: int = 1) -> tuple[Any, Any]:
        model, processor = build_tiny(self.settings.model, *vocabulary_texts(self.turns), seed)
        graph = Graph(KNOWN, KNOWN, np.full((len(KNOWN), len(KNOWN)), 1 / len(KNOWN))) if self.branches else None
        return extend(model, processor, self.settings.model, graph, [], seed)

    def run(self, plan: Stage, name: str = "toy", model: Any = None, **options: Any) -> Outcome:
        """`run_stage`; `options` are fields of the job or arguments of the run."""
        job = {"checkpoint_every": 3, "log_every": 1, "precision": "fp32", "lora": self.settings.train.lora}
        job |= {k: options.pop(k) for k in list(options) if k in Job.__dataclass_fields__}
        return run_stage(
            Job(name=name, stage=plan, seed=5, key="k", model=self.settings.model, **job),
            model or self.fresh()[0],
            self.processor,
            options.pop("corpus", self.corpus),
            options.pop("faces", self.faces),
            **options,
        )

    def planner(self, plan: Stage, **options: Any) -> Planner:
        return Planner(self.corpus, plan, "toy", 5, 32, self.settings.model.segmentation.drop, **options)

    def batches(self, plan: Stage, step: int = 0, **options: Any) -> list[Batch]:
        """The batches of one step; `options` are those of `Batcher`."""
        image = self.frame.image_token_id
        vocabulary = len(self.processor.tokenizer) if plan.objective == "caption_words" else None
        batcher = Batcher(self.corpus, self.faces, self.frame.prefix_ids, image, vocabulary, **options)
        return batcher(self.planner(plan).plan(step), slice(0, plan.batch_images))

    def gradients(self, model: Any, plan: Stage, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Summed report of some batches, and the gradients they leave."""
        loss = StepLoss(
            plan,
            self.settings.model.knowledge,
            model,
            self.processor,
            self.corpus,
            self.faces,
            device=torch.device("cpu"),
            bf16=False,
        )
        model.zero_grad()
        reports = []
        for batch in batches:
            value = loss(batch)
            value.loss.backward()
            reports.append(value.report)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return torch.stack(reports).sum(0), found


def assert_same_gradients(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, atol: float = 1e-5, rtol: float = 1e-4
) -> None:
    """Every parameter has the same gradient, up to `atol` of the largest in its tensor and `rtol`."""
    assert set(one) == set(other)
    for name, gradient in one.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(other[name], gradient, atol=atol * scale, rtol=rtol, msg=name)
