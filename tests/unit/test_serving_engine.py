"""The server's own engine says what the predictor says, whatever it is asked beside it, and looks at a face once."""

import asyncio
import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaForConditionalGeneration

from facemllm import settings
from facemllm.model import decoding
from facemllm.model.decoding import is_plain
from facemllm.model.face_mllm import Graph, extend
from facemllm.model.inference import Predictor, Query
from facemllm.model.tiny import build_tiny
from facemllm.serve.engine import pieces as telling
from facemllm.serve.engine.batches import Job
from facemllm.serve.engine.own import Encodings, Found, OwnEngine, Prepared
from facemllm.serve.engine.packed import PackedConv, PackedLinear, pack
from facemllm.serve.engine.pixels import pixels_of
from facemllm.serve.engine.room import Room
from facemllm.serve.engine.scoring import Scoring
from facemllm.serve.language import Refused
from tests.vllm_example import ANSWERS, TEXTS, looking

CLOSED = [
    Query("Is there a beard?", ("yes", "no")),
    Query("What is the hair style?", ("short hair", "brown hair", "a woman with glasses", "an unheard-of mohawk")),
    Query("Describe this face.", ("about 35 years old", "clean-shaven")),
]
OPEN = [
    [("user", "Describe this face.")],
    [("user", "Is there a beard?"), ("assistant", "yes"), ("user", "What is the hair style of this zebra?")],
    [("user", "Who?")],
]
LONGEST = 12


@pytest.fixture(scope="module", params=["plain", "append", "add"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    torch.set_num_threads(1)
    if request.param == "plain":
        model, processor = build_tiny(settings.load().model, TEXTS, ANSWERS, seed=3)
    else:
        chosen = settings.load(overrides=[f"model.segmentation.mode={request.param}", "model.knowledge.enabled=true"])
        graph = Graph(("Bald", "Short_Hair"), ("bald", "short hair"), np.eye(2))
        tiny = build_tiny(chosen.model, TEXTS, ANSWERS, 3)
        model, processor = extend(*tiny, chosen.model, graph, [], 0)
    return looking(model, processor, [_coarse(np.random.default_rng(number)) for number in range(8)])


def _coarse(generator: np.random.Generator) -> Any:
    """A picture of four patches: of fine noise, none looks unlike another."""
    return generator.integers(0, 255, (2, 2, 3), dtype=np.uint8).repeat(64, 0).repeat(64, 1)


def prepared(predictor: Predictor, number: int) -> Prepared:
    """Every other face with a map, where the model takes maps."""
    generator = np.random.default_rng(number)
    pixels = predictor.pixels(_coarse(generator))
    parts = None
    if predictor.takes_maps and number % 2:
        parts = predictor.map(generator.integers(0, 14, (128, 128), dtype=np.uint8))
    return Prepared(pixels, parts, (hashlib.sha256(pixels.tobytes()).hexdigest(), str(number % 2)))


def expected(predictor: Predictor, face: Prepared, closed: Sequence[Query], chats: Sequence[Any]) -> Found:
    """What the predictor says of one face and one chat at a time."""
    (scored,) = predictor.score_faces([face.pixels], [closed], [face.map])
    turns = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
    texts = [predictor.generate(face.pixels, chat, LONGEST, [face.map]) for chat in turns]
    return Found(tuple(scored.answers), tuple(texts), scored.characteristics)


def same(found: Found, other: Found) -> None:
    assert found.texts == other.texts
    assert len(found.scored) == len(other.scored)
    for one, two in zip(found.scored, other.scored, strict=True):
        np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-5)
        assert (one.best, one.greedy) == (two.best, two.greedy)
    assert set(found.characteristics) == set(other.characteristics)
    for name, value in found.characteristics.items():
        assert value == pytest.approx(other.characteristics[name], abs=1e-5)


async def together(engine: OwnEngine, asked: Sequence[tuple[Prepared, Any, Any]]) -> list[Found]:
    answers = (engine.answer(face, closed, chats, characteristics=True) for face, closed, chats in asked)
    async with asyncio.timeout(120):
        return await asyncio.gather(*answers)


def test_it_answers_as_the_predictor_whatever_it_answers_beside(predictor: Predictor) -> None:
    faces = [prepared(predictor, number) for number in range(6)]
    asked: list[tuple[Prepared, Any, Any]] = [
        (faces[0], CLOSED, OPEN),
        (faces[1], [], OPEN[1:]),
        (faces[2], CLOSED * 20, []),  # several passes
        (faces[3], [], []),
        (faces[1], [*reversed(CLOSED)], OPEN[:1]),
        (faces[4], CLOSED[:1], []),
        (faces[5], CLOSED, OPEN[::-1]),
    ]
    engine = OwnEngine(predictor, max_new_tokens=LONGEST, room=Room(batch=3, rows=4, wait_s=math.inf))
    engine.warm_up()
    found = asyncio.run(together(engine, asked))
    again = asyncio.run(together(engine, asked[::-1]))[::-1]
    engine.close(20)
    for (face, closed, chats), one, two in zip(asked, found, again, strict=True):
        same(one, expected(predictor, face, closed, chats))
        same(two, one)
    assert len({text for one in found for text in one.texts}) == 9  # each its own: faces are told apart
    assert (engine.encodings.misses, engine.counters.finished) == (6, 14)


def test_a_job_of_many_passes_lets_others_through(plain: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OwnEngine(plain, max_new_tokens=LONGEST)
    monkeypatch.setattr(engine, "_rows", 2)
    face, other = prepared(plain, 0), prepared(plain, 1)
    many = CLOSED * 40

    async def go() -> None:
        big, small = (
            Job(engine._work(shown, closed, [], False), client, math.inf, len(closed), 0)
            for client, shown, closed in (("a", face, many), ("b", other, CLOSED))
        )
        engine.step([big])
        assert len(big.work.passes) > 3
        assert not big.ended
        engine.step([small])
        assert (small.ended, big.ended) == (True, False)
        while not big.ended:
            engine.step([])
        same(await big.future, expected(plain, face, many, []))
        same(await small.future, expected(plain, other, CLOSED, []))

    asyncio.run(go())


def test_packed_layers_answer_alike(plain: Predictor) -> None:
    faces = [prepared(plain, number) for number in range(3)]
    before = [expected(plain, face, CLOSED, OPEN) for face in faces]
    tokens_BND = plain.encode([face.pixels for face in faces]).tokens_BND
    assert pack(plain.model)
    assert not pack(plain.model)  # there is nothing left to pack
    assert any(isinstance(module, PackedConv) for module in plain.model.modules())
    assert not any(isinstance(module, torch.nn.Conv2d) for module in plain.model.modules())
    for count in (1, 3, 2):  # laid out for the first
        packed = plain.encode([face.pixels for face in faces[:count]]).tokens_BND
        np.testing.assert_allclose(packed, tokens_BND[:count], atol=2e-4)
    found = asyncio.run(together(OwnEngine(plain, max_new_tokens=LONGEST), [(face, CLOSED, OPEN) for face in faces]))
    for one, other in zip(found, before, strict=True):
        same(one, other)
    assert isinstance(plain.model.lm_head, PackedLinear)
    assert len({one.texts for one in found}) == len(faces)


def shared_heads(plain: Predictor) -> Predictor:
    """A model of LLaMA's kind, two heads of which share keys and values."""
    text: Any = plain.model.config.text_config
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    llama = LlamaConfig(
        **{name: getattr(text, name) for name in names},
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    config = type(plain.model.config)(**{**plain.model.config.to_dict(), "text_config": llama})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Predictor(LlavaForConditionalGeneration(config), plain.processor)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_scoring_without_what_it_does_not_need_answers_alike(plain: Predictor, kind: str) -> None:
    predictor = plain if kind == "qwen2" else shared_heads(plain)
    faces = [prepared(predictor, number) for number in range(4)]
    tokens_BND = predictor.encode([face.pixels for face in faces]).tokens_BND
    scoring = Scoring.of(predictor, tokens_BND, CLOSED[1])
    assert scoring is not None
    uneven = [predictor.passes(asked)[0] for asked in (CLOSED, CLOSED[:1], CLOSED[::-1], CLOSED * 3)]
    for rows in (uneven, uneven[:1] * 4):
        found, answers = scoring.score_rows(tokens_BND, rows), predictor.score_rows(tokens_BND, rows)
        assert len({one[0].probabilities for one in found}) == len(faces)
        for own, other in zip(found, answers, strict=True):
            same(Found(tuple(own), (), {}), Found(tuple(other), (), {}))


def test_a_model_that_scoring_would_answer_otherwise_is_left_to_the_predictor(
    plain: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_BND = plain.encode([prepared(plain, 1).pixels]).tokens_BND
    for layer in plain.model.model.language_model.layers:
        monkeypatch.setattr(layer, "forward", lambda states, **_: states)
    assert Scoring.of(plain, tokens_BND, CLOSED[0]) is None


def test_pixels_are_those_of_the_processor(plain: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, pixels = np.random.default_rng(0), pixels_of(plain)
    assert pixels != plain.pixels
    for shape in ((96, 96), (300, 211), (97, 400), (40, 57)):
        for mode in ("RGB", "L"):
            picture = Image.fromarray(noise.integers(0, 256, (*shape, 3), np.uint8)).convert(mode)
            np.testing.assert_array_equal(pixels(picture), plain.pixels(picture))
    monkeypatch.setattr(plain.processor.image_processor, "do_center_crop", False)
    monkeypatch.setattr(plain.processor.image_processor, "size", {"height": 96, "width": 96})
    assert pixels_of(plain) == plain.pixels


def test_characteristics_are_told_to_those_who_asked(predictor: Predictor) -> None:
    engine = OwnEngine(predictor)
    found = asyncio.run(engine.answer(prepared(predictor, 1), CLOSED, [], characteristics=False))
    assert found.characteristics == {}
    assert engine.characteristic_names == predictor.characteristic_names


@pytest.fixture
def plain() -> Predictor:
    torch.set_num_threads(1)
    model, processor = build_tiny(settings.load().model, TEXTS, ANSWERS, seed=3)
    return looking(model, processor, [_coarse(np.random.default_rng(number)) for number in range(8)])


def test_a_face_is_looked_at_once_while_it_is_remembered(plain: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    encode = plain.encode
    monkeypatch.setattr(plain, "encode", lambda images, maps=None: looked.append(len(images)) or encode(images, maps))
    faces = [prepared(plain, number) for number in range(3)]
    engine = OwnEngine(plain, max_new_tokens=4)
    size = plain.encode([faces[0].pixels]).tokens_BND.nbytes
    looked.clear()
    engine.encodings = Encodings(2 * size)
    for number, times in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):  # 1 was used longest ago when 2 came
        asyncio.run(engine.answer(faces[number], CLOSED, OPEN))
        assert len(looked) == times, number
    assert (engine.encodings.hits, engine.encodings.misses) == (2, 4)
    assert engine.encodings._held == 2 * size


def test_chats_join_while_others_are_written_and_leave_when_they_end(plain: Predictor) -> None:
    faces = [prepared(plain, number) for number in range(4)]
    ends = plain.model.generation_config.eos_token_id
    texts: dict[int, list[int]] = {}
    writing = decoding.Decoding(plain, LONGEST)
    rows = []
    for number, face in enumerate(faces):  # one more at every step
        prompt = plain.chat(OPEN[number % 3])[len(plain.frame.prefix_ids) :]
        rows.append(decoding.Row(prompt, plain.encode([face.pixels]).tokens_BND[0]))
        writing.begin(rows[-1:])
        writing.step()
        assert len({len(row.written) for row in rows}) == len(rows) or any(row.ended for row in rows)
    rows[1].prompt = []
    writing.drop(lambda row: row is rows[1])
    held = writing._batch.mask_RT
    assert held.any(0).all()  # no column that nobody sees
    while writing.rows:
        writing.step()
    for number in (0, 2, 3):
        texts[number] = rows[number].written
        turns = [{"role": role, "content": text} for role, text in OPEN[number % 3]]
        assert plain.text(rows[number].written) == plain.generate(faces[number].pixels, turns, LONGEST)
        assert len(rows[number].written) == LONGEST or rows[number].written[-1] == ends
    assert len(rows[1].written) < LONGEST
    assert writing._batch is None


def test_an_answer_ends_at_the_end_token_as_generation_does(plain: Predictor) -> None:
    face = prepared(plain, 1)
    written = decoding.Decoding(plain, LONGEST)
    row = decoding.Row(plain.chat(OPEN[0])[len(plain.frame.prefix_ids) :], plain.encode([face.pixels]).tokens_BND[0])
    written.begin([row])
    while written.rows:
        written.step()
    plain.model.generation_config.eos_token_id = [row.written[3], 1]  # as if the fourth token were an end
    engine = OwnEngine(plain, max_new_tokens=LONGEST)
    found = asyncio.run(engine.answer(face, [], OPEN))
    same(found, expected(plain, face, [], OPEN))
    assert len(plain.text(row.written)) > len(found.texts[0])


def test_long_prompts_are_taken_in_groups_that_fit(plain: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MASK_CELLS", 800)
    face = prepared(plain, 1)
    engine = OwnEngine(plain, max_new_tokens=LONGEST)
    same(asyncio.run(engine.answer(face, CLOSED, OPEN)), expected(plain, face, CLOSED, OPEN))


def test_a_model_that_steers_generation_is_left_to_it(plain: Predictor) -> None:
    face = prepared(plain, 1)
    assert is_plain(plain.model)
    before = expected(plain, face, [], OPEN)
    plain.model.generation_config.repetition_penalty = 5.0
    assert not is_plain(plain.model)
    engine = OwnEngine(plain, max_new_tokens=LONGEST)
    found = asyncio.run(engine.answer(face, CLOSED, OPEN))
    same(found, expected(plain, face, CLOSED, OPEN))
    assert found.texts != before.texts
    assert "".join(asyncio.run(listened(engine, face, OPEN[0]))) == found.texts[0]


async def listened(engine: OwnEngine, face: Prepared, chat: Any) -> list[str]:
    return [piece async for piece in engine.stream(face, chat)]


@pytest.mark.parametrize("number", range(3))
def test_a_stream_is_what_generation_writes_in_pieces(
    plain: Predictor, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_HELD_BACK", 4)
    face = prepared(plain, number)
    engine = OwnEngine(plain, max_new_tokens=24)
    pieces = asyncio.run(listened(engine, face, OPEN[number]))
    turns = [{"role": role, "content": text} for role, text in OPEN[number]]
    assert "".join(pieces) == plain.generate(face.pixels, turns, 24)
    assert len(pieces) > 1
    assert all(pieces)


def test_a_listener_that_leaves_ends_the_writing(plain: Predictor) -> None:
    face = prepared(plain, 1)
    engine = OwnEngine(plain, max_new_tokens=900)

    async def go() -> Found:
        pieces = engine.stream(face, OPEN[0])
        await anext(pieces)
        await pieces.aclose()
        return await engine.answer(face, CLOSED, [])

    assert len(asyncio.run(go()).scored) == len(CLOSED)
    engine.close(20)
    assert engine._decoding.rows == []
    assert engine._begun == []


def test_what_the_model_cannot_hold_is_refused_before_it_waits(plain: Predictor) -> None:
    engine = OwnEngine(plain)
    face = prepared(plain, 1)
    for closed, chats, status, words in (
        ([], [[("user", "x" * 2000)]], 413, "this model takes 1024"),
        ([], [[("user", "a"), ("assistant", "b")]], 422, "must alternate"),
        ([Query("?", ("x" * 5000, "y" * 5000))], [], 413, "takes 8192 characters"),
    ):
        with pytest.raises(Refused, match=words) as refused:
            asyncio.run(engine.answer(face, closed, chats))
        assert refused.value.status == status
    assert engine.counters.taken == 0


def test_a_pass_that_fails_is_heard_by_its_callers_and_the_next_one_runs(
    plain: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = prepared(plain, 1)
    engine = OwnEngine(plain, max_new_tokens=4)
    with monkeypatch.context() as broken:
        broken.setattr(plain, "score_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(engine.answer(face, CLOSED, OPEN))
    same(asyncio.run(engine.answer(face, CLOSED, [])), expected(plain, face, CLOSED, []))


def test_health_is_answered_while_the_model_computes(plain: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    encode = plain.encode
    monkeypatch.setattr(plain, "encode", lambda *given: encode(*given) if gate.wait(20) else None)
    engine = OwnEngine(plain)

    async def go() -> bool:
        task = asyncio.create_task(engine.answer(prepared(plain, 1), CLOSED, []))
        while not engine.counters.running:
            await asyncio.sleep(0.001)  # the loop turns while the model's thread stands
        gate.set()
        return bool((await task).scored)

    assert asyncio.run(go())
