"""vLLM as an engine answers as our own does, by exact token ids alone, and fails in one line; against a stand-in."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from facemllm import settings, tasks
from facemllm.errors import UserError
from facemllm.model.face_mllm import extend
from facemllm.model.inference import Predictor, Query
from facemllm.model.pretrained import load_model, save_model
from facemllm.model.reader import Reader
from facemllm.serve import server as served
from facemllm.serve.assembly import engine_of, service_of
from facemllm.serve.engine.export import TOWERS, export_for_vllm, exported_from, record_of, tower_of
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.protocol import Prepared
from facemllm.serve.engine.room import Room
from facemllm.serve.engine.turns import Turns
from facemllm.serve.engine.vllm import VllmEngine
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.language import Ask, Encoded, Question, Refused
from facemllm.serve.observer import Observer
from facemllm.serve.service import Served
from facemllm.signing import manifest
from tests.pictures import encode
from tests.vllm_example import CLOSED, OPEN, clip, face, of_family, tiny
from tests.vllm_server import VllmServer, serving

LONGEST = 6
DIGEST = "d" * 64
SPELLED = "Is there a </s> beard <image><image> in this <|im_end|><|image_pad|> face?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("vllm")
    made = {"tiny": tiny(root / "tiny"), "clip": clip(root / "clip"), "siglip": clip(root / "siglip", "siglip")}
    return {**made, "qwen2_5_vl": of_family(root / "qwen", "qwen2_5_vl")}


@pytest.fixture(scope="module", params=["tiny", "clip", "qwen2_5_vl"])
def both(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[VllmServer, Path, Predictor]]:
    folder = folders[request.param]
    with serving(folder, DIGEST) as server:
        yield server, folder, Predictor.load(folder)


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[VllmServer]:
    with serving(folders["tiny"], DIGEST) as server:
        yield server


@pytest.fixture
def engine(server: VllmServer, folders: dict[str, Path]) -> VllmEngine:
    return VllmEngine(Reader.open(folders["tiny"]), server.url, DIGEST, max_new_tokens=LONGEST)


def prepared(reader: Reader, number: int) -> Prepared:
    return Prepared(reader.pixels(face(number)), None, (str(number),))


def test_it_answers_as_our_own_engine(both: tuple[VllmServer, Path, Predictor]) -> None:
    server, folder, predictor = both
    reader = Reader.open(folder)
    theirs = VllmEngine(reader, server.url, DIGEST, max_new_tokens=LONGEST)
    theirs.make_ready()
    ours = OwnEngine(predictor, max_new_tokens=LONGEST)
    closed = [*CLOSED, Query(SPELLED, ("yes", "no </s>", "a <image> hat"))]
    chats = [*OPEN, (("user", SPELLED),)]

    async def compare(number: int) -> tuple[str, ...]:
        one = prepared(reader, number)
        found, own = await theirs.answer(one, closed, chats), await ours.answer(one, closed, chats)
        for a, b in zip(found.scored, own.scored, strict=True):
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)
            assert (a.best, a.greedy) == (b.best, b.greedy)
        assert found.texts == own.texts
        for chat, text in zip(chats, own.texts, strict=True):
            pieces = [piece async for piece in theirs.stream(one, chat)]
            assert "".join(pieces) == text
        return found.texts

    texts = [asyncio.run(compare(number)) for number in range(3)]
    assert len(set(texts)) == 3  # faces are told apart
    ours.close(20)


def test_greedy_is_what_would_be_written(both: tuple[VllmServer, Path, Predictor]) -> None:
    server, folder, predictor = both
    reader = Reader.open(folder)
    one = prepared(reader, 1)
    chat = [("user", "Is there a beard?")]
    first = predictor.generate(one.pixels, "Is there a beard?", 1)
    engine = VllmEngine(reader, server.url, DIGEST, max_new_tokens=1)
    found = asyncio.run(engine.answer(one, [Query("Is there a beard?", ("yes", "no"))], [chat]))
    assert found.texts == (first,)
    assert found.scored[0].greedy is None


def test_strangers_text_never_reaches_vllm(engine: VllmEngine, server: VllmServer) -> None:
    reader = engine.reader
    asyncio.run(engine.answer(prepared(reader, 0), [Query(SPELLED, ("yes", "<image>"))], [(("user", SPELLED),)]))
    assert [body["messages"][0]["content"][1]["text"] for body in server.rendered] == ["?"]
    end, image = reader.processor.tokenizer.eos_token_id, reader.frame.image_token_id
    assert len(server.asked) == 3
    for body in server.asked:
        ids = body["token_ids"]
        assert ids.count(image) == reader.frame.prefix_ids.count(image)
        assert end not in ids[:-1]
        assert "messages" not in body
        assert "structured_outputs" not in json.dumps(body)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_prompts_are_the_processors_token_by_token(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = folders.get(name) or of_family(tmp_path / name, name)
    with serving(folder, DIGEST) as server:
        server.reach = (1, 1)
        reader = Reader.open(folder)
        engine, one = VllmEngine(reader, server.url, DIGEST, max_new_tokens=LONGEST), prepared(reader, 0)
        asyncio.run(engine.answer(one, CLOSED, OPEN))
    wanted = [reader.rendered(one.pixels, chat) for chat in OPEN]
    for query in CLOSED:
        chat = reader.rendered(one.pixels, [("user", query.question)])
        wanted += [[*chat, *reader.frame.answer(option)] for option in query.options]
    assert sorted(body["token_ids"] for body in server.asked) == sorted(wanted)
    image = reader.frame.image_token_id
    place = [{"offset": wanted[0].index(image), "length": wanted[0].count(image)}]
    assert all(body["features"]["mm_placeholders"]["image"] == place for body in server.asked)


def test_prepared_pixels_pass_unchanged(engine: VllmEngine, server: VllmServer) -> None:
    from facemllm.model.inputs import normalise

    one = prepared(engine.reader, 5)
    features = json.loads(asyncio.run(engine._features(one, "")))
    expected = normalise(torch.from_numpy(one.pixels[None]), engine.reader.processor.image_processor)
    torch.testing.assert_close(server.values(features)["pixel_values"], expected, atol=1e-6, rtol=0)


def test_a_face_is_rendered_once_while_it_is_remembered(engine: VllmEngine, server: VllmServer) -> None:
    faces = [prepared(engine.reader, number) for number in range(3)]
    size = len(asyncio.run(engine._features(faces[0], "")))
    engine._most = int(2.5 * size)
    server.rendered.clear()
    for number, times in ((0, 0), (1, 1), (0, 1), (2, 2), (0, 2), (1, 3)):  # 1 was asked about longest ago when 2 came
        asyncio.run(engine.answer(faces[number], CLOSED[:1], []))
        assert len(server.rendered) == times, number
    assert engine._held == sum(map(len, engine._rendered.values()))


@pytest.mark.parametrize(
    ("fault", "status", "retry"),
    [
        ((429, {"Retry-After": "7"}, b'{"error": {"message": "SECRET"}}'), 429, 7.0),
        ((503, {}, b"SECRET"), 503, 1.0),
        ((504, {"Retry-After": "soon"}, b"SECRET"), 504, 1.0),
        ((500, {}, b'{"error": {"message": "SECRET"}}'), 502, None),
        ((400, {}, b'{"error": {"message": "SECRET"}}'), 502, None),
        ((200, {}, b"SECRET, no JSON"), 502, None),
        ((200, {}, b'{"choices": []}'), 502, None),
    ],
)
@pytest.mark.parametrize("way", ["closed", "open", "stream"])
def test_what_vllm_refuses_is_refused_in_our_words(
    engine: VllmEngine, server: VllmServer, way: str, fault: Any, status: int, retry: float | None
) -> None:
    if way == "stream" and fault[0] == 200:
        fault = (200, {}, b'data: {"error": {"message": "SECRET"}}\n\n')
    server.faults = [fault]
    one = prepared(engine.reader, 0)

    async def ask() -> None:
        if way == "stream":
            async for _ in engine.stream(one, OPEN[0]):
                pass
        else:
            await engine.answer(one, CLOSED[:1] if way == "closed" else [], OPEN[:1] if way == "open" else [])

    with pytest.raises(Refused) as refused:
        asyncio.run(ask())
    assert (refused.value.status, refused.value.retry_after) == (status, retry)
    assert "SECRET" not in refused.value.reason
    assert "\n" not in refused.value.reason
    asyncio.run(ask())  # and it goes on
    assert (engine.counters.running, engine.counters.waiting, engine.counters.finished) == (0, 0, 1)


def test_a_server_that_is_gone(folders: dict[str, Path]) -> None:
    with serving(folders["tiny"], DIGEST) as server:
        engine = VllmEngine(Reader.open(folders["tiny"]), server.url, DIGEST)
    with pytest.raises(Refused) as refused:
        asyncio.run(engine.answer(prepared(engine.reader, 0), CLOSED, []))
    assert (refused.value.status, refused.value.retry_after) == (503, 2.0)
    with pytest.raises(UserError, match=r"no vLLM server answers.*serve.engine.vllm_url"):
        engine.make_ready(0.0)


async def until(happened: Any) -> None:
    async with asyncio.timeout(30):
        while not happened():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("way", ["closed", "stream"])
def test_work_of_a_caller_that_left_is_dropped(engine: VllmEngine, server: VllmServer, way: str) -> None:
    one = prepared(engine.reader, 0)

    async def ask() -> None:
        if way == "stream":
            async for _ in engine.stream(one, OPEN[0]):
                pass
        else:
            await engine.answer(one, CLOSED, [])

    async def leave() -> None:
        server.held.clear()
        task = asyncio.create_task(ask())
        await until(lambda: server.running == (1 if way == "stream" else 9))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.running == 0)
        server.held.set()
        await ask()

    asyncio.run(leave())
    assert server.hung_up == (1 if way == "stream" else 9)
    assert engine.counters.dropped == 1
    assert (engine.counters.running, engine.counters.waiting, engine.counters.finished) == (0, 0, 1)


def test_whoever_stops_reading_a_stream_ends_it(engine: VllmEngine, server: VllmServer) -> None:
    one = prepared(engine.reader, 0)

    async def leave() -> None:
        pieces = engine.stream(one, OPEN[0])
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert engine.counters.running == 0


def test_a_deadline_ends_the_work(engine: VllmEngine, server: VllmServer) -> None:
    import time

    async def ask() -> None:
        await engine._features(prepared(engine.reader, 0), "")
        server.held.clear()
        with pytest.raises(Refused) as refused:
            await engine.answer(prepared(engine.reader, 0), CLOSED, [], deadline=time.monotonic() + 0.3)
        assert refused.value.status == 504
        await until(lambda: server.running == 0)

    asyncio.run(ask())
    assert engine.counters.expired == 1


def test_so_many_requests_at_once_and_no_more(server: VllmServer, folders: dict[str, Path]) -> None:
    reader = Reader.open(folders["tiny"])
    engine = VllmEngine(reader, server.url, DIGEST, at_once=3, room=Room(client_faces=2))

    async def ask() -> None:
        server.held.clear()
        asked = [asyncio.create_task(engine.answer(prepared(reader, n), CLOSED, [], client="a")) for n in range(2)]
        await until(lambda: server.running == 3)
        with pytest.raises(Refused) as refused:
            await engine.answer(prepared(reader, 2), CLOSED, [], client="a")
        assert (refused.value.status, refused.value.retry_after) == (429, 1.0)
        with pytest.raises(Refused):
            engine.check(client="a")
        engine.check(client="b")
        server.held.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert server.most == 3
    assert engine.counters.full == 2


def test_clients_take_turns() -> None:
    turns, order = Turns(Room(), 1), []

    async def one(client: str, begun: asyncio.Event | None = None) -> None:
        async with turns.turn(client):
            order.append(client)
            if begun is not None:
                await begun.wait()

    async def many() -> None:
        begun = asyncio.Event()
        tasks = [asyncio.create_task(one("a", begun)), *(asyncio.create_task(one(client)) for client in "aaabbc")]
        await until(lambda: turns.counters.waiting == 6)
        tasks[2].cancel()
        await until(tasks[2].done)
        begun.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(many())
    assert "".join(order) == "a" + "abc" + "ab"
    assert turns._free == 1
    assert not turns._queues


def test_too_long(engine: VllmEngine, server: VllmServer) -> None:
    engine.make_ready()
    one = prepared(engine.reader, 0)
    server.asked.clear()
    for closed, chats, status in (
        ([Query("a " * 600, ("yes", "no"))], [], 413),
        ([Query("a?", ("yes", "zq" * 5000))], [], 413),
        ([Query("a?", ("yes", "zq " * 600))], [], 413),
        ([], [(("user", "zq " * 600),)], 413),
        ([], [(("assistant", "yes"),)], 422),
    ):
        with pytest.raises(Refused) as refused:
            asyncio.run(engine.answer(one, closed, chats))
        assert refused.value.status == status
    assert all(len(body["token_ids"]) <= server.max_model_len for body in server.asked)


def test_another_server_is_refused_at_the_start(server: VllmServer, folders: dict[str, Path]) -> None:
    reader = Reader.open(folders["tiny"])
    with pytest.raises(UserError, match=r"not this model.*--served-model-name eee"):
        VllmEngine(reader, server.url, "e" * 64).make_ready()
    with pytest.raises(UserError, match="makes other tokens"):
        VllmEngine(Reader.open(folders["clip"]), server.url, DIGEST).make_ready()
    server.reach = (-1, 1)
    with pytest.raises(UserError, match="cannot be used"):
        VllmEngine(reader, server.url, DIGEST).make_ready()
    server.scale_out = False
    with pytest.raises(UserError, match="--enable-scale-out"):
        VllmEngine(reader, server.url, DIGEST).make_ready()


def test_models_of_the_own_engine_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings.load(overrides=["model.segmentation.mode=add"]).model
    model, processor = extend(*load_model(folders["tiny"]), chosen, None, [], 0)
    save_model(model, processor, tmp_path / "maps")
    with pytest.raises(UserError, match=r"types llava, qwen2_5_vl.*face_mllm \(branches or maps\): .*the own engine"):
        VllmEngine(Reader.open(tmp_path / "maps"), "http://127.0.0.1:1", DIGEST)
    with pytest.raises(UserError, match=r"types llava, qwen2_5_vl.*face_mllm \(branches or maps\): .*the own engine"):
        export_for_vllm(tmp_path / "maps", tmp_path / "out")
    steered = shutil.copytree(folders["tiny"], tmp_path / "steered")
    written = json.loads((steered / "generation_config.json").read_text())
    (steered / "generation_config.json").write_text(json.dumps({**written, "no_repeat_ngram_size": 2}))
    with pytest.raises(UserError, match=r"generation_config.json.*the own engine"):
        VllmEngine(Reader.open(steered), "http://127.0.0.1:1", DIGEST)


def test_special_tokens_are_cleaned_for_models_of_parts_too(folders: dict[str, Path]) -> None:
    for name in ("tiny", "clip", "siglip"):
        reader = Reader.open(folders[name])
        ids = reader.chat([("user", SPELLED)])
        special = {i for i, one in reader.processor.tokenizer.added_tokens_decoder.items() if one.special}
        assert reader.frame.image_token_id in special
        plain = [token for token in reader.chat([("user", "?")]) if token in special]
        assert [token for token in ids if token in special] == plain, name


def test_the_service_answers_alike_with_either_engine(both: tuple[VllmServer, Path, Predictor]) -> None:
    server, folder, predictor = both
    quality = dict.fromkeys(("min_side", "min_sharpness", "min_brightness", "min_contrast"))
    engine = {**settings.plain().serve.engine.model_dump(), "name": "vllm", "vllm_url": server.url}
    chosen = settings.serving({"engine": engine, "quality": quality}, "test")
    data = encode(face(2))
    item = tasks.get("attributes").items[0].name
    questions = (Question(task="attributes", item=item), Question(text="Describe this face.", options=("a hat", "no")))
    ask = Ask(Encoded(data, 80, 80, "face"), (*questions, Question(text="What is the hair of this face like?")))

    async def answers(model: Reader) -> Any:
        made = service_of(Served("m", "7", DIGEST), model, chosen, "attributes", Evaluated(), LONGEST, Observer())
        return (await made.answer([ask], client="a", deadline=None))[0].answers

    ours, theirs = asyncio.run(answers(predictor)), asyncio.run(answers(Reader.open(folder)))
    assert {one.kind for one in ours} == {"taught", "free"} or "abstained" in {one.kind for one in ours}
    for one, other in zip(ours, theirs, strict=True):
        assert (one.kind, one.text, one.value, one.task, one.item) == (
            other.kind,
            other.text,
            other.value,
            other.task,
            other.item,
        )
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_the_server_chooses_the_engine(server: VllmServer, folders: dict[str, Path]) -> None:
    flags = ["--model=m", f"--digest={DIGEST}", "--engine=vllm", f"--vllm-url={server.url}"]
    given = served._options(flags)
    wins = {"name": given.engine, "vllm_url": given.vllm_url}
    chosen = served._serve_settings('{"threads": 2}', wins)
    assert (chosen.engine.name, chosen.engine.vllm_url, chosen.threads) == ("vllm", server.url, 2)
    made = engine_of(Reader.open(folders["tiny"]), chosen, DIGEST, 4)
    assert isinstance(made, VllmEngine)
    for url in ("http://10.0.0.1:8000", "http://127.0.0.1.evil.org:80", "https://127.0.0.1:8000"):
        with pytest.raises(UserError, match="vllm_url"):
            served._serve_settings("", {**wins, "vllm_url": url})
    assert served._serve_settings("").engine.name == "own"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_export_has_the_names_that_vllm_knows(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model, processor = load_model(folders[kind])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    processor.save_pretrained(tmp_path / "sharded")
    for number, folder in enumerate((folders[kind], tmp_path / "sharded")):
        out = tmp_path / f"out{number}"
        record = export_for_vllm(folder, out, manifest.of(folder).digest)
        assert record["model"] == manifest.of(folder).digest == exported_from(out)
        assert record["exported"] == manifest.of(out).digest
        before, after = (
            {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (folder, out)
        )
        tower = "vision_tower."
        assert after.keys() == {k.replace(tower, f"{tower}vision_model.") for k in before}
        assert record["renamed"] == sum(k.startswith(tower) for k in before) > 0
        assert all(torch.equal(v, after[k.replace(tower, f"{tower}vision_model.")]) for k, v in before.items())
        if number:
            listed = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
            assert len(set(listed.values())) > 1
            assert listed.keys() == after.keys()
    again = export_for_vllm(tmp_path / "out0", tmp_path / "again")  # what has the names keeps them
    assert (again["renamed"], again["exported"]) == (0, again["model"])


def test_an_export_is_bound_to_the_bytes_it_was_made_from(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has digest.*nothing was exported"):
        export_for_vllm(folders["clip"], tmp_path / "out", DIGEST)
    assert not (tmp_path / "out").exists()
    assert not record_of(tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []
    export_for_vllm(folders["clip"], tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        export_for_vllm(folders["clip"], tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert exported_from(tmp_path / "out") == ""
    assert tower_of(folders["clip"]) in TOWERS
    assert tower_of(folders["tiny"]) not in TOWERS
    assert export_for_vllm(folders["tiny"], tmp_path / "tiny")["renamed"] == 0


def test_damaged_weights_are_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{x")):
        broken = shutil.copytree(folders["clip"], tmp_path / str(number))
        (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="no safetensors file"):
            export_for_vllm(broken, tmp_path / "out")


def test_the_server_exports_what_it_verified(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = manifest.of(folders["clip"]).digest
    flags = ["--model", str(folders["clip"]), "--export-vllm", str(tmp_path / "out")]
    assert served.main([*flags, "--digest", DIGEST]) == 1
    assert "has digest" in capsys.readouterr().err
    assert served.main([*flags, "--digest", digest]) == 0
    assert exported_from(tmp_path / "out") == digest
    assert served.main([*flags, "--digest", digest]) == 0  # again, as a pod that is started again
    (tmp_path / "out" / "config.json").write_text("{}")
    assert served.main([*flags, "--digest", digest]) == 1
