"""What a worker loads: branches as the settings ask for, and data that they can learn from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from facemllm import settings
from facemllm.errors import UserError
from facemllm.model.branches import NO_MAP, has_map
from facemllm.model.face_mllm import branches_of
from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inputs import normalise
from facemllm.model.tiny import build_tiny
from facemllm.train import monitor, worker
from facemllm.train.caption_words import CaptionWords, word_statistics
from facemllm.train.corpus import Texts
from facemllm.train.data import vocabulary_texts
from facemllm.train.smoothing import NumberSmoothing
from tests.refusing import refuses
from tests.training_example import TASKS, stage, trains

MAPS = ("model.image_size=32", "model.segmentation.mode=append", "reformat.held_out=[]")


@pytest.fixture(scope="module")
def plain(full_toy, tmp_path_factory):
    """A base without branches."""
    made = build_tiny(full_toy.settings.model, *vocabulary_texts(full_toy.turns), 1)
    return saved(tmp_path_factory.mktemp("bases") / "plain", *made)


@pytest.fixture(scope="module")
def mapped(full_toy, plain, tmp_path_factory):
    """A base with a branch of maps."""
    model, processor, _ = load(full_toy, None, *MAPS, "model.preset=hub", f"model.base={plain}")
    return saved(tmp_path_factory.mktemp("bases") / "mapped", model, processor)


def saved(folder: Path, model, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(full_toy, base: Path | None, *overrides: str) -> tuple:
    return worker.load(settings.load("laptop", list(overrides)), full_toy.table, base, full_toy.cache)


def test_a_plain_checkpoint_is_extended_and_the_next_stage_goes_on_from_it(full_toy, mapped):
    model, processor, dataset = load(full_toy, mapped, *MAPS)
    assert branches_of(model, processor)["model.segmentation.mode"] == "append"
    assert dataset.maps is not None
    published = ("model.preset=hub", f"model.base={mapped}")
    again, _, _ = load(full_toy, None, *MAPS, *published)
    assert type(again) is type(model), "a published one that has its branches is taken as it is"
    with pytest.raises(UserError, match=r"model\.segmentation\.mode: append -> add"):
        load(full_toy, None, *MAPS, *published, "model.segmentation.mode=add")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.segmentation.mode=none",), r"model\.segmentation\.mode: append -> none"),
        (("model.segmentation.mode=add",), r"model\.segmentation\.mode: append -> add"),
        (("model.segmentation.tokens=5",), r"model\.segmentation\.tokens: \d+ -> 5"),
        (("model.segmentation.layers=1", "model.segmentation.width=32"), r"segmentation\.layers: .* -> 1, .*width"),
        (("model.knowledge.enabled=true",), r"model\.knowledge\.enabled: False -> True"),
        (("reformat.held_out=[Eyeglasses]",), r"withheld for reformat\.held_out: nothing -> \[3\]"),
    ],
)
def test_branches_other_than_the_base_has_are_refused(full_toy, mapped, overrides, message, monkeypatch):
    monkeypatch.setattr(worker, "characteristics", lambda names, turns: None)  # the full_toy's turns have no real tasks
    refuses(
        rf"mapped has other branches than the settings ask for .*{message}", load, full_toy, mapped, *MAPS, *overrides
    )


def test_branches_are_not_asked_of_an_earlier_stage_without_them(full_toy, plain):
    assert load(full_toy, plain, "model.image_size=32")[2].maps is None
    refuses(r"plain has other .*mode: none -> append\); set them as the model has them", load, full_toy, plain, *MAPS)


def test_a_branch_that_would_learn_nothing_is_refused(full_toy):
    plan = stage()
    assert monitor.shortfalls("align", plan, full_toy.dataset) == {}
    blind = replace(full_toy.dataset, maps=np.full_like(full_toy.dataset.maps, 255))
    said = r"model\.segmentation would learn nothing in stage align: no training face"
    refuses(said, monitor.shortfalls, "align", plan, blind)
    mute = replace(full_toy.dataset, labels=np.full_like(full_toy.dataset.labels, -1))
    said = r"model\.knowledge would learn nothing .* none of the model's 4 characterist"
    refuses(said, monitor.shortfalls, "align", plan, mute)
    frozen = stage(trains=trains(language="full"))
    assert monitor.shortfalls("align", frozen, blind) == {"faces_with_map": 0}


def test_a_branch_that_learns_little_is_told(full_toy):
    maps = np.full((400, 2, 2), 255, np.uint8)
    maps[7] = 1
    labels = full_toy.dataset.labels.copy()
    labels[:, 1:3] = -1
    corpus = replace(full_toy.corpus, pixel_row=np.arange(400))
    found = monitor.shortfalls("align", stage(), replace(full_toy.dataset, corpus=corpus, maps=maps, labels=labels))
    assert found == {"faces_with_map": 1 / 400, "characteristics_untold": 2}
    assert monitor.in_words(found) == ", maps of 0.25% of the faces only, 2 characteristics untold"
    assert monitor.in_words({}) == ""


def as_they_are(corpus, vocabulary: int) -> NumberSmoothing:
    return NumberSmoothing(corpus, 0.0, vocabulary, torch.device("cpu"))


def test_image_and_map_tell_the_words_apart_and_a_face_without_a_map_by_its_image(full_toy):
    only = {"tower": "full", "projector": "full", "segmentation": "full", "embeddings": "full"}
    plan = stage(objective="caption_words", batch_images=12, augment=False, trains=trains(**only))
    model = full_toy.fresh()[0].eval()
    [batch] = full_toy.batches(plan)
    there = has_map(batch.maps_BSS)
    assert 0 < there.sum() < len(there)
    words = CaptionWords(full_toy.corpus, TASKS, as_they_are(full_toy.corpus, len(full_toy.processor.tokenizer)))
    with torch.no_grad():
        pixels = normalise(batch.pixels_BSSC.float(), full_toy.processor.image_processor)
        image, shown = visual_tokens(model, tower_features(model, pixels), batch.maps_BSS).views
        alone = words.loss(model, image, batch.words_BV) / 12
        both = alone + words.loss(model, shown[there], batch.words_BV[there]) / 12
    report, gradients = full_toy.gradients(model, plan, [batch])
    torch.testing.assert_close(report[1], both, rtol=1e-5, atol=0)
    assert gradients["model.segmentation.classes.weight"].any()

    none = replace(batch, maps_BSS=torch.full_like(batch.maps_BSS, NO_MAP))
    report, gradients = full_toy.gradients(model, plan, [none])
    torch.testing.assert_close(report[1], alone, rtol=1e-5, atol=0)
    assert not gradients["model.segmentation.classes.weight"].any()


def test_statistics_of_caption_words_are_those_counted_one_by_one(full_toy):
    corpus, tasks = full_toy.corpus, {"caption": 1.0, "attributes": 0.5}
    size = len(full_toy.processor.tokenizer)
    found = word_statistics(replace(corpus, fact=np.full_like(corpus.fact, -1)), tasks, size)
    count, pairs = np.zeros(size), np.zeros((size, size))
    for row in range(len(corpus)):
        for mirror in (0, 1):
            turns = range(*corpus.turn_starts[row : row + 2])
            chosen = [corpus.answer[t, mirror] for t in turns if corpus.tasks[corpus.task[t]] in tasks]
            words = np.unique(np.concatenate([corpus.texts[text] for text in chosen]))
            count[words] += 0.5
            pairs[np.ix_(words, words)] += 0.5
    used = np.flatnonzero(count)
    assert found.used_U.tolist() == used.tolist()
    np.testing.assert_array_equal(found.share_U, count[used] / len(corpus))
    np.testing.assert_array_equal(found.beside_UU, pairs[np.ix_(used, used)])


def test_words_that_no_answer_goes_with_are_left_out(full_toy):
    corpus = full_toy.corpus
    found = word_statistics(corpus, {"caption": 1.0}, len(full_toy.processor.tokenizer))
    words = set(full_toy.processor.tokenizer.convert_ids_to_tokens(found.used_U.tolist()))
    everything = word_statistics(
        replace(corpus, fact=np.full_like(corpus.fact, -1)), {"caption": 1.0}, len(full_toy.processor.tokenizer)
    )
    assert set(found.used_U) < set(everything.used_U)
    # by hand: a word is in captions, a fact among the answers, face by face
    has_BU = np.zeros((len(corpus), len(everything.used_U)))
    facts: dict[int, np.ndarray] = {}
    for row in range(len(corpus)):
        for turn in range(*corpus.turn_starts[row : row + 2]):
            if corpus.tasks[corpus.task[turn]] == "caption":
                has_BU[row] = np.maximum(has_BU[row], np.isin(everything.used_U, corpus.texts[corpus.answer[turn, 0]]))
            if corpus.fact[turn] >= 0:
                facts.setdefault(int(corpus.fact[turn]), np.zeros(len(corpus)))[row] = 1
    with np.errstate(invalid="ignore"):
        ties = [
            max(abs(np.nan_to_num(np.corrcoef(has_BU[:, at], true)[0, 1])) for true in facts.values())
            for at in range(len(everything.used_U))
        ]
    kept = [token for token, tie in zip(everything.used_U.tolist(), ties, strict=True) if tie >= 0.25]
    assert found.used_U.tolist() == kept
    assert words
    alike = replace(corpus, fact=np.where(corpus.fact >= 0, 0, -1))  # every face has the one answer
    assert word_statistics(alike, {"caption": 1.0}, len(full_toy.processor.tokenizer)).used_U.tolist() == (
        everything.used_U.tolist()
    )


def test_caption_words_of_a_large_vocabulary_take_the_memory_of_those_in_use(full_toy):
    vocabulary, corpus = 2_000_000, full_toy.corpus  # all pairs of which would fill 16 terabytes
    far = replace(corpus, texts=Texts(corpus.texts.ids + np.int32(vocabulary - 1000), corpus.texts.starts))
    small = CaptionWords(corpus, TASKS, as_they_are(corpus, len(full_toy.processor.tokenizer)))
    large = CaptionWords(far, TASKS, as_they_are(far, vocabulary))
    assert torch.equal(large.used_U, small.used_U + vocabulary - 1000)
    assert torch.equal(large.rivals_UU, small.rivals_UU)
    assert torch.equal(large.weight_U, small.weight_U)
