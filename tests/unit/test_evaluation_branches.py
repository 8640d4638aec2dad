"""Evaluation of a model with both branches: what its maps are worth, and its scores beside its answers."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from facemllm import settings as settings_module
from facemllm.errors import UserError
from facemllm.evaluate.run import evaluate, score
from facemllm.scoring.calibration import CHARACTERISTICS
from facemllm.tables import PREDICTIONS, mapping, open_table

pytestmark = pytest.mark.usefixtures("no_torch")

FEMALE = {8, 9, 10}  # classes that fill the maps of the test split's women; its men have others


class SeesMaps:
    """Reads the sex from the map alone: without one it says female."""

    takes_maps = True
    characteristic_names = ("gender=female", "gender=male")

    def __init__(self):
        self.shown = []

    def score_faces(self, images, questions, maps):
        self.shown += maps
        found = []
        for asked, parts in zip(questions, map(read, maps), strict=True):
            scores = dict(zip(self.characteristic_names, self._scores(parts), strict=False))
            found.append(SimpleNamespace(answers=[self._one(query, parts) for query in asked], characteristics=scores))
        return found

    def _one(self, query, parts):
        woman = parts is None or parts in FEMALE
        chances = [0.9 if woman == ("female" in option or "woman" in option) else 0.1 for option in query.options]
        return SimpleNamespace(probabilities=tuple(chances), greedy=max(range(2), key=chances.__getitem__))

    def generate_batch(self, images, questions, max_new_tokens, maps):
        return ["A face."] * len(images)

    def _scores(self, parts):
        if parts == 18:
            return 0.7, 0.7  # of a man: one right, one wrong, and together impossible
        woman = parts is None or parts in FEMALE
        return (0.8, 0.2) if woman else (0.2, 0.8)


def read(png):
    if png is None:
        return None
    with Image.open(io.BytesIO(png)) as image:
        return image.getpixel((0, 0))


@pytest.fixture
def table(conversations_table, conversation_rows, face_rows):
    """Conversations with maps, all but those of one man of the test split."""
    faces = face_rows()
    rows = conversation_rows(faces)
    for number, (row, face) in enumerate(zip(rows, faces, strict=True)):
        row["segmentation"] = None if number == 39 else face["segmentation"]
    return conversations_table(rows)


def chosen(*more):
    words = ["bootstrap=100", "baseline_pixels=8", "generated_faces=2", "disturbed_faces=8", "batch_images=3"]
    return settings_module.load("laptop", [f"evaluate.{word}" for word in (*words, *more)])


def test_maps_and_scores_are_measured(table, tmp_path):
    fake = SeesMaps()
    metrics = evaluate(chosen(), tmp_path, "m" * 64, table, tmp_path / "out", predictor=fake)
    assert metrics["maps"] == {"faces": 8, "given": 7}
    assert metrics["tasks"]["gender"]["also"]["accuracy"]["value"] == 7 / 8
    kinds = metrics["disturbed"]
    assert list(kinds) == ["blur", "dark", "jpeg", "no_map", "noise", "occlusion"]
    trained = {"blur": True, "dark": True, "occlusion": True, "jpeg": False, "noise": False, "no_map": None}
    assert {kind: body["trained"] for kind, body in kinds.items()} == trained
    assert kinds["blur"]["change"]["value"] == 0  # pictures say nothing here
    assert kinds["no_map"]["change"]["value"] == pytest.approx(0.5 - 7 / 8)
    assert sum(shown is None for shown in fake.shown) == 1 + 5 + 8
    assert open_table(tmp_path / "out" / "predictions", PREDICTIONS).manifest["about"]["maps"] is True
    assert "maps" not in open_table(tmp_path / "out" / "disturbed" / "no_map").manifest["about"]

    rows = list(open_table(tmp_path / "out" / "characteristics", CHARACTERISTICS).iterate())
    assert len(rows) == 8
    assert all(set(mapping(row["scores"])) == set(SeesMaps.characteristic_names) for row in rows)
    found = metrics["characteristics"]
    assert found["n"] == 16
    # the man without a map is wrong twice, another once
    assert [found[name]["value"] for name in ("scores", "text", "agreement")] == [13 / 16, 14 / 16, 15 / 16]
    assert found["scores"]["low"] <= 13 / 16 <= found["scores"]["high"]
    female, male = found["by_characteristic"]
    assert (female["name"], female["n"], female["yes"]) == ("gender=female", 8, 0.5)
    assert female["scores"] == {"accuracy": 0.75, "balanced_accuracy": 0.75}
    assert male["text"] == {"accuracy": 0.875, "balanced_accuracy": 0.875}
    assert found["balanced"] == {"scores": (0.75 + 0.875) / 2, "text": 0.875}
    (relation,) = found["relations"]["by_relation"]
    assert relation["relation"] == "exactly one of gender=female, gender=male"
    assert (relation["n"], relation["scores"], relation["text"], relation["labels"]) == (8, 1 / 8, 0, 0)
    # fourteen at a confidence of .8, two at .7, of which one is right
    assert [(b["n"], round(b["confidence"], 6)) for b in found["bins"]] == [(2, 0.7), (14, 0.8)]
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.7) + 14 * abs(12 / 14 - 0.8)) / 16)
    again = score(chosen(), table, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["characteristics"] == again["characteristics"]


def test_maps_can_be_left_out_and_a_plain_model_has_no_scores(table, tmp_path):
    class Plain(SeesMaps):
        takes_maps = False
        characteristic_names = ()

    for fake, words in ((SeesMaps(), ("maps=false",)), (Plain(), ())):
        out = tmp_path / type(fake).__name__
        metrics = evaluate(chosen(*words), tmp_path, "m" * 64, table, out, predictor=fake)
        assert set(fake.shown) == {metrics["maps"]} == {None}
        assert "no_map" not in metrics["disturbed"]
    assert metrics["characteristics"] is None
    assert not (out / "characteristics").exists()


def test_a_broken_map_ends_the_evaluation_and_leaves_nothing(table, tmp_path):
    class Strict(SeesMaps):
        def score_faces(self, images, questions, maps):
            raise UserError("the segmentation map is no readable PNG")

    with pytest.raises(UserError, match="no readable PNG"):
        evaluate(chosen(), tmp_path, "m" * 64, table, tmp_path / "out", predictor=Strict())
    assert not (tmp_path / "out").exists()
