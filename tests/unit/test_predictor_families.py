"""Answers of every family: options scored as one option a pass would, texts as transformers generates them, and the
server's engine says the same. The commonest here, all under `make test-families`."""

import asyncio
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from facemllm.model.inference import Predictor, Query
from facemllm.model.pretrained import load_model
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.pixels import pixels_of
from facemllm.serve.engine.protocol import Prepared
from tests.families import SIDES, all_families, small

QUERIES = [
    Query("Is there a beard?", ("yes", "no")),
    Query("What is the hair color?", ("brown", "black", "a dark grey")),
    Query("Age?", ("30", "40 or so", "unknown")),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    torch.set_num_threads(1)

    @cache
    def one(name):
        return Predictor(*load_model(small(name, tmp_path_factory.mktemp(name) / name), image_size=SIDES[name]))

    return one


def pictures(predictor, count=2):
    coarse = np.random.default_rng(5).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(predictor.prepared[:2], Image.Resampling.BICUBIC) for one in coarse]


@torch.no_grad()
def one_a_pass(predictor, picture, query):
    """Probabilities of the options, each from a pass of its own of the model's forward over its processor's inputs."""
    family, frame, totals = predictor.family, predictor.frame, []
    inputs = predictor._inputs([picture])
    for option in query.options:
        asked, answer = [*frame.prefix_ids, *frame.prompt(query.question)], frame.answer(option)
        ids = torch.tensor([[*asked, *answer[:-1]]])
        beside = family.beside(ids, torch.tensor([len(asked)])) | inputs
        logits = predictor.model(input_ids=ids, attention_mask=torch.ones_like(ids), **beside).logits[0]
        found = logits[len(asked) - 1 :].float().log_softmax(-1)
        totals.append(found[torch.arange(len(answer)), torch.tensor(answer)].double().sum())
    return torch.stack(totals).softmax(0).tolist()


@all_families()
def test_options_are_scored_as_one_option_a_pass(opened, name):
    predictor = opened(name)
    shown = pictures(predictor)
    found = predictor.score(shown, [QUERIES, QUERIES[1:]])
    for picture, queries, scored in zip(shown, [QUERIES, QUERIES[1:]], found, strict=True):
        for query, one in zip(queries, scored, strict=True):
            assert one.probabilities == pytest.approx(one_a_pass(predictor, picture, query), abs=1e-5)
    assert found[0][1].probabilities != pytest.approx(found[1][0].probabilities, abs=1e-4), "the picture plays no part"


@all_families()
def test_texts_are_those_that_transformers_generates(opened, name):
    predictor = opened(name)
    shown, asked = pictures(predictor), ["Is there a beard?", "What is the hair color of this person?"]
    texts = predictor.generate_batch(shown, asked, 6)
    for picture, question, text in zip(shown, asked, texts, strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        words = predictor.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        starts = words.startswith(predictor.processor.tokenizer.bos_token or "\0")
        inputs = predictor.processor(
            images=[[picture]], text=[words], return_tensors="pt", **({"add_special_tokens": False} if starts else {})
        )
        written = predictor.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert predictor.text(written[0, inputs["input_ids"].shape[1] :].tolist()) == text
        assert predictor.generate(picture, question, 6) == text


@all_families()
def test_the_engine_answers_as_the_predictor_does(name, tmp_path):
    predictor = Predictor(*load_model(small(name, tmp_path / name), image_size=SIDES[name]))
    picture = pictures(predictor, 1)[0]
    scored, text = predictor.score([picture], [QUERIES])[0], predictor.generate(picture, "Age?", 5)
    engine = OwnEngine(predictor, max_new_tokens=5)
    engine.make_ready()
    face = Prepared(pixels_of(predictor)(picture), None, ("face",))
    found = asyncio.run(engine.answer(face, QUERIES, [[("user", "Age?")]]))
    engine.close()
    for one, other in zip(found.scored, scored, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
    assert found.texts == (text,)
