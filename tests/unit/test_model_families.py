"""Every family's rows compute what the model's own forward pass does on what its own processor makes. The commonest
here, all of them under `make test-families`."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from facemllm import settings
from facemllm.model.families import Generic, family_of
from facemllm.model.forward import PADDING, PREFIX
from facemllm.model.pretrained import adapter_of, load_model, save_model
from facemllm.settings.train import Trainable
from facemllm.train import optimizer
from tests.families import SIDES, all_families, small
from tests.refusing import refuses
from tests.training_example import trains as modes

ASKED = [("Is there a beard?", "yes"), ("What is the hair color of this person?", "brown, or grey"), ("Age?", "30")]
EXACT = {"atol": 1e-5, "rtol": 1e-5}


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
    _, processor, family = opened(name)
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


@all_families()
def test_without_an_adapter_it_computes_the_same_or_says_why_not(opened, name):
    model, processor, family = opened(name)
    generic = Generic(model.config, processor)
    assert not generic.packs
    assert set(generic.lora_targets(model)) == set(family.lora_targets(model))
    if name == "paligemma":
        refuses("no adapter is written for PaliGemma", generic.check, model, name)
    else:
        generic.check(model, name)


@all_families()
def test_a_stage_opens_merged_and_as_adapter_in_plain_transformers(name, tmp_path):
    from peft import PeftModel

    base = small(name, tmp_path / "base")
    model, processor = load_model(base, image_size=SIDES[name])
    family = family_of(model.config, processor)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trains = Trainable(**modes(language="lora", projector="full"))
    wrapper = optimizer.set_trainable(model, trains, settings.load("laptop").train.lora, 0)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.tensor([processor.tokenizer("is there a beard?")["input_ids"]])
    adapter = adapter_of(wrapper, trains)
    merged = optimizer.merge(model, wrapper, (ids, torch.ones_like(ids)))
    save_model(merged, processor, tmp_path / "stage", adapter)
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])}
    assert {family.module_of(merged)(key) for key in changed} == {"projector", "language"}

    inputs = own_inputs(processor, family, pictures(family)[0], *ASKED[0])
    plain = AutoModelForImageTextToText.from_pretrained(base).eval()
    untrained = own_logits(plain, inputs)
    whole = own_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "stage").eval(), inputs)
    adapted = own_logits(PeftModel.from_pretrained(plain, tmp_path / "stage" / "adapter").eval(), inputs)
    assert (whole - untrained).abs().max() > 0.01
    torch.testing.assert_close(adapted, whole, atol=2e-5, rtol=1e-4)
    again, kept = load_model(tmp_path / "stage")
    assert family_of(again.config, kept).frame.prefix_ids == family.frame.prefix_ids
    torch.testing.assert_close(own_logits(again.eval(), inputs), whole)
