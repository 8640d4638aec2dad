"""Every family's rows compute what the model's own forward pass does on what its own processor makes. The commonest
here, all of them under `make test-families`."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from facemllm.model.families import family_of
from facemllm.model.forward import PADDING, PREFIX
from facemllm.model.pretrained import load_model
from tests.families import FAMILIES, SIDES, missing, small

FEW = ("llava", "qwen2_5_vl", "gemma3")
ASKED = [("Is there a beard?", "yes"), ("What is the hair color of this person?", "brown, or grey"), ("Age?", "30")]
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def all_families(names=FAMILIES):
    def one(name):
        marks = [] if name in FEW else [pytest.mark.families]
        if package := missing(name):
            marks.append(pytest.mark.skip(reason=f"its processor needs {package}"))
        return pytest.param(name, marks=marks, id=name)

    return pytest.mark.parametrize("name", [one(name) for name in names])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """`opened(name)`: (model, processor, family) of a small model on disk."""

    @cache
    def one(name):
        model, processor = load_model(small(name, tmp_path_factory.mktemp(name) / name), image_size=SIDES[name])
        return model.eval(), processor, family_of(model.config, processor)

    return one


def pictures(family, count=3):
    coarse = np.random.default_rng(3).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    shape = (family.side, family.side)
    return np.stack([np.asarray(Image.fromarray(one).resize(shape, Image.Resampling.BICUBIC)) for one in coarse])


def own_inputs(processor, family, picture, question, answer):
    """What the processor makes of a whole conversation."""
    image = Image.fromarray(picture)
    if type(processor).__name__ == "PaliGemmaProcessor":
        found = processor(images=image, text=f"<image>{question}", suffix=answer, return_tensors="pt")
        found.pop("labels")
        return found
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    chat = [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    text = processor.apply_chat_template(chat, tokenize=False)
    end = processor.tokenizer.convert_ids_to_tokens(family.frame.end_id)
    text = text[: text.rindex(end) + len(end)]
    return processor(images=[[image]], text=[text], add_special_tokens=False, return_tensors="pt")


@torch.no_grad()
def own_logits(model, inputs):
    return model(**inputs).logits[0]


@all_families()
def test_prompts_and_pictures_are_those_of_the_processor(opened, name):
    model, processor, family = opened(name)
    shown = pictures(family)
    for picture, (question, answer) in zip(shown, ASKED, strict=True):
        theirs = own_inputs(processor, family, picture, question, answer)
        frame = family.frame
        assert [*frame.prefix_ids, *frame.prompt(question), *frame.answer(answer)] == theirs["input_ids"][0].tolist()
        ours = family.inputs(picture[None])
        assert set(ours) == set(theirs) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], **EXACT)


@all_families()
def test_plain_rows_compute_what_the_model_does(opened, name):
    model, processor, family = opened(name)
    shown, frame = pictures(family), family.frame
    rows = [[*frame.prefix_ids, *frame.prompt(q), *frame.answer(a)] for q, a in ASKED]
    starts = torch.tensor([len(frame.prefix_ids) + len(frame.prompt(q)) for q, _ in ASKED])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        features = family.features(model, family.inputs(torch.from_numpy(shown)))
        states = family.plain(model, family.visual(model, features), ids, mask, starts)
        found = [family.logits(model, states[row, : len(ids)]) for row, ids in enumerate(rows)]
    for picture, (question, answer), logits in zip(shown, ASKED, found, strict=True):
        theirs = own_logits(model, own_inputs(processor, family, picture, question, answer))
        torch.testing.assert_close(logits, theirs, **EXACT)
    other = own_logits(model, own_inputs(processor, family, shown[1], *ASKED[0]))
    assert (found[0] - other).abs().max() > 1e-2, "the picture makes no difference: nothing was tested"


@all_families()
def test_packed_rows_compute_what_single_questions_do(opened, name):
    model, processor, family = opened(name)
    if not family.packs:
        assert len(family.unpackable.splitlines()) == 1
        return
    shown, prefix = pictures(family), list(family.frame.prefix_ids)
    places = [[2, 0], [1]]  # faces do not stand in the order in which they come
    width = 8 * 64
    blank = np.zeros((len(places), width), np.int64)
    ids, face, block, position = blank.copy(), blank + PADDING, blank + PREFIX, blank.copy()
    image, spans = {}, {}
    for row, faces in enumerate(places):
        at = 0
        for one in faces:
            asked = [[*family.frame.prompt(q), *family.frame.answer(a)] for q, a in ASKED]
            lengths = [len(prefix), *map(len, asked)]
            for number, (tokens, length) in enumerate(zip([prefix, *asked], lengths, strict=True)):
                first = 0 if number == 0 else len(prefix)
                part = slice(at, at + length)
                ids[row, part], face[row, part], block[row, part] = tokens, one, number - 1
                position[row, part] = np.arange(first, first + length)
                spans[one, number - 1] = row * width + np.arange(at, at + length)
                at += length
        assert at <= width
    for one in range(len(shown)):
        span = spans[one, PREFIX]
        image[one] = span[np.array(prefix) == family.image_token_id]
    rows = [torch.from_numpy(one) for one in (ids, face, block, position)]
    with torch.no_grad():
        visual = family.visual(model, family.features(model, family.inputs(shown)))
        places_I = torch.from_numpy(np.concatenate([image[one] for one in range(len(shown))]))
        states = family.packed(model, visual, *rows, places_I)
        logits = family.logits(model, states)
    for one, picture in enumerate(shown):
        for number, (question, answer) in enumerate(ASKED):
            theirs = own_logits(model, own_inputs(processor, family, picture, question, answer))
            span = torch.from_numpy(np.concatenate([spans[one, PREFIX], spans[one, number]]))
            torch.testing.assert_close(logits[span], theirs, **EXACT)
