"""Exports load with `datasets`, pass the checks of the tool they are for if it is here, and say what the tables say."""

import json

import pytest
from typer.testing import CliRunner

from facemllm import settings, tasks
from facemllm.cli.main import app
from facemllm.reformat.export import FORMATS, export
from facemllm.reformat.run import reformat
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, open_table
from facemllm.version.tombstones import Marks, Tombstones
from tests.asked import with_attributes
from tests.conftest import conversation, face
from tests.refusing import refuses

FORMS = "reformat.forms={native: 1, statement: 1, lettered: 1, dialogue: 1}"
HELD = "reformat.held_out=[Wearing_Earrings]"
WHOLE = "reformat.held_out_combinations=[]"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    return settings.load("laptop", [FORMS, HELD, WHOLE, f"storage.home={tmp_path_factory.mktemp('home')}"])


@pytest.fixture(scope="module")
def talks(limits, tmp_path_factory):
    """A conversations table of forty faces, in all ways of asking."""
    folder = tmp_path_factory.mktemp("talks")
    with TableWriter(folder / "faces", FACES) as table:
        table.write(with_attributes(map(face, range(40)), "A man with earrings. A hat."))
    reformat(limits, folder / "faces", folder / "talks")
    return folder / "talks"


@pytest.fixture
def loaded(tmp_path):
    import datasets

    def load(kind, file):
        return datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    return load


def rows_of(talks, split="train"):
    return list(open_table(talks, CONVERSATIONS).iterate(split=split))


def words(row):
    return [message["content"][-1]["text"] for message in row["messages"]]


def test_llava_is_a_list_of_chats_with_one_picture_each(talks, limits, loaded, tmp_path):
    summary = export(limits, talks, tmp_path / "out", "llava")
    made, rows = loaded("json", tmp_path / "out" / "train.json"), rows_of(talks)
    assert summary["kept"] == summary["entries"] == len(made) == len(rows) == 24
    for entry, row in zip(made, rows, strict=True):
        assert entry["id"] == row["conversation_id"]
        assert [said["from"] for said in entry["conversations"]] == ["human", "gpt"] * len(row["turns"])
        values = [said["value"] for said in entry["conversations"]]
        assert values == ["<image>\n" + words(row)[0], *words(row)[1:]]
        picture = tmp_path / "out" / "images" / entry["image"]
        assert picture.read_bytes() == row["images"][0]["bytes"]
        assert picture.stem == row["image_id"]


def test_sharegpt_is_what_llama_factory_documents(talks, limits, loaded, tmp_path):
    export(limits, talks, tmp_path / "out", "sharegpt", "test")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    (name, entry), rows = *info.items(), rows_of(talks, "test")
    assert name == "face_mllm_test"
    assert entry["formatting"] == "sharegpt"
    made = loaded("json", tmp_path / "out" / entry["file_name"])
    tags, columns = entry["tags"], entry["columns"]
    for found, row in zip(made, rows, strict=True):
        messages = found[columns["messages"]]
        assert [m[tags["role_tag"]] for m in messages] == [tags["user_tag"], tags["assistant_tag"]] * len(row["turns"])
        text = "".join(m[tags["content_tag"]] for m in messages)
        assert text.count("<image>") == len(found[columns["images"]]) == 1
        assert (tmp_path / "out" / found[columns["images"]][0]).read_bytes() == row["images"][0]["bytes"]
        assert [m[tags["content_tag"]].removeprefix("<image>\n") for m in messages] == words(row)


def test_sharegpt_goes_through_llama_factorys_own_converter(talks, limits, loaded, tmp_path):
    converter = pytest.importorskip("llamafactory.data.converter", exc_type=ImportError)
    from types import SimpleNamespace

    from llamafactory.data.parser import get_dataset_list

    out = tmp_path / "out"
    export(limits, talks, out, "sharegpt")
    (attributes,) = get_dataset_list(["face_mllm_train"], str(out))
    convert = converter.SharegptDatasetConverter(attributes, SimpleNamespace(media_dir=str(out)))
    for entry, row in zip(loaded("json", out / "train.json"), rows_of(talks), strict=True):
        found = convert(entry)
        assert len(found["_prompt"]) + len(found["_response"]) == len(row["messages"])
        assert found["_images"] == [str(out / entry["images"][0])]


def test_trl_takes_messages_and_decoded_pictures(talks, limits, loaded, tmp_path):
    trl = pytest.importorskip("trl.data_utils")
    export(limits, talks, tmp_path / "out", "trl")
    made = loaded("parquet", tmp_path / "out" / "train.parquet")
    for entry, row in zip(made, rows_of(talks), strict=True):
        assert trl.is_conversational(entry)
        prepared = trl.prepare_multimodal_messages(entry["messages"], images=entry["images"])
        assert prepared[0]["content"][0]["image"].size == (48, 48)
        assert [m["content"][-1]["text"] for m in prepared] == words(row)


def outright(rows):
    """Of the turns that stand alone in their item's own form: whose picture, the turn, its words and the reply's."""
    for row in rows:
        said = words(row)
        for turn, *texts in zip(row["turns"], said[::2], said[1::2], strict=True):
            if tasks.question_of(turn).variant == "native" and not turn["follows"]:
                yield row["image_id"], turn, *texts


@pytest.mark.parametrize("split", ["train", "test"])
def test_facebench_asks_every_question_that_stands_alone_and_no_other(split, talks, limits, loaded, tmp_path):
    summary = export(limits, talks, tmp_path / "out", "facebench", split)
    made, asked = loaded("json", tmp_path / "out" / f"{split}.jsonl"), list(outright(rows_of(talks, split)))
    assert len(made) == summary["entries"] == len(asked)
    for entry, (image_id, turn, text, reply) in zip(made, asked, strict=True):
        assert (entry["question_id"], entry["text"]) == (turn["template"], text)
        assert entry["gt_answer"].lower() == reply.lower()
        assert (entry["question_type"] == "OEQ") == (entry["options"] == [])
        assert entry["gt_answer"] in (entry["options"] or [entry["gt_answer"]])
        assert entry["conditions"] == {"option Y": [], "option N": []}
        assert (tmp_path / "out" / "images" / entry["image_id"]).is_file()
        assert entry["image_id"].startswith(image_id)
    assert {entry["question_type"] for entry in made} == {"TFQ", "SCQ", "OEQ"}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_split_that_is_none_touches_no_file(name, talks, limits, tmp_path):
    victims = [tmp_path / f"victim.{kind}" for kind in ("json", "jsonl", "parquet")]
    for victim in victims:
        victim.write_text("precious")
    before = sorted(tmp_path.iterdir())
    said = r"no split '\.\./victim'; choose one of train, validation, test"
    refuses(said, export, limits, talks, tmp_path / "out", name, "../victim")
    typed = ["export", str(talks), str(tmp_path / "out"), "--format", name, "--split", "../victim"]
    assert CliRunner().invoke(app, typed).exit_code == 2
    assert [victim.read_text() for victim in victims] == ["precious"] * 3
    assert sorted(tmp_path.iterdir()) == before


def test_facexbench_reads_back_through_our_own_reader(talks, limits, loaded, tmp_path):
    from facemllm.ingest import benchmarks

    summary = export(limits, talks, tmp_path / "out", "facexbench", "train")
    found = list(benchmarks.read("facexbench", tmp_path / "out"))
    assert len(found) == summary["entries"] > 24
    alone = outright(rows_of(talks))
    truth = {(image_id, tasks.question_of(turn).item): said for image_id, turn, *said in alone}
    letters = set()
    for file in sorted((tmp_path / "out" / "benchmark").glob("*.json")):
        held = json.loads(file.read_text())
        assert loaded("json", file)[0]["sub-category"] == held["sub-category"]
        item = tasks.get(held["category"]).item(held["sub-category"])
        for number, entry in enumerate(held["questions"].values(), start=1):
            assert str(number) in held["questions"]
            assert len(set(entry["options"])) == 4
            assert entry["options"]["ABCD".index(entry["correct_answer_option"])] == entry["answer"]
            image_id = entry["image_paths"][0].removeprefix("images/").partition(".")[0]
            assert {option.text for option in item.options}.issuperset(entry["options"])
            assert truth[(image_id, item.name)] == [entry["question_text"], entry["answer"]]
            letters.add(entry["correct_answer_option"])
    assert letters == set("ABCD")


@pytest.mark.parametrize("name", list(FORMATS))
def test_exports_say_whose_pictures_they_are_and_come_out_the_same(name, talks, limits, tmp_path):
    first, again = (export(limits, talks, tmp_path / out, name) for out in ("a", "b"))
    assert first == again
    assert first["split"] == ("test" if name.startswith("face") else "train")
    summary = json.loads((tmp_path / "a" / "SOURCES.json").read_text())
    assert [row["key"] for row in summary["sources"]] == ["render"]
    assert summary["uses"] == ["train", "evaluate", "serve", "third_party"]
    assert summary["conversations"] == open_table(talks).digest
    export(limits, talks, tmp_path / "out", name, "train")
    for file in tmp_path.glob("out/**/*.json*"):  # no byte of a training export names what is held out
        assert b"earring" not in file.read_bytes().lower()


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(talks, limits, conversations_table, tmp_path):
    out, row = tmp_path / "out", rows_of(talks)[0]
    refuses("no format 'csv'; choose one of llava, sharegpt", export, limits, talks, out, "csv")
    few = conversations_table([row])
    refuses("nothing to export as trl: it has no row of split 'test'", export, limits, few, out, "trl", "test")
    mine = settings.load("laptop", [f"storage.home={tmp_path / 'home'}"])
    Tombstones.of(mine).add("image", Marks(image=frozenset({row["image_id"]})), reason="asked", by="Ada Lovelace")
    refuses("1 of 40 rows were forgotten", export, mine, talks, out, "llava")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_terms_are_asked_for_what_the_split_is_for(talks, limits, conversations_table, tmp_path):
    talks = conversations_table(row | {"source": "aflw2000"} for row in open_table(talks).iterate())
    mine = tmp_path / "ledger.yaml"
    mine.write_text("aflw2000: {uses: [evaluate]}\n")
    bound = limits.model_copy(update={"ingest": limits.ingest.model_copy(update={"ledger": str(mine)})})
    said = "the terms of source 'aflw2000' do not allow to {} a model on it"
    refuses(said.format("train"), export, bound, talks, tmp_path / "out", "llava")
    export(bound, talks, tmp_path / "test", "llava", "test")
    mine.write_text("aflw2000: {uses: [train]}\n")
    export(bound, talks, tmp_path / "train", "llava")
    refuses(said.format("measure"), export, bound, talks, tmp_path / "out", "llava", "validation")


def test_texts_that_hold_the_image_mark_and_rows_of_several_pictures(conversations_table, limits, tmp_path):
    good, marked, several = (conversation(face(number)) for number in range(3))
    marked["messages"][1]["content"][0]["text"] = "An <image> of a face."
    several["images"] = [*several["images"], good["images"][0]]
    several["messages"][0]["content"].insert(0, {"type": "image", "text": None})
    odd = conversations_table([good, marked, several])
    assert export(limits, odd, tmp_path / "a", "llava")["quarantined"] == 2
    assert export(limits, odd, tmp_path / "b", "sharegpt")["quarantined"] == 1
    entries = json.loads((tmp_path / "b" / "train.json").read_text())
    assert entries[1]["messages"][0]["content"].startswith("<image>\n<image>\nWhat")
    assert len(entries[1]["images"]) == 2


def test_the_command(talks, tmp_path):
    result = CliRunner().invoke(app, ["export", str(talks), str(tmp_path / "out"), "--format", "trl", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["read"], summary["kept"], summary["quarantined"]) == (24, 24, 0)
    assert summary["digest"]
