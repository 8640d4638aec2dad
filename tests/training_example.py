"""Forty coloured squares with a bright half, and what is asked of them: a few seconds are enough to learn them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facemllm import settings as settings_module
from facemllm.model.face_mllm import Graph, extend
from facemllm.model.families import family_of
from facemllm.model.tiny import build_tiny
from facemllm.settings import Settings, Stage, Train
from facemllm.settings.train import Trainable
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from facemllm.tasks.relations import Relation
from facemllm.train.corpus import Corpus, FaceDataset
from facemllm.train.data import read_turns, tokenise, vocabulary_texts
from facemllm.train.dataloader import Batch, BatchSampler, DataLoader
from facemllm.train.loop import Outcome, run_stage
from facemllm.train.loss import StepLoss
from facemllm.train.pixels import map_cache, pixel_cache
from facemllm.train.stage import StageRun
from tests.conftest import messages_of
from tests.pictures import encode

COLORS = {"red hair": (200, 40, 40), "green hair": (40, 200, 40), "blue hair": (40, 40, 200)}
SIDES = ("turned 25 degrees left", "turned 25 degrees right")
MODULES = tuple(Trainable.model_fields)
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
    return {"bytes": encode(pixels), "path": None}


def conversation(number: int, split: str = "train") -> dict[str, Any]:
    """One row of the table; every third face has no map of its parts."""
    pixels, color, side = face(number)
    asked = [
        ("caption", "open", "Describe this face.", [], f"A face with {color}; head {side}."),
        ("attributes", "choice", "Which hair?", list(COLORS), color),
        ("attributes", "boolean", "Is the hair red?", ["yes", "no"], "yes" if color == "red hair" else "no"),
        ("head_pose", "number", "How is the head turned?", list(SIDES), side),
    ]
    turns = []
    for place, (task, form, _, options, answer) in enumerate(asked):
        turn = {"sample_id": f"{number}-{place}", "task": task, "form": form, "template": f"{task}.{form}"}
        turns.append({**turn, "options": options, "answer": answer, "follows": False})
    parts = np.random.default_rng(number).integers(0, 19, (64, 64), dtype=np.uint8)
    about = {"conversation_id": f"c{number}", "image_id": f"i{number}", "subject_id": f"s{number}", "source": "toy"}
    about |= {"images": [png(pixels)], "segmentation": png(parts) if number % 3 else None, "split": split}
    messages = messages_of((question, answer) for _, _, question, _, answer in asked)
    return about | {"messages": messages, "turns": turns}


def stage(**changes: Any) -> Stage:
    """A short stage that trains everything."""
    given: dict[str, Any] = {"trains": dict.fromkeys(MODULES, "full"), "tasks": TASKS, "objective": "answers"}
    given |= {
        "steps": 8,
        "batch_images": 6,
        "turns_per_image": 3,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "rates": {"tower": 0.5},
    }
    given |= {"weight_decay": 0.05, "schedule": "warmup_stable_decay", "warmup": 0.1, "decay": 0.5, "clip": 1.0}
    given |= {"augment": True, "disturb": 0.3, "small_pictures": 0.0, "number_smoothing": 0.7}
    given |= {"class_weights": 0.0, "caption_words": 0.0}
    return Stage.model_validate(given | changes)


def spread(model: Any) -> Any:
    """Weights and statistics such that what an untrained model gets wrong (a mask, a map) shows in its logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name and parameter.ndim == 2:
                parameter.mul_(6)
            if name.endswith("segmentation.absent") or "segmentation.projector" in name:
                parameter.mul_(5)
        model.get_input_embeddings().weight.mul_(8)
        for name, buffer in model.named_buffers():  # as training leaves them: loading must keep them
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model.eval()


def prompt(processor: Any, question: str) -> str:
    """What a model is given to answer a question about an image."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return str(processor.apply_chat_template(chat, add_generation_prompt=True))


def trains(**modes: str) -> dict[str, str]:
    """Which modules a stage trains; those not named are frozen."""
    return dict.fromkeys(MODULES, "frozen") | modes


MODES = {
    "align": (trains(tower="full", projector="full", embeddings="full"), "caption_words"),
    "instruct": (trains(projector="full", embeddings="full", language="full"), "answers"),
    "specialize": (trains(tower="full", projector="full", embeddings="full", language="full"), "answers"),
    "projector": (trains(projector="full"), "answers"),
    "adapters": (trains(projector="full", language="lora"), "answers"),
}


def stage_run(plan: Stage, settings: Settings, name: str = "toy", **facts: Any) -> StageRun:
    """A run of a stage that no settings name; `facts` are fields of the run, or of `settings.train`."""
    train = {"precision": "fp32", "row_tokens": 0, "micro_images": 0, "checkpoint_every": 3}
    train |= {key: facts.pop(key) for key in list(facts) if key in Train.model_fields}
    settings = settings.model_copy(update={"seed": 5, "train": settings.train.model_copy(update=train)})
    nowhere = Path("nowhere")
    facts = {"log_every": 1, "conversations": nowhere, "out": nowhere, "work": nowhere} | facts
    return StageRun(name, plan, settings, facts.pop("made_from", {}), **facts)


class Toy:
    """The table, its pixels and corpus, and fresh presets; with `overrides`, such as `BRANCHES`, of the profile."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        torch.set_num_threads(1)
        self.settings = settings_module.load("laptop", ["model.image_size=32", *overrides])
        self.branches = bool(overrides)
        with TableWriter(folder / "table", CONVERSATIONS) as writer:
            writer.write(conversation(n, "test" if n % 5 == 4 else "train") for n in range(40))
        self.table = open_table(folder / "table", CONVERSATIONS)
        self.turns = read_turns(self.table, "train")
        self.cache = folder / "cache"
        self.model, self.processor = self.build()
        self.family = family_of(self.model.config, self.processor)
        self.frame = self.family.frame
        self.corpus = tokenise(self.turns, self.frame)
        self.pixels = pixel_cache(self.table, self.family, self.cache)
        self.dataset = FaceDataset(self.corpus, self.pixels)
        if self.branches:
            shown = [face(number)[1:] for number in self.corpus.pixel_row]
            labels = np.array([[c == name for name in COLORS] + [s == SIDES[0]] for c, s in shown]).astype(np.int8)
            labels[::5, 3] = -1
            maps = map_cache(self.table, self.processor, self.cache)
            relation = Relation(kind="exactly_one", names=tuple(COLORS))
            self.dataset = FaceDataset(self.corpus, self.pixels, maps, labels, (relation,))

    def build(self) -> tuple[Any, Any]:
        """The model as it is built, and its processor."""
        model, processor = build_tiny(self.settings.model, *vocabulary_texts(self.turns), 1)
        graph = Graph(KNOWN, KNOWN, np.full((len(KNOWN), len(KNOWN)), 1 / len(KNOWN))) if self.branches else None
        return extend(model, processor, self.settings.model, graph, [], 1)

    def fresh(self) -> tuple[Any, Any]:
        """Untrained weights and the processor."""
        return copy.deepcopy(self.model), self.processor

    def stage_run(self, plan: Stage, name: str = "toy", **facts: Any) -> StageRun:
        return stage_run(plan, self.settings, name, **facts)

    def run(self, plan: Stage, name: str = "toy", model: Any = None, **options: Any) -> Outcome:
        """`run_stage`; `options` are facts of the run or arguments of `run_stage`."""
        given = {key: options.pop(key) for key in list(options) if key in ("resume", "save", "log")}
        run = self.stage_run(plan, name, **options)
        return run_stage(run, model or self.fresh()[0], self.processor, self.dataset, **given)

    def sampler(self, plan: Stage, corpus: Corpus | None = None, name: str = "toy", **options: Any) -> BatchSampler:
        return BatchSampler(self.stage_run(plan, name), corpus or self.corpus, 32, **options)

    def batches(self, plan: Stage, step: int = 0, **options: Any) -> list[Batch]:
        """The batches of one step; `options` are facts of the run."""
        run = self.stage_run(plan, **options)
        return DataLoader(run, self.model, self.processor, self.dataset).batches(step)

    def gradients(self, model: Any, plan: Stage, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Summed report of some batches, and the gradients they leave."""
        loss = StepLoss(self.stage_run(plan), model, self.processor, self.dataset)
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
