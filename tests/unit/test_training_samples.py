"""What a stage shows of itself: answers about fixed faces, and the audit of relations that it starts from."""

from types import SimpleNamespace

import pytest
import torch

from facemllm import settings as settings_module
from facemllm.core.step import Context
from facemllm.core.store import Store
from facemllm.model.pretrained import save_model
from facemllm.model.tiny import build_tiny
from facemllm.scoring import figures
from facemllm.tables import CONVERSATIONS, open_table
from facemllm.train import step
from facemllm.train.samples import FACES, fixed_faces, sample_answers


@pytest.fixture
def table(conversations_table, conversation_rows, face_rows):
    faces = face_rows()
    rows = conversation_rows(faces)
    for row, face in zip(rows, faces, strict=True):
        row["segmentation"] = face["segmentation"]
    return open_table(conversations_table(rows), CONVERSATIONS)


def test_fixed_faces_are_of_validation_by_digest(table, conversations_table, conversation_rows, face_rows):
    held_out = sorted(row["image_id"] for row in face_rows() if row["split"] == "validation")
    found = fixed_faces(table)
    assert [face.image_id for face in found] == held_out[:FACES]
    by_id = {row["image_id"]: row for row in face_rows()}
    for face in found:
        row = by_id[face.image_id]
        assert (face.image, face.map) == (row["image"]["bytes"], row["segmentation"]["bytes"])
        assert face.answers["gender", "gender"] == row["gender"]
    training = [row for row in conversation_rows(face_rows()) if row["split"] == "train"]
    alone = fixed_faces(open_table(conversations_table(training, "alone"), CONVERSATIONS))
    assert [face.image_id for face in alone] == sorted(row["image_id"] for row in training)[:FACES]
    assert alone[0].map is None


def test_the_answers_are_written_and_scored_and_come_again(table, tmp_path):
    torch.set_num_threads(1)
    settings = settings_module.load("laptop", ["train.threads=1"])
    words = ["Describe the face.", "A woman.", "Is this a woman or a man?"]
    save_model(*build_tiny(settings.model, words, ["a woman", "a man"], 0), tmp_path / "model")
    rows = sample_answers(settings, tmp_path / "model", table)
    assert len(rows) == FACES * 2
    assert {row["item"] for row in rows[:2]} == {"caption", "gender"}
    truths = {face.image_id: face.answers["gender", "gender"] for face in fixed_faces(table)}
    for row in rows:
        assert isinstance(row["written"], str)
        if row["item"] == "gender":
            assert row["truth"] == truths[row["image_id"]]
            assert row["likeliest"] in ("female", "male")
            assert 0.5 <= row["probability"] <= 1
        else:
            assert (row["likeliest"], row["probability"]) == (None, None)
    assert sample_answers(settings, tmp_path / "model", table) == rows


def test_a_tracked_stage_puts_both_on_its_run(table, tmp_path):
    torch.set_num_threads(1)
    overrides = ["model.knowledge.enabled=true", "model.knowledge.tasks=[gender]", "model.knowledge.audit=0.0"]
    store = Store(tmp_path / "home")
    (store.home / "store").mkdir(parents=True)
    (store.home / "store" / table.digest).symlink_to(table.path)
    settings = settings_module.load("laptop", ["train.threads=1", *overrides])
    save_model(*build_tiny(settings.model, ["A woman."], ["a woman", "a man"], 0), tmp_path / "model")
    logged = {}
    run = SimpleNamespace(log_table=logged.__setitem__)
    inputs = {"conversations": table.digest}
    step._show(Context(settings, store, inputs, tmp_path, tmp_path / "model", pytest.fail, run))
    assert list(logged) == [figures.SAMPLES, figures.RELATIONS]
    assert len(logged[figures.SAMPLES]["written"]) == FACES * 2
    audited = {"relation": "exactly one of gender=female, gender=male", "checked": 24, "broken": 0, "rate": 0.0}
    assert logged[figures.RELATIONS] == {name: [value] for name, value in (audited | {"enforced": True}).items()}
