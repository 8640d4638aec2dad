"""Options of families whose questions cannot share a row go on from copies of one cache, and are scored as one option a
pass; where a cache cannot be copied, or goes on otherwise, each has a row."""

from functools import cache

import numpy as np
import pytest
import torch

from facemllm.model import unpacked
from facemllm.model.families import Generic
from facemllm.model.inference import Predictor, Query
from facemllm.model.pretrained import load_model
from tests.families import SIDES, small
from tests.unit.test_predictor_families import one_a_pass, pictures

UNPACKED = ("paligemma", "qwen3_5")
MANY = Query("How old is she?", ("3", "12 or so", *map(str, range(20, 70, 5)), "a person of many years"))
QUERIES = [Query("Is there a beard?", ("yes", "no")), MANY, Query("Age?", ("30", "")), Query("Grey?", ("yes, grey",))]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    torch.set_num_threads(1)

    @cache
    def one(name):
        folder = small(name, tmp_path_factory.mktemp(name) / name)
        return lambda: Predictor(*load_model(folder, image_size=SIDES[name]))

    return lambda name: one(name)()


def answers_as_one_a_pass(predictor):
    shown = pictures(predictor)
    asked = [QUERIES, QUERIES[1:]]
    for picture, queries, scored in zip(shown, asked, predictor.score(shown, asked), strict=True):
        for query, one in zip(queries, scored, strict=True):
            assert one.probabilities == pytest.approx(one_a_pass(predictor, picture, query), abs=1e-5)


@pytest.mark.parametrize("name", UNPACKED)
def test_options_that_go_on_from_a_cache_are_scored_as_one_a_pass(opened, name, monkeypatch):
    assert len(MANY.options) > unpacked.COPIES
    predictor, begun, whole = opened(name), [], []
    predictor.score(pictures(predictor, 1), [QUERIES[:1]])  # which tries the cache
    family = predictor.family
    monkeypatch.setattr(family, "begun", lambda *given: begun.append(given) or type(family).begun(family, *given))
    monkeypatch.setattr(family, "plain", lambda *given: whole.append(given))
    answers_as_one_a_pass(predictor)
    assert not whole
    assert len(begun) == (7 if name == "paligemma" else 2), "a question, or a picture, passes once"


@pytest.mark.parametrize("name", UNPACKED)
def test_whole_rows_say_the_same(opened, name):
    predictor = opened(name)
    way, visual = predictor._unpacked, predictor.encode(pictures(predictor, 1))
    asked = [one for layout in predictor.passes(QUERIES) for one in predictor._asked(layout)]
    with torch.inference_mode():
        copies, rows = (np.concatenate([one for one, _ in by(visual, asked)]) for by in (way.by_copies, way.by_rows))
    np.testing.assert_allclose(copies, rows, atol=1e-5)


@pytest.mark.parametrize("name", UNPACKED)
def test_a_cache_that_cannot_be_copied_or_goes_on_otherwise_is_not_used(opened, name, monkeypatch, caplog):
    monkeypatch.setattr(unpacked, "_copied", lambda cache, count: cache.no_such_thing)
    answers_as_one_a_pass(opened(name))
    assert "cannot be copied" in caplog.text

    def altered(cache, count):
        made = copied(cache, count)
        made.layers[-1].values = made.layers[-1].values * 2
        return made

    monkeypatch.undo()
    copied = unpacked._copied
    monkeypatch.setattr(unpacked, "_copied", altered)
    answers_as_one_a_pass(opened(name))
    assert "goes on otherwise" in caplog.text


def test_without_an_adapter_a_cache_is_tried(opened):
    predictor = opened("qwen2_5_vl")
    predictor.family = predictor._unpacked._family = Generic(predictor.model.config, predictor.processor)
    answers_as_one_a_pass(predictor)
    assert predictor._unpacked._copies
