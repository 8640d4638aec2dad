"""Small tables for the tests: forty faces of twenty people, in every split, and a conversation about each."""

import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from facemllm import settings as settings_module
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, pairs, subject_id
from tests.pictures import encode

SIDE = 48
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, where no test of Ctrl-C could end
    signal.signal(signal.SIGINT, signal.default_int_handler)
Rows = list[dict[str, Any]]


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    """Read a JSON file, have `change` alter its content in place, and write it back."""
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def picture(seed: int, quality: int = 90) -> bytes:
    """A JPEG of coarse noise: no two seeds look alike, one seed at two qualities does."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return encode(coarse.repeat(SIDE // 12, 0).repeat(SIDE // 12, 1), "JPEG", quality=quality)


def face(number: int) -> dict[str, Any]:
    person = number // 2
    data = picture(number)
    return {
        "image_id": hashlib.sha256(data).hexdigest(),
        "image": {"bytes": data, "path": None},
        "width": SIDE,
        "height": SIDE,
        "source": "render",
        "source_id": f"{number:04d}",
        "subject_id": subject_id("render", str(person)),
        "split": ("train", "train", "train", "validation", "test")[person % 5],
        "box": [4.0, 4.0, 44.0, 44.0],
        "landmarks": [[16.0, 20.0], [32.0, 20.0]],
        "segmentation": {"bytes": encode(np.full((SIDE, SIDE), number % 19, np.uint8)), "path": None},
        "caption": "A face.",
        "attributes": pairs({"Smiling": number % 3 == 0, "Bald": False}),
        "expression": ("neutral", "happiness")[number % 2],
        "age": 20.0 + number,
        "gender": ("female", "male")[person % 2],
        "skin_tone": 1 + number % 10,
        "yaw": 10.0,
        "pitch": -5.0,
        "roll": 0.0,
        "action_units": pairs({"AU12": 1.0}),
    }


def messages_of(turns: Iterable[tuple[str, str]]) -> Rows:
    """A dialogue about a face: questions, the first with the image, and what is answered."""
    messages: Rows = []
    for question, answer in turns:
        image = [] if messages else [{"type": "image", "text": None}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """What `reformat` would make of a face, cut down to two questions."""
    turns = []
    asked = (("caption", "open", [], "A face."), ("gender", "choice", ["female", "male"], row["gender"]))
    for task, form, options, answer in asked:
        name = {"sample_id": hashlib.sha256(f"{row['image_id']} {task}".encode()).hexdigest(), "task": task}
        turn = {"form": form, "template": f"{task}/0", "options": options, "answer": answer, "follows": False}
        turns.append(name | turn)
    about = {name: row[name] for name in ("image_id", "split", "source", "subject_id")}
    about |= {"conversation_id": hashlib.sha256(f"conversation {row['image_id']}".encode()).hexdigest()}
    about |= {"images": [row["image"]], "groups": pairs({"gender": row["gender"]})}
    messages = messages_of((f"What about {task}?", answer) for task, *_, answer in asked)
    return about | {"messages": messages, "turns": turns}


@pytest.fixture(scope="session", autouse=True)
def _parsed_once() -> Iterator[None]:
    """A settings file is parsed once for all tests: it takes as long as many of them."""
    parsed = lru_cache(None)(lambda path, text, read=settings_module.read_mapping: read(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_module, "read_mapping", lambda path: deepcopy(parsed(path, path.read_bytes())))
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of the test's own, and the working directory: settings as they come, and nothing else."""
    (tmp_path / "project").mkdir()
    shutil.copyfile("params.yaml", tmp_path / "project" / "params.yaml")
    shutil.copytree("profiles", tmp_path / "project" / "profiles")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def face_rows() -> Callable[..., Rows]:
    """`face_rows(count=40)`: fresh rows of a sound faces table."""
    return lambda count=40: [face(number) for number in range(count)]


@pytest.fixture
def conversation_rows() -> Callable[[Rows], Rows]:
    """`conversation_rows(faces)`: a sound conversation about every face."""
    return lambda faces: [conversation(row) for row in faces]


def tables(folder: Path, name: str, schema: Any, sound: Callable[[int], dict[str, Any]]) -> Callable[..., Path]:
    """A function that writes a table of that schema, sound unless told otherwise, and gives its folder."""

    def make(rows: Iterable[dict[str, Any]] | None = None, name: str = name, **options: Any) -> Path:
        with TableWriter(folder / name, schema, **options) as table:
            table.write(map(sound, range(40)) if rows is None else rows)
        return folder / name

    return make


@pytest.fixture
def faces_table(tmp_path: Path) -> Callable[..., Path]:
    """`faces_table(rows=..., name=...)`: writes a faces table."""
    return tables(tmp_path, "faces", FACES, face)


@pytest.fixture
def conversations_table(tmp_path: Path) -> Callable[..., Path]:
    """`conversations_table(rows=..., name=...)`: writes a conversations table."""
    return tables(tmp_path, "conversations", CONVERSATIONS, lambda number: conversation(face(number)))


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest) -> Settings:
    """The laptop's settings with the `OVERRIDES` of the module that asks."""
    return settings_module.load("laptop", getattr(request.module, "OVERRIDES", ()))


@pytest.fixture(scope="module")
def no_torch() -> Iterator[None]:
    """For tests with a fake predictor: its module need not be loaded, which takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        light = SimpleNamespace(Query=lambda question, options: SimpleNamespace(question=question, options=options))
        patch.setitem(sys.modules, "facemllm.model.inference", light)
        yield


@pytest.fixture(scope="module")
def quick_kfp() -> Iterator[None]:
    """KFP asks `inspect.stack` for the name of its caller 70 times a pipeline; under pytest this takes many seconds.

    The commands have the pipelines of `pipeline.py`, as when it is run.
    """
    from cluster import specification
    from pipeline import GRAPHS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specification, "graphs", GRAPHS, raising=False)
        patch.setattr("kfp.dsl.pipeline_task.inspect", SimpleNamespace(stack=lambda: [("a task",) * 4] * 2))
        yield


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The training example; its model stays as it is."""
    from tests.training_example import Toy

    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def full_toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The training example with both branches."""
    from tests.training_example import BRANCHES, Toy

    return Toy(tmp_path_factory.mktemp("full"), *BRANCHES)
