"""Small native trees of FaceXBench and Face-Human-Bench: synthetic pictures, the benchmarks' own file forms."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facemllm import settings
from facemllm.ingest.run import import_source
from facemllm.settings.data import Source
from tests.pictures import encode

FACEXBENCH = {
    "bias_fairness": ("age", "gender", "race"),
    "attributes_expression": ("expression", "attributes"),
    "face_localization": ("headpose", "segmentation", "crowd_counting"),
    "face_recognition": ("hr_fr", "lr_fr", "celebrity_identification"),
    "fas_deepfakes": ("fas", "deepfakes"),
    "tools_use": ("tools_retrieval",),
}
FACE_HUMAN_BENCH = {
    "face_attribute_compound": ("original", "cropped"),
    "face_age_basic_5": ("original", "cropped"),
    "face_expression_basic": ("original", "cropped"),
    "face_expression_compound": ("cropped", "original"),  # its own evaluation leaves the second out
    "face_attack_physical_paper": ("cropped",),
    "face_recognition_basic": ("cropped",),
    "human_action_basic": ("boxed",),
    "human_spatial_relation_count_10": ("original",),
}
OPTIONS = ("happiness", "sadness", "a man", "woman")
ANSWER = "sadness"


def picture(path: Path, seed: int) -> None:
    """A picture unlike those of other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    path.write_bytes(encode(pixels))


def facexbench(root: Path, each: int = 2) -> Path:
    """A file a task, `each` questions with one picture and one question with two; the right option is B."""
    home, seed = root / "benchmark", 0
    for category, minors in FACEXBENCH.items():
        for minor in minors:
            questions: dict[str, Any] = {}
            for number in range(1, each + 2):
                names = [f"images/{minor}/question_{number}_{place}.png" for place in range(1 + (number > each))]
                for name in names:
                    picture(home / name, seed := seed + 1)
                asked = {"image_paths": names, "question_text": f"What is shown in {minor}?", "options": list(OPTIONS)}
                questions[str(number)] = {**asked, "correct_answer_option": "B", "answer": ANSWER}
            held: dict[str, Any] = {"category": category, "sub-category": minor, "questions": questions}
            if category == "tools_use":
                held["context"] = "Tools: a detector, a parser."
            (home / f"{minor}_mcq.json").write_text(json.dumps(held))
    return root


def face_human_bench(root: Path, each: int = 3) -> Path:
    """A file a kind; the right option is the second."""
    seed = 0
    for kind, variants in FACE_HUMAN_BENCH.items():
        rows = []
        for number in range(each):
            paths = {variant: f"eval_data/{kind}/{variant}/{number}.jpg" for variant in variants}
            for path in paths.values():
                picture(root / "test" / path, seed := seed + 1)
            asked = {"question": "Which of these?", "options": list(OPTIONS), "answer": 1}
            rows.append({"type": kind, "QA": asked, "image": {"image_paths": paths}})
        file = root / f"test/json/en/{kind}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"data": rows}))
    return root


def imported(key: str, root: Path, out: Path, home: Path) -> Mapping[str, Any]:
    """A tree as a conversations table; its manifest."""
    chosen = settings.load("laptop", [f"storage.home={home}"])
    return import_source(chosen, Source(name=key, root=str(root), options={}), out)
