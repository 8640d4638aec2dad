"""Answers of a model with both branches: maps beside images, scores of characteristics, and none of it batched in."""

import asyncio
import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from facemllm import settings
from facemllm.errors import UserError
from facemllm.evaluate.predict import open_image
from facemllm.evaluate.run import evaluate
from facemllm.model.branches import NO_MAP
from facemllm.model.face_mllm import Graph, extend
from facemllm.model.families import llava
from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inference import Predictor, Query
from facemllm.model.inputs import normalise
from facemllm.model.tiny import build_tiny
from facemllm.scoring.calibration import CHARACTERISTICS
from facemllm.serve.asked import quality
from facemllm.serve.language import Limits
from facemllm.tables import CONVERSATIONS, mapping, open_table
from tests.pictures import encode
from tests.serving import loaded
from tests.training_example import spread

TEXTS = ["Is there a beard?", "What is the hair style?", "Describe this face.", "A woman with a hat."]
ANSWERS = ["short hair", "brown hair", "yes", "no"]
QUERIES = [Query("Is there a beard?", ("yes", "no")), Query("What is the hair style?", ("short hair", "brown hair"))]
NAMES = ("Bald", "Wearing_Hat", "Short_Hair")
WITHHELD = 14


@pytest.fixture(scope="module", params=["append", "add"])
def predictor(request):
    torch.set_num_threads(1)
    chosen = settings.load(overrides=[f"model.segmentation.mode={request.param}", "model.knowledge.enabled=true"]).model
    graph = Graph(NAMES, ("bald", "a hat", "short hair"), np.eye(3))
    model, processor = extend(*build_tiny(chosen, TEXTS, ANSWERS, 3), chosen, graph, [WITHHELD], 0)
    return Predictor(spread(model), processor, batch_images=4)


@pytest.fixture(scope="module")
def faces():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (128, 112, 3), dtype=np.uint8) for _ in range(6)]


@pytest.fixture(scope="module")
def maps():
    coarse = np.random.default_rng(0).integers(0, 14, (6, 8, 7), dtype=np.uint8)
    drawn = coarse.repeat(16, 1).repeat(16, 2)
    return [None if number in (1, 4) else encode(one) for number, one in enumerate(drawn)]


@pytest.fixture
def served(predictor):
    """`served(instances)`: what a server with this predictor answers."""
    limits = Limits(max_body_mb=1, max_pixels=1_000_000, max_question_chars=100, max_instances=4)
    model = loaded(predictor, ["attributes"], limits).model
    return lambda instances: asyncio.run(model.predict({"instances": instances}))["predictions"]


def picture(size):
    """A picture, and the same as a request holds it."""
    grey = Image.radial_gradient("L").resize(size)
    data = encode(np.asarray(Image.merge("RGB", [grey, grey.point(lambda v: v // 2), grey])))
    return Image.open(io.BytesIO(data)), {"b64": base64.b64encode(data).decode()}


def flat(scored):
    return np.array([p for answers in scored for one in answers for p in one.probabilities])


def characteristics_of(predictor, faces, maps=None):
    return [one.characteristics for one in predictor.score_faces(faces, [()] * len(faces), maps)]


def test_answers_do_not_depend_on_what_they_are_batched_with(predictor, faces, maps):
    together = predictor.score(faces, [QUERIES] * 6, maps)
    alone = [predictor.score([face], [QUERIES], [shown])[0] for face, shown in zip(faces, maps, strict=True)]
    np.testing.assert_allclose(flat(together), flat(alone), atol=1e-5)
    written = predictor.generate_batch(faces, ["Describe this face."] * 6, 8, maps)
    scores = characteristics_of(predictor, faces, maps)
    assert [tuple(row) for row in scores] == [NAMES] * 6
    for row, face, shown, text in zip(scores, faces, maps, written, strict=True):
        assert predictor.generate(face, "Describe this face.", 8, [shown]) == text
        assert row == pytest.approx(characteristics_of(predictor, [face], [shown])[0], abs=1e-6)
        assert all(0 < value < 1 for value in row.values())


def test_a_map_matters_and_none_is_none(predictor, faces, maps):
    without, with_ = predictor.score(faces, [QUERIES] * 6), predictor.score(faces, [QUERIES] * 6, maps)
    assert abs(flat(without[:1]) - flat(with_[:1])).max() > 1e-4
    np.testing.assert_allclose(flat([without[1]]), flat([with_[1]]), atol=1e-5)
    assert flat(predictor.score(faces, [QUERIES] * 6, [None] * 6)) == pytest.approx(flat(without))
    assert characteristics_of(predictor, faces)[0] != characteristics_of(predictor, faces, maps)[0]


def test_prepared_maps_stay_as_they_are_and_withheld_classes_are_not_seen(predictor, maps):
    side = predictor.processor.image_processor.crop_size["height"]
    ready = predictor.map(maps[0])
    assert (ready.shape, ready.dtype) == ((side, side), np.uint8)
    assert (predictor.map(ready) == ready).all()
    assert (predictor.map(None) == NO_MAP).all()
    assert (predictor.map(predictor.map(None)) == NO_MAP).all()
    hat = np.full((side, side), 1, np.uint8)
    hat[: side // 2] = WITHHELD
    assert (predictor.map(hat) == 1).all()
    with pytest.raises(UserError, match="class numbers"):
        predictor.map(np.full((side, side), 19, np.uint8))


def test_scores_are_the_sigmoid_of_what_the_branch_says(predictor, faces, maps):
    pixels = torch.from_numpy(predictor.pixels(faces[0]))[None]
    values = normalise(pixels, predictor.processor.image_processor)
    with torch.no_grad():
        features = tower_features(predictor.model, values)
        visual = visual_tokens(predictor.model, features, torch.from_numpy(predictor.map(maps[0]))[None])
    expected = 1 / (1 + np.exp(-visual.scores_BA[0].double().numpy()))
    assert list(characteristics_of(predictor, faces[:1], maps[:1])[0].values()) == pytest.approx(expected, abs=1e-6)


def test_an_evaluation_takes_characteristics_from_the_pass_that_answers(predictor, conversations_table, tmp_path):
    words = ["bootstrap=100", "baseline_pixels=8", "generated_faces=0", "disturbed_faces=0", "batch_images=6"]
    chosen = settings.load(overrides=[f"evaluate.{word}" for word in [*words, "max_new_tokens=2"]])
    passed = []
    tower = predictor.model.model.vision_tower
    counted = tower.register_forward_hook(lambda _, __, found: passed.append(len(found.last_hidden_state)))
    table = conversations_table()
    evaluate(chosen, tmp_path, "m" * 64, table, tmp_path / "out", predictor=predictor)
    counted.remove()
    faces = list(open_table(table, CONVERSATIONS).iterate(["image_id", "images"], "test"))
    assert passed == [4, 2, 4, 2, 2, 2]  # one question of each face is closed, one is open, in parts of four
    alone = characteristics_of(predictor, [open_image(face) for face in faces])
    kept = list(open_table(tmp_path / "out" / "characteristics", CHARACTERISTICS).iterate())
    assert [row["image_id"] for row in kept] == [face["image_id"] for face in faces]
    for row, expected in zip(kept, alone, strict=True):
        assert mapping(row["scores"]) == pytest.approx(expected, abs=1e-6)
    (one,) = predictor.score_faces([open_image(faces[0])], [QUERIES])
    assert one.characteristics == pytest.approx(alone[0], abs=1e-6)


def test_a_plain_model_looks_at_no_map_and_has_no_scores(faces, maps):
    model, processor = build_tiny(settings.load(overrides=["model.segmentation.mode=none"]).model, TEXTS, ANSWERS, 3)
    plain = Predictor(model, processor)
    assert (plain.takes_maps, plain.characteristic_names) == (False, ())
    assert plain.score(faces, [QUERIES] * 6, maps) == plain.score(faces, [QUERIES] * 6)
    assert plain.generate_batch(faces, ["Describe this face."] * 6, 4, maps)
    assert characteristics_of(plain, faces, maps) == [{}] * 6


def test_a_picture_is_prepared_once_and_answers_are_the_same(predictor, served, monkeypatch):
    pictures, sent = zip(*(picture(size) for size in ((112, 128), (128, 112))), strict=True)
    asked = ("Is the person wearing a hat?", "What else does this face show?")
    instances = [{"image": image, "question": text, "characteristics": True} for image in sent for text in asked]
    query = Query(asked[0], ("yes", "no"))
    scored = predictor.score(pictures, [[query]] * 2)
    texts = predictor.generate_batch(pictures, ["What else does this face show?"] * 2, 4)
    scores = characteristics_of(predictor, pictures)

    prepared, tower = [], []
    measure = quality.measure  # of what is prepared, each time
    monkeypatch.setattr(quality, "measure", lambda *given: prepared.append(given) or measure(*given))
    monkeypatch.setattr(llava, "tower_features", lambda *given: tower.append(given) or tower_features(*given))
    found = served(instances)
    assert len(prepared) == 2
    assert len(tower) <= 2  # answers and characteristics of a face come from one pass
    for closed, open_, (one,), text, row in zip(found[::2], found[1::2], scored, texts, scores, strict=True):
        assert tuple(closed["scores"].values()) == pytest.approx(one.probabilities, abs=1e-6)
        assert open_["answer"] == text
        assert closed["characteristics"] == open_["characteristics"] == pytest.approx(row, abs=1e-6)


def test_the_server_answers_of_a_map_as_the_predictor_does(predictor, served, maps):
    face, image = picture((112, 128))
    shown = {"segmentation": {"b64": base64.b64encode(maps[0]).decode()}}
    hat = {"image": image, "question": "Is the person wearing a hat?", "characteristics": True}
    found = served([hat, {**hat, **shown}])
    query = Query(hat["question"], ("yes", "no"))
    pictures = [face, face]
    expected = predictor.score(pictures, [[query]] * 2, [None, maps[0]])
    for one, (scored,) in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(dict(zip(query.options, scored.probabilities, strict=True)), abs=1e-4)
    scores = characteristics_of(predictor, pictures, [None, maps[0]])
    assert [one["characteristics"] for one in found] == [pytest.approx(row, abs=1e-6) for row in scores]
    assert found[0]["scores"] != found[1]["scores"]
