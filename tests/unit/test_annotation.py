"""The oracle's captions, the pieces of the Ray Data job, and how annotations join rows. No Ray is started here."""

import random
import re
from dataclasses import dataclass

import pytest

from facemllm import tasks
from facemllm.annotate import job
from facemllm.annotate.annotator import WORDING, Annotation, Oracle, caption, checked
from facemllm.annotate.run import annotate, joined
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.settings import load
from facemllm.tables import FACES, mapping, open_table, pairs, provenance
from facemllm.tasks.attributes import TASK as ATTRIBUTES
from facemllm.tasks.caption import FACTS, facts, facts_text
from facemllm.version.tombstones import Marks, Tombstones
from tests.asked import phrases_of
from tests.refusing import refuses


def labelled(number):
    """The labels of a face, drawn by chance over the whole vocabulary."""
    rng = random.Random(number)
    attributes = {}
    for item in ATTRIBUTES.items:
        if item.form == "choice":
            chosen = rng.randrange(len(item.options))
            attributes |= {option.value: place == chosen for place, option in enumerate(item.options)}
        else:
            attributes[item.name] = rng.random() < 0.4
    return {
        "image_id": digests.of_bytes(str(number).encode()),
        "attributes": pairs(attributes),
        "expression": rng.choice(["neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger"]),
        "age": float(rng.randrange(5, 86)),
        "gender": rng.choice(["female", "male"]),
        "yaw": rng.gauss(0, 22),
        "pitch": rng.gauss(0, 9),
        "roll": rng.gauss(0, 7),
    }


LABELLED = [labelled(number) for number in range(400)]
UNLABELLED = dict.fromkeys(LABELLED[0]) | {"image_id": "0" * 64}


@dataclass(frozen=True)
class Fake:
    """An annotator of few words that cannot stand one age."""

    name: str = "fake"
    digest: str = "f" * 64
    columns: tuple[str, ...] = ("age",)
    needs_image: bool = False
    dreaded: float = 25.0

    def annotate(self, rows):
        if any(row["age"] == self.dreaded for row in rows):
            raise RuntimeError("no reply")
        return [Annotation(caption=f"{row['age']}, {sorted(row)}", cost=0.5) for row in rows]


def test_captions_state_exactly_the_facts_of_the_labels_in_few_other_words_and_vary():
    phrases = sorted({text for item in FACTS for text in phrases_of(item)}, key=len, reverse=True)
    known = re.compile("|".join(rf"\b{phrase}\b" for phrase in phrases))
    captions, others = [caption(row) for row in LABELLED], set()
    for row, text in zip(LABELLED, captions, strict=True):
        assert tasks.get("caption").item("caption").parse(text) == facts_text(facts(row)), text
        said = {item.name: item.mention(label) for item in FACTS if (label := item.label(row)) is not None}
        places = {name: text.find(phrase) for name, phrase in said.items() if phrase is not None}
        assert min(places.values()) >= 0
        looks = [places[item.name] for item in tasks.get("attributes").items if item.name in places]
        assert looks == sorted(looks), "what the face looks like is listed in one order"
        others.update(re.findall(r"\w+", known.sub(" ", text)))
    assert len(others) <= 20, sorted(others)
    orders = {tuple(re.findall(r"years old|woman|man|hair|eyes|degrees|looks|is", text)) for text in captions}
    assert len(orders) > 100
    assert len({text.split()[1] for text in captions}) >= 5
    first = [text.find(" years old") < text.find("man") for text in captions]
    assert 0.2 < sum(first) / len(first) < 0.8


def test_captions_depend_on_the_row_alone():
    row = LABELLED[0]
    assert caption(row) == caption(dict(row)) == Oracle().annotate([LABELLED[1], row])[1].caption
    assert len({caption(row | {"image_id": str(n)}) for n in range(20)}) > 10


def test_captions_of_few_labels_are_sentences():
    assert caption(UNLABELLED | {"gender": "female"}).endswith(" a woman.")
    assert caption(UNLABELLED | {"roll": 0.0}) in ("The head is upright.", "The face is upright.")
    hat = caption(UNLABELLED | {"attributes": pairs({"Wearing_Hat": True, "Bangs": False})})
    assert hat in ("The person has a hat.", "The face has a hat.")
    refuses("no label", caption, UNLABELLED, error=ValueError)


def test_pieces_cover_every_row_group_once_and_in_order(faces_table, face_rows):
    table = open_table(faces_table(face_rows(40) * 16, shard_mb=0), FACES)
    assert [shard["rows"] for shard in table.manifest["shards"]] == [128] * 5
    whole = open_table(faces_table(face_rows(40) * 16, name="whole"), FACES)
    (shard,) = whole.manifest["shards"]
    path = str(whole.path / shard["name"])
    assert [groups for _, groups in job._pieces(table, 1000)] == [(0,)] * 5
    assert job._pieces(whole, 250) == [(path, (0, 1)), (path, (2, 3)), (path, (4,))]
    assert job._pieces(whole, 1) == [(path, (n,)) for n in range(5)]


def test_a_row_that_fails_is_told_apart_from_its_batch_and_only_what_is_read_is_loaded(faces_table):
    table = open_table(faces_table(), FACES)
    (piece,) = job._pieces(table, 1000)
    for batch_size in (1, 7, 1000):
        replies = job._annotate(Fake(), piece, batch_size).to_pylist()
        assert [r["image_id"] for r in replies] == [row["image_id"] for row in table.iterate(["image_id"])]
        refused = {number: r["reason"] for number, r in enumerate(replies) if r["reply"] is None}
        assert refused == {5: "RuntimeError: no reply"}
        assert "['age', 'image_id']" in replies[0]["reply"]
    reply = job._annotate(Fake(needs_image=True), piece, 10).to_pylist()[0]["reply"]
    assert "['age', 'image', 'image_id']" in reply


def test_annotations_that_do_not_fit_the_table_are_refused():
    labels = ({"name": "who"}, {"age": "old"}, {"attributes": {"Bald": "yes"}})
    for annotation in (Annotation(caption=" "), *(Annotation(labels=one) for one in labels)):
        with pytest.raises((ValueError, TypeError)):
            checked(annotation)


def test_an_annotator_fills_gaps_and_never_overwrites_a_source(face_rows):
    row = dict.fromkeys(FACES.names) | face_rows(1)[0] | {"source": "celeba", "age": None}
    row["attributes"] = pairs({"Bald": False})
    labels = {"age": 31.0, "gender": "male", "attributes": {"Bald": True, "Smiling": True}}
    new = joined(row, Annotation(caption="A woman.", labels=labels, cost=0.25), "d" * 64)
    assert (new["caption"], new["age"], new["gender"]) == ("A woman.", 31.0, "female")
    assert mapping(new["attributes"]) == {"Bald": False, "Smiling": True}
    origins = {(entry["field"], entry["origin"]) for entry in new["provenance"]}
    assert {f for f, origin in origins if origin == "annotator"} == {"age", "attributes", "caption"}
    assert {("gender", "source"), ("attributes", "source"), ("yaw", "source")} <= origins
    assert ("age", "source") not in origins
    assert sum(entry["cost"] for entry in new["provenance"]) == 0.25
    assert {entry["model_digest"] for entry in new["provenance"] if entry["origin"] == "annotator"} == {"d" * 64}
    assert row["caption"] == "A face."


def test_provenance_of_rendered_labels_names_the_renderer(face_rows):
    row = dict.fromkeys(FACES.names) | face_rows(1)[0]
    entries = joined(row, Annotation(caption="A face, again."), "d" * 64)["provenance"]
    origin = {entry["field"]: entry["origin"] for entry in entries}
    assert origin["caption"] == "annotator"
    assert origin["expression"] == origin["segmentation"] == origin["landmarks"] == "renderer"
    assert "ethnicity" not in origin
    assert [entry["field"] for entry in entries] == sorted(entry["field"] for entry in entries)
    again = joined(row | {"provenance": entries}, Annotation(caption="A face, again."), "d" * 64)["provenance"]
    assert again == entries


def test_annotate_refuses_an_existing_output_before_it_starts_ray(faces_table, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_ray", lambda concurrency: pytest.fail("Ray was started"))
    faces = faces_table()
    refuses("exists already", annotate, load("laptop"), faces, faces)
    refuses("is not a table", annotate, load("laptop"), tmp_path / "none", tmp_path / "out")


def test_a_caption_of_the_sources_own_stays(face_rows):
    (row,) = face_rows(1)
    row = {**dict.fromkeys(FACES.names), **row, "provenance": [provenance("caption", "source")]}
    again = joined(row, Annotation(caption="Something else."), "d" * 64)
    said = next(entry for entry in again["provenance"] if entry["field"] == "caption")
    assert (again["caption"], said["origin"]) == ("A face.", "source")
    row["provenance"] = [provenance("caption", "annotator")]
    assert joined(row, Annotation(caption="Something else."), "d" * 64)["caption"] == "Something else."
    nothing = {"image_id": "0" * 64, "caption": "A face.", "attributes": []}
    assert Oracle().annotate([nothing]) == [Annotation()]
    refuses("no label", Oracle().annotate, [{**nothing, "caption": None}], error=ValueError)


def test_a_table_with_forgotten_rows_is_not_described(face_rows, faces_table, tmp_path):
    settings = load("laptop", [f"storage.home={tmp_path / 'home'}"])
    rows = face_rows(4)
    marks = Marks(image=frozenset({rows[0]["image_id"]}))
    Tombstones.of(settings).add("image", marks, reason="asked for it", by="Ada Lovelace")
    with pytest.raises(UserError, match="1 of 4 rows were forgotten and must not come back"):
        annotate(settings, faces_table(rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_oracles_digest_follows_its_words():
    """Whoever changes a phrase raises `WORDING`, and these two values: tables of other words have another annotator."""
    pinned = "37d0186cfae8ef1e171ceadf54f0ca93cfd3c5aaaf8c7ac3dc66a392c32cf0d8"
    assert (WORDING, digests.of_json([caption(row) for row in LABELLED])) == (2, pinned)
    assert Oracle().digest == digests.of_json(["oracle", WORDING])
