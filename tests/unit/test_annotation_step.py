"""The step with a model behind it: the ledger, contradictions, provenance, stops, the estimate and the bill. No Ray:
the pieces of the job are worked off in this process."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field, replace

import pytest

from facemllm import settings
from facemllm.annotate import job, prompt
from facemllm.annotate import run as step
from facemllm.annotate.annotator import Annotation, Chained
from facemllm.annotate.describer import endpoint, estimate, local
from facemllm.asking import local as local_model
from facemllm.asking.requests import JobStopped, RowRefused
from facemllm.asking.store import purge
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.tables import FACES, open_table, pairs
from tests.fake_endpoint import COMPLETION_TOKENS, PROMPT_TOKENS, FakeEndpoint, reply
from tests.refusing import refuses


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """The same pieces in the same order, without the machine that spreads them."""

    def answers(annotator, faces, batch_size, concurrency):
        for piece in job._pieces(faces, batch_size):
            for row in job._annotate(annotator, piece, batch_size).to_pylist():
                if row["stop"] is not None:
                    raise JobStopped(row["stop"])
                said = None if row["reply"] is None else Annotation(**json.loads(row["reply"]))
                yield row["image_id"], said, row["reason"]

    monkeypatch.setattr(step, "answers", answers)


@pytest.fixture
def configured(tmp_path):
    """`configured(fake, "annotate.endpoint.x=y", home=...)`: settings with the endpoint annotator."""

    def make(fake, *overrides, home="home"):
        given = {"annotator": "endpoint", "vision_language.model": "m", "endpoint.base_url": fake.base_url}
        given |= {"endpoint.retries": 1, "endpoint.timeout_s": 5}
        chosen = [f"annotate.{name}={value}" for name, value in given.items()]
        return settings.load("laptop", [f"storage.home={tmp_path / home}", *chosen, *overrides])

    return make


def test_rows_are_described_and_every_field_says_by_whom(configured, faces_table, face_rows, tmp_path):
    rows = [row | {"age": None, "expression": None, "attributes": []} for row in face_rows(3)]
    faces = faces_table(rows)
    text = reply("A woman, about 30 years old.", "happiness", 30, None, Bald=False)
    with FakeEndpoint(default=f"text:{text}") as fake:
        chosen = configured(fake, "annotate.endpoint.input_price=1", "annotate.endpoint.output_price=10")
        manifest = step.annotate(chosen, faces, tmp_path / "out")
        model = endpoint(chosen, ["render"])
    about = manifest["about"]
    assert (manifest["rows"], manifest["quarantined"], manifest["parents"]) == (3, 0, [open_table(faces).digest])
    assert (about["annotator"], about["annotator_digest"], about["sources"]) == ("endpoint", model.digest, ["render"])
    for row in open_table(tmp_path / "out", FACES).iterate():
        assert (row["caption"], row["age"], row["expression"]) == ("A woman, about 30 years old.", 30.0, "happiness")
        entries = {entry["field"]: entry for entry in row["provenance"]}
        described = {name for name, entry in entries.items() if entry["origin"] == "annotator"}
        assert described == {"age", "attributes", "caption", "expression"}
        assert entries["gender"]["origin"] == "renderer"
        assert {entries[name]["model_digest"] for name in ("age", "caption")} == {model.model_digest}
        asked = next(r for r in open_table(faces).iterate() if r["image_id"] == row["image_id"])
        assert entries["caption"]["prompt_hash"] == digests.of_json(prompt.messages(asked))
        assert all(entry["time"] is None for entry in row["provenance"])
        cost = (PROMPT_TOKENS + 10 * COMPLETION_TOKENS) / 1e6
        assert sum(entry["cost"] for entry in row["provenance"]) == pytest.approx(cost)


def test_the_table_does_not_depend_on_how_the_job_went(configured, faces_table, face_rows, tmp_path):
    faces = faces_table(face_rows(12))
    with FakeEndpoint() as fake:
        plain = step.annotate(configured(fake), faces, tmp_path / "plain")
        fake.script = ["500", "429:0.01", "reset"]
        cut = ("annotate.batch_size=7", "annotate.endpoint.parallel=2", "annotate.endpoint.retries=9")
        limits = ("annotate.endpoint.max_requests=99", "annotate.endpoint.timeout_s=6")
        disturbed = step.annotate(configured(fake, *cut, *limits, home="rough"), faces, tmp_path / "disturbed")
        assert purge(tmp_path / "home", [face_rows(1)[0]["image_id"]]) == 1
        asked = fake.received.total()
        again = step.annotate(configured(fake), faces, tmp_path / "again")
        assert fake.received.total() == asked + 1, "the purged picture is asked about again, and no other"
        hotter = step.annotate(configured(fake, "annotate.vision_language.temperature=0.5"), faces, tmp_path / "hotter")
        other = step.annotate(configured(fake, "annotate.vision_language.model=n"), faces, tmp_path / "other")
    assert plain["digest"] == disturbed["digest"] == again["digest"]
    assert len({plain["digest"], hotter["digest"], other["digest"]}) == 3


def test_what_the_table_depends_on_is_named(configured, tmp_path):
    with FakeEndpoint() as fake:
        plain = step.reads(configured(fake))
        same = ("parallel=3", "timeout_s=9", "retries=0", "max_requests=5", "max_tokens=5", "base_url=http://[::1]/v1")
        for one in same:
            assert step.reads(configured(fake, f"annotate.endpoint.{one}")) == plain
        assert step.reads(configured(fake, "annotate.batch_size=1", "annotate.concurrency=1")) == plain
        for other in ("vision_language.model=n", "vision_language.max_tokens=9", "endpoint.input_price=1"):
            assert step.reads(configured(fake, f"annotate.{other}")) != plain
        own = tmp_path / "own.yaml"
        own.write_text("celeba: {uses: [train, third_party]}\n")
        assert step.reads(configured(fake, f"ingest.ledger={own}")) != plain
        mine = "annotate.endpoint.third_party=false"
        assert step.reads(configured(fake, mine, f"ingest.ledger={own}")) == step.reads(configured(fake, mine))
    assert step.reads(settings.load("laptop")) == {"annotator": "oracle", "experts": []}


def test_contradictions_of_text_and_labels_are_counted(configured, faces_table, face_rows, tmp_path):
    """Rows are labelled 20 to 23 years old, female twice, male twice, neutral and happy in turn."""
    with FakeEndpoint() as fake:
        chosen = configured(fake)
        faces = faces_table(face_rows(4))
        said = [
            reply("A man, about 20 years old.", "neutral", 20, "female"),
            reply("A woman, about 60 years old.", "happiness", 60, "female", Bald=True),
            reply("Perhaps a woman or a man before a wall.", None, None, None),
            reply("A man who looks sad, about 25 years old.", "happiness", 23, "female"),
        ]
        describer, order = endpoint(chosen, ["render"]), open_table(faces).iterate()
        keys = [describer.key(row["image_id"], prompt.messages(row)) for row in order]
        fake.plan = {key: [f"text:{text}"] for key, text in zip(keys, said, strict=True)}
        about = step.annotate(chosen, faces, tmp_path / "out")["about"]
    assert about["contradictions"] == {"age": 1, "expression": 1, "gender": 1}
    assert (about["label_contradictions"], about["ledger_refused"]) == ({"Bald": 1, "age": 1, "gender": 1}, {})
    genders = [row["gender"] for row in open_table(tmp_path / "out").iterate(["gender"])]
    assert genders == ["female", "female", "male", "male"], "the source's own label stands"


def test_only_rows_that_the_ledger_allows_are_sent(configured, faces_table, face_rows, tmp_path):
    rows = face_rows(6)
    for number in (1, 4):
        rows[number]["source"] = "raf-db"
    rows[5]["source"] = "celeba"
    faces = faces_table(rows)
    with FakeEndpoint() as fake:
        manifest = step.annotate(configured(fake), faces, tmp_path / "out")
        assert fake.received.total() == 3
        assert (manifest["rows"], manifest["quarantined"]) == (3, 3)
        assert manifest["about"]["ledger_refused"] == {"celeba": 1, "raf-db": 2}
        refused = list(open_table(tmp_path / "out").refused())
        assert [row["row"] for row in refused] == [1, 4, 5]
        assert "source 'raf-db'" in refused[0]["reason"]
        assert "do not allow to send its pictures to a third party; ledger row:" in refused[0]["reason"]
        own = step.annotate(configured(fake, "annotate.endpoint.third_party=false"), faces, tmp_path / "own")
        assert (own["rows"], own["about"]["ledger_refused"]) == (6, {})


def test_a_table_of_which_nothing_may_be_sent_is_refused_at_once(configured, faces_table, face_rows, tmp_path):
    faces = faces_table([row | {"source": "raf-db"} for row in face_rows(3)])
    unknown = faces_table([row | {"source": "somewhere"} for row in face_rows(3)], name="unknown")
    with FakeEndpoint() as fake:
        with pytest.raises(UserError, match=r"source 'raf-db' do not allow to send its pictures to a third party"):
            step.annotate(configured(fake), faces, tmp_path / "out")
        with pytest.raises(UserError, match="source 'somewhere' is not in the dataset ledger"):
            step.annotate(configured(fake), unknown, tmp_path / "out")
        assert fake.received.total() == 0
    assert not (tmp_path / "out").exists()


def test_a_stop_is_one_line_and_the_next_run_goes_on(configured, faces_table, tmp_path):
    faces = faces_table()
    cut = ("annotate.batch_size=5", "annotate.endpoint.parallel=2")
    with FakeEndpoint() as fake:
        limited = configured(fake, "annotate.endpoint.max_requests=12", *cut)
        said = r"^annotation stopped after \d+ of 40 rows: annotate\.endpoint\.max_requests is used up; raise it\. "
        kept = "What was answered is kept; run again to go on$"
        refuses(said + kept, step.annotate, limited, faces, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert fake.received.total() == 12
        (path,) = (tmp_path / "home" / "annotations").glob("*/bill.json")
        assert json.loads(path.read_text())["this_run"]["answered"] == 12
        fake.default = "401"
        with pytest.raises(UserError, match=r"refuses every request \(401: told to say 401\); mend its key or address"):
            step.annotate(configured(fake, *cut), faces, tmp_path / "out")
        assert not list(tmp_path.glob(".out*"))
        fake.default = "good"
        manifest = step.annotate(configured(fake), faces, tmp_path / "out")
        assert manifest["rows"] == 40
        assert fake.completed.total() == 40
        assert max(fake.completed.values()) == 1


def test_the_estimate_before_and_the_bill_after(configured, faces_table, face_rows, tmp_path):
    rows = [*face_rows(9), face_rows(10)[9] | {"source": "celeba"}]
    faces = faces_table(rows)
    prices = ("annotate.endpoint.input_price=2", "annotate.endpoint.output_price=8")
    with FakeEndpoint() as fake:
        chosen = configured(fake, *prices)
        before = estimate(chosen, faces)
        counts = {"annotator": "endpoint", "rows": 10, "stored": 0, "ledger_refused": 1, "requests": 9}
        assert counts.items() <= before.items()
        assert before["measured"] is False
        assert before["completion_tokens"] == 9 * 400
        assert 9 * 500 < before["prompt_tokens"] < 9 * 2000
        assert before["price"] == pytest.approx((before["prompt_tokens"] * 2 + 3600 * 8) / 1e6)
        assert estimate(configured(fake), faces)["price"] is None
        assert fake.received.total() == 0

        fake.script = ["500", "wrong"]
        manifest = step.annotate(chosen, faces, tmp_path / "out")
        assert manifest["quarantined"] == 1
        (path,) = (tmp_path / "home" / "annotations").glob("*/bill.json")
        bill = json.loads(path.read_text())
        run = bill["this_run"]
        paid = {name: run[name] for name in ("requests", "answered", "refused", "repairs", "retries", "in_doubt")}
        assert paid == {"requests": 11, "answered": 10, "refused": 1, "repairs": 1, "retries": 1, "in_doubt": 0}
        assert (run["prompt_tokens"], run["completion_tokens"]) == (10 * PROMPT_TOKENS, 10 * COMPLETION_TOKENS)
        assert run["price"] == pytest.approx(10 * (PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 8) / 1e6)
        assert bill["all_runs"] == run

        after = estimate(chosen, faces)
        assert (after["stored"], after["requests"], after["price"]) == (9, 0, 0.0)
        more = estimate(chosen, faces_table(face_rows(12), name="more"))
        assert (more["stored"], more["requests"], more["measured"]) == (9, 3, True)
        assert (more["prompt_tokens"], more["completion_tokens"]) == (3 * PROMPT_TOKENS, 3 * COMPLETION_TOKENS)

        step.annotate(chosen, faces, tmp_path / "again")
        bill = json.loads(path.read_text())
        assert (bill["this_run"]["requests"], bill["all_runs"]["requests"]) == (0, 11)
    free = {"annotator": "oracle", "rows": 10, "requests": 0, "price": 0.0}
    assert estimate(settings.load("laptop"), faces) == free


@dataclass(frozen=True)
class Sayer:
    """An annotator that gives everybody the same answer, or refuses some."""

    name: str
    said: Annotation
    columns: tuple[str, ...] = ("age",)
    needs_image: bool = False
    dreads: tuple[float, ...] = ()
    ages: list[float] = field(default_factory=list)

    @property
    def digest(self):
        return digests.of_bytes(self.name.encode())

    def annotate(self, rows):
        if any(row["age"] in self.dreads for row in rows):
            raise ValueError("cannot look")
        self.ages.extend(row["age"] for row in rows)
        return [self.said for _ in rows]


def test_experts_fill_their_fields_in_the_same_pass_and_stand_in_provenance(faces_table, face_rows, tmp_path):
    blank = {"yaw": None, "pitch": None, "roll": None, "action_units": []}
    faces = faces_table([row | blank for row in face_rows(5)])
    found = Annotation(labels={"yaw": 12.0, "pitch": None, "action_units": {"AU1": 1.0}}, cost=0.25)
    experts = Sayer("experts", found, columns=("box", "age"), dreads=(22.0,))
    main = Sayer("main", Annotation(caption="A face.", labels={"action_units": {"AU2": 2.0}}, cost=0.5))
    chain = Chained(experts, main)
    assert chain.columns == ("box", "age")
    assert chain.needs_image is False
    assert Chained(replace(experts, needs_image=True), main).needs_image
    assert chain.digest != Chained(main, experts).digest
    manifest = step.run(chain, open_table(faces, FACES), tmp_path / "out", batch_size=3, concurrency=1)
    assert (manifest["rows"], manifest["quarantined"], manifest["about"]["annotator"]) == (4, 1, "main+experts")
    assert main.ages == [20.0, 21.0, 23.0, 24.0], "what the experts refuse is not shown to the model"
    for row in open_table(tmp_path / "out", FACES).iterate():
        entries = {entry["field"]: entry for entry in row["provenance"]}
        assert (row["yaw"], row["pitch"], row["caption"]) == (12.0, None, "A face.")
        assert (entries["yaw"]["origin"], entries["yaw"]["model_digest"]) == ("expert", experts.digest)
        assert (entries["caption"]["origin"], entries["caption"]["model_digest"]) == ("annotator", main.digest)
        assert sum(entry["cost"] for entry in row["provenance"]) == 0.75
        assert {pair["name"] for pair in row["action_units"]} == {"AU1", "AU2"}
    (refused,) = open_table(tmp_path / "out").refused()
    assert refused["reason"] == "ValueError: cannot look"


def test_a_stop_of_the_model_stops_the_chain():
    @dataclass(frozen=True)
    class Spent(Sayer):
        def annotate(self, rows):
            raise JobStopped("spent")

    chain = Chained(Sayer("experts", Annotation()), Spent("main", Annotation()))
    refuses("spent", chain.annotate, [{"age": 1.0}, {"age": 2.0}], error=JobStopped)


def test_configured_experts_run_before_the_annotator(faces_table, tmp_path, monkeypatch):
    from facemllm.annotate import experts

    said = Sayer("experts", Annotation(labels={"ethnicity": "seen"}))
    monkeypatch.setattr(experts.Experts, "of", classmethod(lambda cls, chosen: said))
    chosen = settings.load("laptop", ["annotate.experts.fields=[head_pose]", f"annotate.experts.models={tmp_path}"])
    manifest = step.annotate(chosen, faces_table(), tmp_path / "out")
    assert manifest["about"]["annotator"] == "oracle+experts"
    assert {row["ethnicity"] for row in open_table(tmp_path / "out").iterate(["ethnicity"])} == {"seen"}


def test_what_a_job_refuses_and_where_it_stops_travels_as_values(faces_table):
    @dataclass(frozen=True)
    class Fussy(Sayer):
        def annotate(self, rows):
            if any(row["age"] == 30.0 for row in rows):
                raise JobStopped("enough")
            return [RowRefused("plainly not") if row["age"] == 21.0 else self.said for row in rows]

    (piece,) = job._pieces(open_table(faces_table(), FACES), 1000)
    rows = job._annotate(Fussy("fussy", Annotation(caption="A face.")), piece, 4).to_pylist()
    assert [row["reason"] for row in rows if row["reason"]] == ["plainly not"]
    assert len(rows) == 9, "eight rows of two whole batches, then the stop"
    assert [row["stop"] for row in rows] == [None] * 8 + ["enough"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights that knows the words of the prompt."""
    torch = pytest.importorskip("torch")
    from facemllm.model.tiny import build_tiny

    torch.set_num_threads(1)
    chosen = settings.load("laptop", ["model.image_size=32"])
    texts = [message["text"] for message in prompt.messages({})]
    model, processor = build_tiny(chosen.model, texts, ["yes", "no"], seed=0)
    model.config.text_config.max_position_embeddings = 4096  # the prompt is longer than the preset reads
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def locally(folder, home):
    given = ["annotator=local", f"vision_language.model={folder}", "vision_language.max_tokens=2"]
    return settings.load("laptop", [f"storage.home={home}", *(f"annotate.{override}" for override in given)])


def test_a_local_model_of_random_weights_is_refused_row_by_row(checkpoint, faces_table, face_rows, tmp_path):
    faces = faces_table([*face_rows(1), face_rows(2)[1] | {"source": "celeba"}])
    chosen = locally(checkpoint, tmp_path / "home")
    manifest = step.annotate(chosen, faces, tmp_path / "out")
    assert (manifest["rows"], manifest["quarantined"]) == (0, 2)
    said = "the model's reply does not fit, nor does the mended one: it was cut off after 2 tokens; be shorter"
    assert {row["reason"] for row in open_table(tmp_path / "out").refused()} == {said}
    with closing(sqlite3.connect(tmp_path / "home" / "annotations" / "replies.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone() == (4,)
    assert manifest["about"]["ledger_refused"] == {}, "nothing leaves the machine"
    assert step.reads(chosen)["weights"] == digests.of_tree(checkpoint)


def test_a_local_model_that_answers_well_describes_rows(checkpoint, faces_table, face_rows, tmp_path, monkeypatch):
    asked = []

    def generate(model, requests):
        asked.extend(requests)
        return [(reply(f"A face in picture {r.image_id[:8]}.", "fear", None, None), 90, 5) for r in requests]

    monkeypatch.setattr(local_model, "generate", generate)
    faces = faces_table([row | {"expression": None} for row in face_rows(11)])
    chosen = locally(checkpoint, tmp_path / "home")
    manifest = step.annotate(chosen, faces, tmp_path / "out")
    assert (manifest["rows"], len(asked)) == (11, 11)
    for row in open_table(tmp_path / "out").iterate():
        assert (row["caption"], row["expression"]) == (f"A face in picture {row['image_id'][:8]}.", "fear")
        by = {entry["field"]: entry for entry in row["provenance"]}["caption"]
        assert (by["model_digest"], by["cost"]) == (digests.of_tree(checkpoint), 0.0)
    again = step.annotate(chosen, faces, tmp_path / "again")
    assert (len(asked), again["digest"]) == (11, manifest["digest"])


def test_a_local_model_sees_picture_and_words_and_answers_alike(checkpoint, face_rows, tmp_path):
    made = [local(locally(checkpoint, tmp_path / name)) for name in ("one", "two")]
    blank = dict.fromkeys(FACES.names)
    rows = [blank | {"attributes": pairs({}), **row} for row in face_rows(2)]
    requests = [made[0].request(row, prompt.messages(row)) for row in rows]
    first, second = (local_model.generate(one.sender, requests) for one in made)
    assert first == second
    assert all(tokens == 2 and prompt_tokens > 100 for _, prompt_tokens, tokens in first)
    hot = replace(made[0].sender, temperature=1.0)
    assert local_model.generate(hot, requests[:1]) == local_model.generate(hot, requests[:1])


def test_only_safetensors_are_loaded(tmp_path, checkpoint):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuses(r"holds no \*\.safetensors; nothing else is loaded", local, locally(folder, tmp_path))
    (folder / "model.safetensors").write_bytes(b"none")
    made = local(locally(folder, tmp_path))
    refuses("model.safetensors is damaged", local_model.generate, made.sender, [], error=JobStopped)
