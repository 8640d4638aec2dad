"""What training reads: pictures, maps, turns and their mirror images."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from facemllm import settings
from facemllm.model.branches import NO_MAP
from facemllm.model.families import family_of
from facemllm.model.tiny import build_tiny
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from facemllm.tables.schemas import SEGMENTATION
from facemllm.train.augment import Changes, apply_changes, apply_to_maps
from facemllm.train.corpus import HEAVIEST
from facemllm.train.data import TRUE, mirror_text, read_turns, tokenise, vocabulary_texts
from facemllm.train.packing import word_bags
from facemllm.train.pixels import pixel_cache
from tests.conftest import messages_of
from tests.training_example import COLORS, SIDES, conversation


def decoded(toy, text):
    return toy.processor.tokenizer.decode(toy.corpus.texts[text])


def second_mirrored(shift):
    """Changes of two pictures: the second is mirrored."""
    plain = np.ones((2, 1, 1, 1), np.float32), np.zeros((2, 1, 1, 3), np.float32)
    return Changes(np.array([False, True]), np.array(shift), *plain)


def test_mirrored_faces_are_asked_and_answered_mirrored(toy):
    words = "Turned left, LEFT of Right; leftover upright"
    assert mirror_text(words) == "Turned right, RIGHT of Left; leftover upright"
    corpus = toy.corpus
    swapped = 0
    for turn in range(len(corpus.task)):
        plain, mirrored = (decoded(toy, corpus.answer[turn, m]) for m in (0, 1))
        assert mirrored == mirror_text(plain)
        swapped += plain != mirrored
    assert swapped == 2 * len(corpus)  # head pose and caption of every face
    pose = toy.processor.tokenizer.convert_tokens_to_ids(list(SIDES))
    bags = word_bags(corpus, [np.array([0]), np.array([0])], np.array([False, True]), len(toy.processor.tokenizer))
    assert bags[0, pose].tolist() == bags[1, pose].tolist()[::-1] != [0, 0]


def test_a_mirrored_picture_is_the_mirrored_picture(toy):
    pixels = torch.from_numpy(np.array(toy.pixels[:2]))
    changed = apply_changes(pixels, second_mirrored([[0, 0], [0, 0]]))
    torch.testing.assert_close(changed[0], pixels[0].float())
    torch.testing.assert_close(changed[1], pixels[1].flip(1).float())


def test_pixels_are_decoded_once_and_in_row_order(toy):
    path = next(toy.cache.glob("*.npy"))
    written = path.stat().st_mtime_ns
    again = pixel_cache(toy.table, toy.family, toy.cache)
    assert path.stat().st_mtime_ns == written
    assert again.shape == (40, 32, 32, 3)
    assert toy.corpus.pixel_row.tolist() == [n for n in range(40) if n % 5 != 4]
    red = [n for n in range(40) if n % 3 == 0]
    assert (again[red].mean((1, 2)).argmax(1) == 0).all()
    assert not list(toy.cache.glob("*.partial"))


def test_turns_stay_with_their_pictures_in_a_table_of_many_batches(tmp_path):
    one = conversation(0)

    def row(number):
        made = copy.deepcopy(one) | {"split": "train" if number % 3 else "test"}
        made["conversation_id"], made["image_id"] = f"c{number}", f"i{number}"
        made["messages"][-1]["content"][0]["text"] = f"answer {number}"
        made["turns"] = made["turns"][: 4 - number % 2]  # three or four turns
        made["messages"] = made["messages"][: 8 - 2 * (number % 2)]
        made["messages"][1]["content"][0]["text"] = f"caption {number}"
        return made

    with TableWriter(tmp_path / "many", CONVERSATIONS) as writer:
        writer.write(row(number) for number in range(1100))
    turns = read_turns(open_table(tmp_path / "many", CONVERSATIONS), "train")
    numbers = [number for number in range(1100) if number % 3]
    assert turns.pixel_row.tolist() == numbers
    assert turns.count.tolist() == [4 - number % 2 for number in numbers]
    first = np.concatenate([[0], np.cumsum(turns.count)[:-1]])
    assert turns.answer.take(first).to_pylist() == [f"caption {number}" for number in numbers]
    assert set(turns.question.take(first).to_pylist()) == {"Describe this face."}


def test_a_vocabulary_is_of_questions_and_answers_mirrored_too(toy):
    texts, answers = vocabulary_texts(toy.turns)
    caption = "A face with red hair; head turned 25 degrees left."
    assert {"Which hair?", caption, mirror_text(caption)} <= set(texts)
    assert set(answers) == {"yes", "no", *COLORS, *SIDES}


def test_a_question_that_follows_begins_as_a_later_one(toy, tmp_path):
    row = conversation(0)
    row["messages"][4]["content"][0]["text"] = row["messages"][2]["content"][0]["text"]  # one wording, two places
    row["turns"][2]["follows"] = True
    with TableWriter(tmp_path / "talk", CONVERSATIONS) as writer:
        writer.write([row])
    first, rest = toy.frame.first
    frame = replace(toy.frame, later=(f"A face. {first}", rest))  # the tiny template begins all questions alike
    corpus = tokenise(read_turns(open_table(tmp_path / "talk", CONVERSATIONS), "train"), frame)
    assert corpus.follows.tolist() == [False, False, True, False]
    said = [corpus.texts[text].tolist() for text in corpus.prompt[:, 0]]
    assert said[1] == frame.prompt("Which hair?")
    assert said[2] == frame.prompt("Which hair?", follows=True)
    assert said[1] != said[2]
    assert corpus.texts[corpus.prompt[2, 1]].tolist() == said[2]  # mirrored it reads the same, and still follows


def test_some_questions_have_words_in_pieces_by_the_seed_and_read_as_they_were(toy):
    plain, often, again, other = (
        tokenise(toy.turns, toy.frame, spelled=share, seed=seed)
        for share, seed in ((0, 1), (0.5, 1), (0.5, 1), (0.5, 2))
    )

    def ids(corpus, column=0):
        return [corpus.texts[text].tolist() for text in corpus.prompt[:, column]]

    assert ids(plain) == ids(toy.corpus)
    assert ids(often) == ids(again) != ids(other)
    moved = [one != changed for one, changed in zip(ids(plain), ids(often), strict=True)]
    assert 0.1 < sum(moved) / len(moved) <= 0.6
    decode = toy.processor.tokenizer.decode
    for column in (0, 1):
        assert list(map(decode, ids(often, column))) == list(map(decode, ids(plain, column)))
    assert [often.texts[t].tolist() for t in often.answer[:, 0]] == [
        plain.texts[t].tolist() for t in plain.answer[:, 0]
    ]
    assert len(often.texts) < 2 * len(plain.texts)


def test_statements_about_an_item_share_its_weight_and_so_much_of_it_is_true(toy, tmp_path):
    row = conversation(0)
    claims = {"red hair": "true", "blue hair": "false", "green hair": "false", "gray hair": "false"}
    messages = messages_of((f"True or false: {name}.", said) for name, said in claims.items())
    row["messages"] += [{**one, "content": one["content"][-1:]} for one in messages]
    for place, said in enumerate(claims.values()):
        about = {"sample_id": f"0-{4 + place}", "task": "attributes", "form": "boolean", "follows": False}
        row["turns"].append(
            {**about, "template": f"hair:statement/{place}", "options": ["true", "false"], "answer": said}
        )
    with TableWriter(tmp_path / "claims", CONVERSATIONS) as writer:
        writer.write([row])
    corpus = tokenise(read_turns(open_table(tmp_path / "claims", CONVERSATIONS), "train"), toy.frame)
    np.testing.assert_allclose(corpus.share, [1, 1, 1, 1, TRUE, *[(1 - TRUE) / 3] * 3])
    weights = corpus.weights({"attributes": 2.0}, {"native": 1.0, "statement": 0.5})
    np.testing.assert_allclose(weights[4:], corpus.share[4:])
    assert (corpus.class_weights(1.0)[4:] == 1).all(), "how many are drawn of either is decided already"


def test_classes_weigh_by_their_share_and_never_too_much(toy):
    fact, item = np.array([5] * 999 + [6, 7, 8, 8, 8, -1, 9]), np.array([1] * 1000 + [2] * 4 + [-1, -1])
    corpus = replace(toy.corpus, fact=fact, item=item)
    assert (corpus.class_weights(0.0) == 1).all()
    weights = corpus.class_weights(0.5)
    assert weights[999] == HEAVIEST  # unbounded it would be 31
    mean = (0.25 * 0.25**-0.5) + (0.75 * 0.75**-0.5)
    np.testing.assert_allclose(weights[1000:], [0.25**-0.5 / mean, *[0.75**-0.5 / mean] * 3, 1, 1], rtol=1e-6)
    assert weights[1000:1004].mean() == pytest.approx(1)


def test_two_sizes_of_picture_share_a_cache_and_nothing_else(toy, tmp_path):
    small = pixel_cache(toy.table, toy.family, tmp_path)
    model = settings.load("laptop", ["model.image_size=64"]).model
    larger, processor = build_tiny(model, *vocabulary_texts(toy.turns), 1)
    large = pixel_cache(toy.table, family_of(larger.config, processor), tmp_path)
    assert (small.shape, large.shape) == ((40, 32, 32, 3), (40, 64, 64, 3))
    assert len(list(tmp_path.glob("*.npy"))) == 2
    again = pixel_cache(toy.table, toy.family, tmp_path)
    assert (again == small).all()


def test_a_mirrored_map_is_the_mirrored_map_with_sides_renamed():
    left, right, lip = (SEGMENTATION.index(name) for name in ("l_eye", "r_eye", "l_lip"))
    maps = np.zeros((2, 8, 8), np.uint8)
    maps[:, 1, 2], maps[:, 1, 6], maps[:, 5, 3], maps[:, 7, 7] = left, right, lip, NO_MAP
    changes = second_mirrored([[0, 0], [1, 0]])
    plain, mirrored = apply_to_maps(torch.from_numpy(maps), changes)
    assert (plain.numpy() == maps[0]).all()
    assert mirrored[0, 1] == left  # what stood right of the middle as r_eye, one row up
    assert mirrored[0, 5] == right
    assert mirrored[4, 4] == lip  # the lower lip has no side
    assert mirrored[6, 0] == NO_MAP
    twice = apply_to_maps(mirrored[None], changes.part(slice(1, 2)))[0]
    assert (twice[:4].numpy() == maps[1][2:6]).all()
