"""From asks to answers: policy before meaning before the picture before the model, and what each kind of answer is."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from facemllm import tasks
from facemllm.model.inference import Query, Scored
from facemllm.serve.asked.matching import Matcher
from facemllm.serve.asked.policy import Policy
from facemllm.serve.caller import EndsWithCaller
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.language import Answer, Ask, Encoded, Question, Refused
from facemllm.serve.planning import UNTAUGHT, Planner
from facemllm.serve.service import Served, Service

HAT = tasks.get("attributes").question("Wearing_Hat")
GENDER = tasks.get("gender").questions()[0]
CAPTION = tasks.get("caption").questions()[0]


@dataclass
class Words:
    """Understands a few words."""

    question: tasks.Question
    wording: str

    def reply(self, item: Any, value: str, text: str, probability: float | None = None) -> str:
        return f"{text}!"


class FakeMatcher:
    known = {
        "hat": Words(HAT, "taught?"),
        "sex": Words(GENDER, "sex?"),
        "tell": Words(CAPTION, "tell?"),
        "au": Words(tasks.get("action_units").questions()[0], "au?"),
    }

    def match(self, text: str) -> Words | None:
        return self.known.get(text)

    def suggestions(self, text: str, count: int = 3) -> list[str]:
        return ["A hat?"]

    def about_faces(self, text: str) -> bool:
        return "face" in text


@dataclass
class Rule:
    rule: str
    reason: str


class FakePolicy:
    def refuses(self, text: str) -> Rule | None:
        return Rule("identification", "nobody is named") if "who" in text else None

    breaks = refuses_name = refuses_text = refuses

    def refuses_options(self, text: str, options: Sequence[str], match: Any, taught: Any) -> Rule | None:
        assert {"yes", "brown hair"} <= taught
        return Rule("options", "not taught") if "Peter" in options else None

    def refuses_answer(self, text: str) -> Rule | None:
        return Rule("gender", "not here") if "man" in text.split() else None

    def refuses_task(self, task: str) -> Rule | None:
        return Rule("gender", "not here") if task == "gender" else None

    def describe(self) -> dict[str, Any]:
        return {}


@dataclass
class FakeFace:
    digest: str
    facts: dict[str, float] = field(default_factory=dict)


class FakeDecoder:
    async def prepared(self, image: Encoded, map: Encoded | None, box: Any) -> FakeFace:
        if image.digest == "broken":
            raise Refused(400, "broken")
        return FakeFace(image.digest, {"dark": float(image.digest == "dark")})


@dataclass
class FakeFound:
    scored: list[Scored]
    texts: list[str]
    characteristics: dict[str, float]


class FakeEngine:
    takes_maps, characteristic_names = False, ("Wearing_Hat", "gender=male")

    def __init__(self, wait: float = 0, greedy: int | None = 0, writes: str = "a face") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.wait, self.greedy, self.writes = wait, greedy, writes

    async def answer(
        self,
        face: FakeFace,
        closed: Sequence[Query],
        open_: Any,
        *,
        characteristics: bool,
        client: str,
        deadline: float,
    ) -> FakeFound:
        self.calls.append((face.digest, [*closed], [*open_], client))
        await asyncio.sleep(self.wait)
        scored = [Scored((0.7, *[0.3] * (len(query.options) - 1)), self.greedy) for query in closed]
        return FakeFound(scored, [f"said {chat[-1][1]}" for chat in open_], {"Wearing_Hat": 0.7, "gender=male": 0.5})

    async def stream(self, face: FakeFace, chat: Any, *, client: str, deadline: float) -> AsyncIterator[str]:
        for piece in re.findall(r"\S+ ?", self.writes):
            await asyncio.sleep(self.wait)
            yield piece


def service(engine: FakeEngine | None = None, timeout_s: float = 60) -> Service:
    return Service(
        Served("m", "1", "d"),
        [tasks.get("attributes"), tasks.get("caption"), tasks.get("unanswerable")],
        matcher=FakeMatcher(),
        policy=FakePolicy(),
        decoder=FakeDecoder(),
        refuses_picture=lambda facts: "too dark" if facts["dark"] else None,
        engine=engine or FakeEngine(),  # type: ignore[arg-type]
        evaluated=Evaluated({"attributes": {"calibration": [[0.0, 0.0], [1.0, 0.5]]}}),
        timeout_s=timeout_s,
    )


def ask(*texts: str | Question, image: str = "i", **fields: Any) -> Ask:
    questions = tuple(text if isinstance(text, Question) else Question(text) for text in texts)
    return Ask(Encoded(b"", 9, 9, image), questions, **fields)


def answers(*asks: Ask, by: Service | None = None) -> list[Answer]:
    found = asyncio.run((by or service()).answer(asks, client="c", deadline=None))
    return [one for each in found for one in each.answers]


def test_a_taught_question_is_put_in_its_taught_wording_and_answered_as_evaluation_does():
    engine = FakeEngine()
    (found,) = answers(ask("hat"), by=service(engine))
    assert engine.calls == [("i", [Query("taught?", ("yes", "no"))], [], "c")]
    assert (found.kind, found.text, found.value, found.item) == ("taught", "yes!", "yes", "Wearing_Hat")
    assert found.scores == {"yes": 0.7, "no": 0.3}
    assert found.probability == pytest.approx(0.35)
    (other,) = answers(ask("hat"), by=service(FakeEngine(greedy=None)))
    assert (other.kind, other.text, other.value) == ("abstained", "yes", None)


def test_each_kind_says_what_it_is():
    chat = (("user", "face?"), ("assistant", "b"), ("user", "c"))
    asked = ("who is it", "sex", "au", "weather", "face?", "tell", Question(task="gender"), Question("c", chat=chat))
    kinds = answers(ask(*asked, Question("face?", options=("round", "long"))))
    assert [one.kind for one in kinds] == [
        *("refused", "refused", "untaught", "untaught", "free", "taught", "refused", "free", "free")
    ]
    assert [one.rule for one in kinds] == ["identification", "gender", None, None, None, None, "gender", None, None]
    assert (kinds[3].text, kinds[3].suggestions) == (UNTAUGHT, ("A hat?",))
    assert (kinds[5].text, kinds[5].task) == ("said tell?", "caption")
    assert (kinds[8].text, kinds[8].scores, kinds[8].probability) == ("round", {"round": 0.7, "long": 0.3}, 0.7)


def test_options_of_ones_own_are_scored_only_as_the_policy_says() -> None:
    engine = FakeEngine()
    found = answers(*(ask(Question(text, options=("Peter", "hat"))) for text in ("face?", "hat")), by=service(engine))
    assert [(one.kind, one.rule) for one in found] == [("refused", "options")] * 2
    assert engine.calls == []


def test_policy_reads_every_turn_and_every_option():
    chat = (("user", "who is it"), ("assistant", "b"), ("user", "face?"))
    found = answers(ask(Question("face?", chat=chat), Question("face?", options=("x", "who knows"))))
    assert [one.kind for one in found] == ["refused", "refused"]
    turns = [
        (("user", first), ("assistant", "b"), ("user", second)) for first, second in (("sex", "face?"), ("a", "b"))
    ]
    found = answers(*(ask(Question(chat[-1][1], chat=chat)) for chat in turns))
    assert [one.kind for one in found] == ["refused", "untaught"]  # a refused task, and nothing about faces at all


def test_a_last_turn_that_asks_for_an_item_by_itself_is_answered_as_that_item():
    def talk(*texts: str, by: Service | None = None) -> Answer:
        chat = tuple((("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
        (found,) = answers(ask(Question(texts[-1], chat=chat)), by=by)
        return found

    engine = FakeEngine()
    found = talk("face?", "round", "hat", by=service(engine))
    assert (found.kind, found.item, found.value) == ("taught", "Wearing_Hat", "yes")
    assert engine.calls == [("i", [Query("taught?", ("yes", "no"))], [], "c")]
    assert talk("hat", "yes", "sure?").kind == "free", "what hangs on the turns before it has them before the model"
    assert talk("weather", "no", "hat").item == "Wearing_Hat"
    for refused in (("who", "b", "hat"), ("sex", "b", "hat"), ("hat", "who", "hat"), ("hat", "b", "sex")):
        assert talk(*refused).kind == "refused"


def test_a_picture_that_evaluation_does_not_cover_is_not_guessed_at():
    engine = FakeEngine()
    found = answers(ask("hat", "who", "tell", image="dark"), by=service(engine))
    assert [(one.kind, one.value) for one in found] == [("abstained", None), ("refused", None), ("abstained", None)]
    assert (found[0].reason, found[0].item) == ("too dark", "Wearing_Hat")
    assert engine.calls == []


def test_questions_about_one_face_are_put_together_and_answered_in_their_order():
    engine = FakeEngine()
    by = service(engine)
    found = answers(ask("tell", "hat"), ask("hat", image="j"), ask("weather", "hat"), ask("who", image="k"), by=by)
    assert [(digest, len(closed), len(open_)) for digest, closed, open_, _ in engine.calls] == [
        ("i", 2, 1),
        ("j", 1, 0),
    ]
    assert [one.item for one in found] == [CAPTION.item, HAT.item, HAT.item, None, HAT.item, None]


def test_scores_of_characteristics_are_those_of_tasks_that_may_be_asked():
    first, second = asyncio.run(
        service().answer([ask("hat", characteristics=True), ask("hat")], client="c", deadline=None)
    )
    assert (first.characteristics, second.characteristics) == ({"Wearing_Hat": 0.7}, None)


def test_what_is_less_probable_than_asked_for_is_held_back():
    sure, unsure = (answers(ask("hat", "tell", min_probability=least)) for least in (0.35, 0.36))
    assert [one.kind for one in sure] == ["taught", "taught"]
    assert [(one.kind, one.value) for one in unsure] == [("abstained", None), ("taught", unsure[1].value)]


def test_a_refused_picture_ends_the_request():
    with pytest.raises(Refused, match="broken"):
        answers(ask("hat"), ask("hat", image="broken"))


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_what_takes_too_long_is_refused_in_time(way: str):
    slow = service(FakeEngine(wait=30), timeout_s=0.01)

    async def go() -> None:
        if way == "whole":
            await slow.answer([ask("hat")], client="c", deadline=time.monotonic() + 60)
        else:
            async for _ in slow.stream(ask("face?"), client="c", deadline=None):
                pass

    with pytest.raises(Refused, match="no answer in time") as refusal:
        asyncio.run(go())
    assert refusal.value.status == 504


def test_a_stream_gives_pieces_and_then_the_whole():
    async def go(text: str, image: str = "i", writes: str = "a face") -> list[Any]:
        by = service(FakeEngine(writes=writes))
        return [one async for one in by.stream(ask(text, image=image), client="c", deadline=None)]

    assert asyncio.run(go("face?")) == ["a face", Answer("free", "a face")]
    long = "It is long. " * 20 + "And so on"
    *pieces, whole = asyncio.run(go("face?", writes=long))
    assert whole == Answer("free", long)
    assert "".join(pieces) == long
    assert len(pieces) > 5, "sentences are given as they end"
    assert len(pieces[0].split()) >= 39, "after the first words were read together"
    assert asyncio.run(go("tell"))[:2] == ["a ", "face"], "what is taught is given as it is written"
    (closed,) = asyncio.run(go("hat"))
    assert closed.text == "yes!"
    (dark,) = asyncio.run(go("face?", "dark"))
    assert (dark.kind, dark.reason) == ("abstained", "too dark")
    (refused,) = asyncio.run(go("who"))
    assert refused.kind == "refused"


def test_free_words_do_not_tell_what_is_withheld() -> None:
    (found,) = answers(ask("is man a face"))
    assert (found.kind, found.rule, found.value) == ("refused", "gender", None)
    assert "man" not in found.text.split()

    async def go(writes: str) -> list[Any]:
        by = service(FakeEngine(writes=writes))
        return [one async for one in by.stream(ask("face?"), client="c", deadline=None)]

    for harmless in ("one two three four is ", "A face. It is round. " * 4):
        (whole,) = asyncio.run(go(f"{harmless}a man there"))
        assert (whole.kind, whole.rule) == ("refused", "gender"), "nothing of it has gone out"
    *pieces, whole = asyncio.run(go("A face is there. " * 20 + "It is a man there. " * 20))
    assert (whole.kind, whole.rule) == ("refused", "gender")
    assert "man" not in "".join(pieces).split(), "of a long one whole sentences before it"


@pytest.mark.parametrize("leaves", [True, False])
def test_work_ends_when_the_client_leaves_and_not_when_it_only_stops_talking(leaves: bool):
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await asyncio.sleep(30 if leaves else 0.01)
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"x"})
            ended.append("answered")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def go() -> list[str]:
        came = iter([{"type": "http.request", "body": b"", "more_body": False}])
        sent: list[str] = []

        async def receive() -> Any:
            if (first := next(came, None)) is not None:
                return first
            if not leaves:
                await asyncio.sleep(30)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await EndsWithCaller(app)({"type": "http"}, receive, send)
        return sent

    sent = asyncio.run(go())
    assert ended == (["cancelled"] if leaves else ["answered"])
    assert bool(sent) is not leaves


def test_what_names_nothing_here_is_refused():
    for question, line in (
        (Question(task="identity"), "request.task: unknown; known are attributes, caption"),
        (Question(task="age"), "known are"),
        (Question(task="unanswerable"), "request.task: unknown; known are attributes, caption$"),
        (Question(task="unanswerable", item="unanswerable"), "request.task: unknown"),
        (Question(task="attributes"), "request.item: one of"),
        (Question(task="attributes", item="name"), "request.item: one of"),
    ):
        with pytest.raises(Refused, match=line):
            answers(ask(question))
    with pytest.raises(Refused, match=r"here\.segmentation"):
        answers(replace(ask("hat", where="here"), map=Encoded(b"", 9, 9, "m")))


def test_more_text_than_is_read_at_once_is_refused_before_it_is_read():
    engine = FakeEngine()
    many = tuple(f"{n} " + "a" * 98 for n in range(64))
    for question in (Question("hat", options=many), Question("hat", chat=(("user", "x" * 40_000),))):
        with pytest.raises(Refused, match="characters of text") as refusal:
            answers(ask(question), by=service(engine))
        assert refusal.value.status == 413


def test_what_is_asked_by_pieces_over_the_turns_of_a_chat_is_refused() -> None:
    policy = Policy({"age": "drawn heads"})
    planner = Planner([tasks.get("attributes")], Matcher([tasks.get("attributes")]), policy)
    image = Encoded(b"", 9, 9, "i")

    def rule(*texts: str) -> str | None:
        chat = tuple((("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
        found = planner.plan(Ask(image, ()), Question(texts[-1], chat=chat)).answer
        return found.rule if found else None

    first, second = "Where was she", "born"
    assert (policy.breaks(first), policy.breaks(second)) == (None, None)
    assert rule(first, "go on", second) == "nationality"
    assert rule("What color is the hair?", "brown", "Is she wearing a hat?") is None
