"""Whether what is served is what was evaluated: asked of a server that tells evaluation's answers, or nearly."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facemllm import settings as settings_module
from facemllm import tasks
from facemllm.evaluate.predict import puts
from facemllm.serve.engine.parity import NotEqual, parity
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, mapping, open_table, pairs
from facemllm.tasks.answers import answer
from tests import asked
from tests.answering import Answering, Loopback
from tests.refusing import refuses

MODEL = "m" * 64
Reply = dict[str, Any]
SETTINGS = settings_module.load("laptop", ["serve.max_instances=2"])


@pytest.fixture
def evaluated(
    conversations_table: Callable[..., Path], face_rows: Callable[..., Any], tmp_path: Path
) -> tuple[Path, Path]:
    """Conversations in which gender, age and expression are asked, and predictions with drawn probabilities."""
    names = ("gender", "age", "expression", "caption")
    rows = [asked.conversation(face, [tasks.get(name) for name in names]) for face in face_rows()]
    table = conversations_table(rows)
    generator = np.random.default_rng(0)
    written = []
    for row in rows:
        for put in puts(row):
            if row["split"] != "test":
                continue
            chances = generator.dirichlet(np.ones(len(put.question.options))) if put.question.options else []
            found = answer(put.question, [float(p) for p in chances], 0) if put.question.options else None
            one = {"sample_id": put.turn["sample_id"], "image_id": row["image_id"], "task": put.turn["task"]}
            one |= {"question": put.text, "raw": found.text if found else "a face", "model_digest": MODEL}
            one |= {"parsed": found.value if found else None, "scores": pairs(found.scores) if found else None}
            written.append(dict.fromkeys(PREDICTIONS.names) | one)
    with TableWriter(
        tmp_path / "predictions", PREDICTIONS, about={"split": "test", "model_digest": MODEL, "maps": True}
    ) as out:
        out.write(written)
    return tmp_path / "predictions", table


class Server(Loopback):
    """Says what evaluation said, changed by `change`; refuses its first request with 429."""

    def __init__(self, predictions: Path, conversations: Path) -> None:
        rows = open_table(conversations, CONVERSATIONS).iterate()
        faces = {row["image_id"]: row["images"][0]["bytes"] for row in rows}
        self.known: dict[tuple[str, str], Reply] = {}
        for row in open_table(predictions, PREDICTIONS).iterate():
            if row["scores"]:
                digest = hashlib.sha256(faces[row["image_id"]]).hexdigest()
                said = {"answer": row["raw"], "value": row["parsed"], "scores": mapping(row["scores"])}
                self.known[digest, row["question"]] = {**said, "task": row["task"], "kind": "taught"}
        self.info: Reply = {"digest": MODEL, "tasks": ["gender", "age"], "dtype": "float32", "engine": "own"}
        self.change: Callable[[Reply], Reply] = lambda reply: reply
        self.sizes: list[int] = []
        self.maps = 0
        self.refused = 0
        outer = self

        class Handler(Answering):
            def do_GET(self) -> None:
                self.send(200, outer.info)

            def do_POST(self) -> None:
                instances = json.loads(self.rfile.read(int(self.headers["content-length"])))["instances"]
                if not outer.sizes and not outer.refused:
                    outer.refused += 1
                    self.send(429, {"error": "busy"})
                    return
                outer.sizes.append(len(instances))
                outer.maps += sum("segmentation" in one for one in instances)
                digests = [hashlib.sha256(base64.b64decode(one["image"]["b64"])).hexdigest() for one in instances]
                said = [outer.known[digest, one["question"]] for digest, one in zip(digests, instances, strict=True)]
                self.send(200, {"predictions": [outer.change(dict(one)) for one in said]})

            def send(self, status: int, body: Reply) -> None:
                self._send(status, json.dumps(body).encode(), headers={"Retry-After": "0"})

        super().__init__(Handler)


@pytest.fixture
def server(evaluated: tuple[Path, Path]) -> Iterator[Server]:
    with Server(*evaluated) as made:
        yield made


def compare(server: Server, evaluated: tuple[Path, Path], count: int = 5) -> Reply:
    return parity(SETTINGS, server.url, "m", *evaluated, count)


def nudged(reply: Reply, by: float) -> Reply:
    """So much probability from the likeliest option to the next."""
    first, second = sorted(reply["scores"], key=reply["scores"].__getitem__)[:-3:-1]
    scores = reply["scores"] | {
        first: reply["scores"][first] - by,
        second: reply["scores"][second] + by,
    }
    return reply | {"scores": scores}


def test_equal_answers_agree_and_rounding_is_told(server: Server, evaluated: tuple[Path, Path]) -> None:
    found = compare(server, evaluated)
    assert (found["faces"], found["questions"], found["different"], found["withheld"]) == (5, 10, 0, {})
    assert found["agreement"] == {"options": 1.0, "numbers": 1.0}
    assert found["largest_probability_difference"] == 0
    assert (found["model_digest"], found["engine"], found["dtype"]) == (MODEL, "own", "float32")
    assert (server.sizes, server.maps, server.refused) == ([2] * 5, 10, 1)  # at most max_instances, with maps
    server.change = lambda reply: nudged(reply, 0.0004)
    assert compare(server, evaluated)["largest_probability_difference"] == pytest.approx(0.0004)


def test_a_probability_that_is_off_is_refused_unless_the_precision_explains_it(
    server: Server, evaluated: tuple[Path, Path]
) -> None:
    server.change = lambda reply: nudged(reply, 0.01)
    with pytest.raises(NotEqual, match=r"a probability differs by 0\.0100, allowed is 0\.001") as refused:
        compare(server, evaluated)
    assert refused.value.record["questions"] == 10
    server.info["dtype"] = "bfloat16"
    assert compare(server, evaluated)["allowed"] == {"probability": 0.05, "number": 1.0}


def test_another_number_or_option_is_listed_with_its_margin(server: Server, evaluated: tuple[Path, Path]) -> None:
    server.change = lambda reply: (
        reply | {"value": f"{float(reply['value']) + 0.01:.2f}"} if reply["task"] == "age" else reply
    )
    found = compare(server, evaluated)
    assert (found["different"], found["agreement"]) == (5, {"options": 1.0, "numbers": 0.0})
    assert {(one["task"], round(one["number"], 2)) for one in found["differences"]} == {("age", 0.01)}
    server.change = lambda reply: (
        reply | {"value": f"{float(reply['value']) + 3:.2f}"} if reply["task"] == "age" else reply
    )
    assert "a number differs by 3.00" in refuses("number", compare, server, evaluated, error=NotEqual)

    def swapped(reply: Reply) -> Reply:
        other = {"female": "male", "male": "female"}
        return reply if reply["task"] == "age" else reply | {"value": other[reply["value"]]}

    server.change = swapped
    assert "margin 0." in refuses("instead of", compare, server, evaluated, error=NotEqual)
    server.change = lambda reply: reply | {"value": None}
    refuses("says 'None' instead of", compare, server, evaluated, error=NotEqual)


def test_what_cannot_be_compared_is_no_agreement(server: Server, evaluated: tuple[Path, Path]) -> None:
    server.info["digest"] = "n" * 64
    refuses("not the model that was evaluated", compare, server, evaluated, error=NotEqual)
    server.info["digest"] = MODEL
    server.change = lambda reply: reply | {"scores": None, "value": None, "kind": "abstained"}
    refuses("answers none of the questions: {'abstained': 10}", compare, server, evaluated, error=NotEqual)
    server.info["tasks"] = ["unanswerable"]
    refuses("no closed question that the server knows", compare, server, evaluated)


def test_options_that_evaluation_did_not_have_are_a_difference(server: Server, evaluated: tuple[Path, Path]) -> None:
    server.change = lambda reply: reply | {"scores": reply["scores"] | {"another": 0.0}}
    refuses("a probability differs by 1.0", compare, server, evaluated, error=NotEqual)
