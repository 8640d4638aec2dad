"""The training benchmark compares like with like: its peers minimise exactly our loss, over the same questions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from facemllm.tables import CONVERSATIONS, TableWriter
from tests.training_example import conversation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    from training_material import prepare, stage_of

    folder = tmp_path_factory.mktemp("bench")
    with TableWriter(folder / "table", CONVERSATIONS) as writer:
        writer.write(conversation(number) for number in range(6))
    stage = stage_of("frozen tower", 2, batch_images=3, turns_per_image=2)
    return prepare(folder / "laid out", folder / "table", stage, 2)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_peers_minimise_our_loss(material):
    from training_contenders import Ours
    from training_peers import Peer

    contenders = [Ours(material.folder), Peer(material.folder, "hf"), Peer(material.folder, "trl")]
    contenders += [Peer(material.folder, "hf", prepared=True)]
    ours, hf, trl, prepared = ([loss for _, _, loss in c.run(2, 1, "fp32")["marks"]] for c in contenders)
    assert len(ours) == 2
    np.testing.assert_allclose([hf, trl], [ours] * 2, rtol=1e-5)
    assert prepared == hf
    parts = Peer(material.folder, "hf", micro=3).run(1, 1, "fp32")["marks"][0][2]  # passes of a step add up to it
    assert parts == pytest.approx(hf[0], rel=1e-5)


@pytest.mark.parametrize("single", [False, True])
def test_ours_trains_on_the_first_faces_alone(material, single):
    from training_contenders import Ours

    some = Ours(material.folder, faces=3, single=single)
    every = Ours(material.folder, single=single)
    assert len(some.dataset.corpus) == len(every.dataset.corpus) // 2
    assert len(some.run(2, 1, "fp32")["marks"]) == 2


@pytest.mark.parametrize("turns", ["one", "many"])
def test_prepared_pictures_make_the_same_batch_and_open_no_file(material, turns, monkeypatch):
    import training_peers as peers

    _, processor = material.model()
    rows = list(peers.dataset(material.rows(), turns))
    plain, pixels = peers.collate(rows, processor), peers.prepare_pixels(rows, processor)
    monkeypatch.setattr(peers.Image, "open", None)
    prepared = peers.collate(rows, processor, pixels)
    assert plain.keys() == prepared.keys()
    for name, values in plain.items():
        assert torch.equal(values, prepared[name]), name


def test_only_answers_and_their_ends_are_labels(material):
    from training_peers import IGNORED, collate, dataset

    _, processor = material.model()
    rows = material.rows()[:1]
    batch = collate(list(dataset(rows, "many")), processor)
    kept = batch["labels"][0][batch["labels"][0] != IGNORED]
    said = "".join(f"{answer}</s>" for _, answer in rows[0]["turns"])
    assert processor.tokenizer.decode(kept).replace(" ", "") == said.lower().replace(" ", "")


def test_the_one_question_rows_are_those_of_the_dialogues(material):
    from training_peers import dataset

    rows = material.rows()
    one = [(row["images"], row["turns"]) for row in dataset(rows, "one")]
    many = [([row["image"]], list(turn)) for row in rows for turn in row["turns"]]
    assert json.dumps(one) == json.dumps(many)
