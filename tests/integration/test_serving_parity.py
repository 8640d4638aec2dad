"""A real server, a real evaluation of the same bytes, and whether the one answers as the other did."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from facemllm import tasks
from facemllm.core import digests, servers, services
from facemllm.evaluate.run import evaluate
from facemllm.model.pretrained import save_model
from facemllm.model.tiny import build_tiny
from facemllm.serve.engine.parity import NotEqual, parity
from facemllm.settings import Settings, load
from tests import asked
from tests.ports import free_port
from tests.refusing import refuses

pytestmark = pytest.mark.integration
NAMES = ("gender", "age", "attributes", "caption")


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    small = ["bootstrap=100", "baseline_pixels=8", "generated_faces=0", "disturbed_faces=0", "max_new_tokens=4"]
    chosen = [
        f"storage.home={tmp_path / 'home'}",
        f"services.staging_port={free_port(1)}",
        "services.staging_grpc_port=0",
    ]
    chosen += ["services.start_timeout_s=240", "serve.max_instances=8", "train.use_gpu=false"]
    loaded = load("laptop", [*chosen, *(f"evaluate.{one}" for one in small)])
    yield loaded
    services.down(loaded)


def test_a_server_is_held_against_the_evaluation_of_its_model(
    settings: Settings,
    conversations_table: Callable[..., Path],
    face_rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    faces = asked.with_attributes(face_rows(), "A face.")
    rows = [asked.conversation(face, [tasks.get(name) for name in NAMES]) for face in faces]
    table = conversations_table(rows)
    texts = [text for name in NAMES for question in tasks.get(name).questions() for text in question.templates]
    phrases = asked.phrases()
    for seed in (0, 1):
        save_model(*build_tiny(settings.model, texts + phrases, phrases, seed), tmp_path / f"{seed}")
    digest = digests.of_tree(tmp_path / "0")
    evaluate(settings, tmp_path / "0", digest, table, tmp_path / "its")
    evaluate(settings, tmp_path / "1", digest, table, tmp_path / "another's")  # as if it were of the model served
    service = servers.model_server(settings, "staging", tmp_path / "0", digest, "7")
    url = services.up(settings, "staging", service).url

    def compare(folder: str) -> dict[str, Any]:
        return parity(settings, url, settings.promote.model_name, tmp_path / folder / "predictions", table, 6)

    found = compare("its")
    assert found["faces"] == 6
    assert found["questions"] >= 6 * len(tasks.get("attributes").items)
    assert found["agreement"] == {"options": 1.0, "numbers": 1.0}
    assert found["largest_probability_difference"] < 1e-5
    refuses("a probability differs by", compare, "another's", error=NotEqual)
