"""Lineage: up to licences and commits, down to models and releases, folded for people, whole as JSON."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from facemllm.cli.main import app
from facemllm.core.digests import of_bytes
from facemllm.promote.lineage import lineage
from facemllm.promote.promoted import AWAY
from facemllm.promote.records import Records
from facemllm.report.graph_picture import drawing, page
from facemllm.report.lineage import SHOWN, branches, lines
from facemllm.settings import Settings
from facemllm.signing.canonical import utc_now
from tests import promoted, signed
from tests.pages import HOSTILE, Page
from tests.refusing import refuses

MODEL = signed.MODEL


@pytest.fixture
def rows(face_rows: Any) -> list[dict[str, Any]]:
    return face_rows()


@pytest.fixture
def named(tmp_path: Path, faces_table, conversations_table, rows, conversation_rows) -> dict[str, str]:
    """A home with one run; its first two faces, of one person, are lost in annotation."""
    faces = faces_table(rows, "faces", about={"sources": ["render"]})
    tables = {"ingest": faces, "annotate": faces_table(rows[2:], "annotated", about={"sources": ["render"]})}
    tables["reformat"] = conversations_table(conversation_rows(rows[2:]), "conversations")
    return promoted.fill(tmp_path / "home", tables)


@pytest.fixture
def home(tmp_path: Path, named) -> Settings:
    return promoted.settings_of(tmp_path / "home")


@pytest.fixture
def decided(home: Settings) -> signed.Place:
    place = promoted.decisions(home.home)
    place.add("pipeline", "request", role="pipeline", reason="run laptop")
    place.add("ada", "approve", reason="figures are in order, looked at 12 faces")
    place.add("pipeline", "release", role="releaser", reason="", replaces=signed.OTHER)
    return place


def kinds(graph: Any) -> list[str]:
    return [node.kind for node in graph.nodes.values()]


def steps(graph: Any) -> set[tuple[str, str, str]]:
    nodes = graph.nodes
    return {(nodes[edge.material].kind, edge.role, nodes[edge.product].kind) for edge in graph.edges}


def plain(graph: Any, width: int = 200, everything: bool = False) -> list[str]:
    return [line.plain for line in lines(graph.as_json(), width, everything)]


def test_a_served_answers_digest_leads_to_licences_and_commit(home, decided, named) -> None:
    graph = lineage(home, MODEL[:12])
    assert graph.roots == ["face-mllm/1"]
    chain = {("source", "source", "ingest"), ("ingest", "faces", "annotate"), ("annotate", "annotated", "reformat")}
    chain |= {("reformat", "conversations", stage) for stage in ("align", "specialize", "evaluate")}
    chain |= {("align", "model", "specialize"), ("specialize", "model", "evaluate"), ("evaluate", "evaluation", "gate")}
    chain |= {("evaluate", "evaluation", "bundle"), ("specialize", "model", "bundle"), ("bundle", "bundle", "approve")}
    chain |= {("approve", "approve", "version"), ("gate", "gate", "version"), ("version", "release", "release")}
    assert chain <= steps(graph)
    assert "validate" not in kinds(graph), "nothing was made from a check"
    version, source = graph.nodes["face-mllm/1"], graph.nodes["source:render"]
    assert (version.facts["state"], version.facts["approved_by"]) == ("approved", ["Ada Lovelace"])
    assert source.facts["licence"].startswith("CC0")
    assert f"commit:{promoted.COMMIT}" in graph.nodes
    assert graph.notes == [AWAY]
    for name in ("1", "v1", decided.bundle[:10], named["evaluate"][:10]):
        assert "source:render" in lineage(home, name).nodes, name


def test_the_tree_says_each_thing_once_and_fits(home, decided, named) -> None:
    graph = lineage(home, "1")
    for width in (80, 200):
        printed = plain(graph, width)
        assert max(map(cell_len, printed)) <= width
        for step in ("align", "specialize", "evaluate", "reformat", "annotate", "ingest"):
            assert sum(named[step][:12] in line for line in printed) == 1, step
    words = [line.strip("│├└─← ").split()[0] for line in plain(graph)]
    order = ["version", "release", "gate", "approve", "bundle", "evaluate", "specialize", "align", "reformat"]
    assert [word for word in words if word in order] == order
    text = "\n".join(plain(graph))
    today = f"{utc_now():%Y-%m-%d}"
    assert f"Ada Lovelace  {today}" in text
    assert "figures are in order, looked at 12 faces" in text
    assert f"in place of {signed.OTHER[:12]}" in text
    assert "2026-09-21 14:1" in text, "records have dates"
    assert not any(mark in text for mark in "{}[]'"), "no Python in it"


def test_a_picture_leads_to_everything_made_from_it(home, decided, rows, named) -> None:
    graph = lineage(home, rows[4]["image_id"][:16])
    assert graph.roots == [f"image:{rows[4]['image_id']}"]
    reached = {"ingest", "annotate", "reformat", "align", "specialize", "evaluate", "bundle", "approve", "version"}
    assert reached | {"release", "request", "gate", "validate", "image"} == set(kinds(graph))
    assert graph.nodes[named["reformat"]].facts["splits"] == ["train"]
    assert ("reformat", "conversations", "evaluate") not in steps(graph), "it was not measured on this picture"
    whole = lineage(home, rows[4]["subject_id"])
    assert whole.nodes[f"subject:{rows[4]['subject_id']}"].text == "2 pictures"
    assert set(whole.nodes) - set(graph.nodes) == {f"subject:{rows[4]['subject_id']}"}
    assert lineage(home, "render:2").roots == whole.roots
    assert kinds(lineage(home, rows[4]["image_id"], "up")) == ["image", "source"]


def test_a_picture_that_was_left_out_or_only_measured_on_is_told_apart(home, rows, named) -> None:
    assert set(kinds(lineage(home, rows[0]["image_id"]))) == {"image", "ingest"}
    test = next(row for row in rows if row["split"] == "test")
    graph = lineage(home, test["image_id"])
    assert {"evaluate", "gate", "version"} <= set(kinds(graph))
    assert not {"align", "specialize"} & set(kinds(graph)), "no stage has learnt from it"


def test_only_the_columns_that_tell_rows_apart_are_read(home, rows, monkeypatch) -> None:
    import pyarrow.parquet as pq

    read: set[str] = set()
    usual = pq.ParquetFile.iter_batches

    def watched(file: Any, *given: Any, columns: Any = None, **more: Any) -> Any:
        read.update(columns)
        return usual(file, *given, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    lineage(home, rows[4]["image_id"])
    assert read == {"image_id", "subject_id", "split", "source"}


def test_a_source_leads_to_models(home, named) -> None:
    graph = lineage(home, "render")
    assert graph.roots == ["source:render"]
    assert {"ingest", "specialize", "version"} <= set(kinds(graph))


def test_after_forgetting_the_chain_says_what_was_forgotten(home, rows, named) -> None:
    gone = rows[4]
    tables = {named[step]: ["train"] for step in ("ingest", "annotate", "reformat")}
    results = {digest: json.loads((home.home / "store" / digest / "manifest.json").read_text()) for digest in tables}
    report = {
        "id": "0123456789ab",
        "kind": "subject",
        "reason": "she asked",
        "by": "Ada",
        "at": "2026-11-28T09:00:00+00:00",
    }
    report |= {"keys": {"image": [gone["image_id"]], "subject": [gone["subject_id"]]}, "tables": tables}
    for digest in tables:
        shutil.rmtree(home.home / "store" / digest)
    (home.home / "forgotten").mkdir()
    (home.home / "forgotten" / "0123456789ab.json").write_text(json.dumps({**report, "results": results}))
    up = lineage(home, "1")
    assert "source:render" in up.nodes, "the chain to the licences stays"
    text = "deleted 2026-11-28 to forget a person (1 pictures): she asked (report 0123456789ab)"
    assert text in up.nodes[named["ingest"]].text
    down = lineage(home, gone["image_id"])
    assert {"ingest", "annotate", "reformat", "align", "specialize", "version"} <= set(kinds(down))
    assert text in down.nodes[down.roots[0]].text
    assert lineage(home, gone["subject_id"][:8]).roots == [f"subject:{gone['subject_id']}"]


def test_loops_and_damaged_records_are_a_line_each(home, named, tmp_path) -> None:
    keys = home.home / "keys"
    bad = {"broken.json": "{", "list.json": "[]", "odd.json": '{"digest": "x"}', "deep.json": "[" * 100_000}
    bad["inputs.json"] = json.dumps({"digest": "1" * 64, "inputs": [1]})
    for name, text in bad.items():
        (keys / name).write_text(text)
    (keys / "link.json").symlink_to(keys / "broken.json")
    os.mkfifo(keys / "fifo.json")
    (keys / "folder.json").mkdir()
    promoted.keep(home.home, "align", named["align"], {"conversations": named["reformat"], "model": MODEL})
    for direction in ("up", "down", "both"):
        graph = lineage(home, named["align"], direction)
        damaged = [note for note in graph.notes if "damaged record, left out" in note]
        assert len(damaged) == len(bad) + 3
        assert all("\n" not in note and len(note) < 300 for note in graph.notes)
        assert any(note.startswith("loop: ") for note in graph.notes)
    assert len([line for line in plain(lineage(home, "1")) if "damaged" in line]) <= 3
    assert "more such lines, --all" in plain(lineage(home, "1"))[-1]


def test_a_chain_of_ten_thousand_is_walked_without_recursion(tmp_path) -> None:
    keys = tmp_path / "home" / "keys"
    keys.mkdir(parents=True)
    digests = [of_bytes(str(number).encode()) for number in range(10_000)]
    for before, digest in zip([None, *digests], digests, strict=False):
        record = {"digest": digest, "step": "stage", "inputs": {"model": before} if before else {}}
        (keys / f"{digest}.json").write_text(json.dumps(record))
    graph = lineage(promoted.settings_of(tmp_path / "home"), digests[-1])
    assert len(graph.nodes) == 10_000
    printed = plain(graph)
    assert len(printed) <= SHOWN + 3
    assert any("more (" in line for line in printed)
    page(graph.as_json())


def test_many_results_fold_around_what_is_served(home, decided, named) -> None:
    for number in range(300):
        digest = of_bytes(f"other {number}".encode())
        promoted.keep(home.home, "align", digest, {"conversations": named["reformat"]})
        inputs = {"model": digest, "conversations": named["reformat"]}
        promoted.keep(home.home, "evaluate", of_bytes(digest.encode()), inputs)
    graph = lineage(home, named["ingest"], "down")
    printed = plain(graph)
    assert len(printed) <= SHOWN + 8
    text = "\n".join(printed)
    assert "version" in text
    assert "Ada Lovelace" in text
    counted = [int(word) for line in printed if "more (" in line for word in line.split() if word.isdigit()]
    assert sum(counted) >= 570
    everything = plain(graph, everything=True)
    assert len(everything) > 600
    assert "more (" not in "\n".join(everything)
    assert len(graph.as_json()["nodes"]) > 600, "JSON is never folded"
    assert page(graph.as_json()).count("<rect") <= 60


def test_every_edge_of_the_json_joins_two_of_its_nodes(home, decided) -> None:
    runner = CliRunner()
    where = ["--set", f"storage.home={home.home}", "--set", "tracking.uri=http://127.0.0.1:9"]
    done = runner.invoke(app, ["lineage", "1", "--up", "--down", "--json", *where])
    assert done.exit_code == 0, done.output
    graph = json.loads(done.stdout)
    ids = {node["id"] for node in graph["nodes"]}
    assert set(graph["roots"]) <= ids
    assert graph["direction"] == "both"
    assert all({edge["material"], edge["product"]} <= ids for edge in graph["edges"])
    shown = {id for tree in branches(graph, None).values() for id in tree.below(tree.roots)}
    assert shown == {node["id"] for node in graph["nodes"] if node["kind"] != "commit"}, "the tree leaves nothing out"


def test_the_page_is_whole_and_escapes_what_people_wrote(home, decided, tmp_path) -> None:
    decided.add("bob", "reject", reason=HOSTILE)
    out = tmp_path / "lineage.html"
    where = ["--set", f"storage.home={home.home}", "--set", "tracking.uri=http://127.0.0.1:9"]
    done = CliRunner().invoke(app, ["lineage", "1", "--html", str(out), *where])
    assert done.exit_code == 0, done.output
    drawn = Page(out.read_text("utf-8"))
    assert "svg" in drawn.tags
    assert drawn.text.count(HOSTILE) >= 2
    assert "Ada Lovelace" in drawn.text
    assert "rejected" in drawn.text
    whole = lineage(home, "1", "both").as_json()
    assert drawing(whole).count("<rect") == len([node for node in whole["nodes"] if node["kind"] != "commit"])


def test_what_has_no_name_here_or_two_is_refused(home, rows, named) -> None:
    refuses("is called 'ffffff'.*versions and aliases: 1.*MLflow is away", lineage, home, "ffffff")
    refuses("is called 'celebx'", lineage, home, "celebx")
    promoted.keep(home.home, "align", named["align"][:10] + "b" * 54, {})
    refuses("2 digests begin with", lineage, home, named["align"][:8])
    first = rows[4]["image_id"]
    assert lineage(home, first[:6].upper()).roots == [f"image:{first}"]


def test_a_forgers_mlflow_and_unsigned_statements_are_told_apart(home, decided, monkeypatch) -> None:
    from facemllm.promote import registry

    forged = registry.Version(
        "face-mllm", 1, "f" * 64, "passed", "", "models:/m-1", "", "2026-01-01T00:00:00+00:00", ""
    )
    monkeypatch.setattr(registry, "versions", lambda settings: [forged])
    decided.put({f"statements/{MODEL}/{'9' * 64}.json": b'{"approved": true}'})
    graph = lineage(home, "1")
    assert MODEL in graph.nodes, "what was signed and recorded stands"
    assert any(note.startswith("MLflow says that face-mllm 1 is ffffffffffff") for note in graph.notes)
    assert graph.nodes["9" * 64].kind == "refused"
    assert not [line for line in plain(graph) if not line.isprintable()], "a name in MLflow steers no terminal"
    assert "counts for nothing (malformed)" in graph.nodes["9" * 64].text


def test_records_of_one_digest_are_told_by_the_newest(home, named) -> None:
    promoted.keep(home.home, "gate", named["gate"], {"evaluation": named["evaluate"]}, figure="newer", at=1_999_000_000)
    assert Records(home.home).newest[named["gate"]].facts["figure"] == "newer"


def test_a_model_from_elsewhere_says_itself_what_made_it(home, named) -> None:
    digest = of_bytes(b"fetched")
    folder = home.home / "store" / digest
    folder.mkdir()
    facts = {"stage": "instruct", "inputs": {"conversations": named["reformat"]}, "sources": ["render"]}
    (folder / "lineage.json").write_text(json.dumps(facts))
    assert "source:render" in lineage(home, digest[:10]).nodes
    assert digest in lineage(home, named["reformat"], "down").nodes


def test_a_home_with_nothing_but_the_decisions_tells_what_was_signed(tmp_path) -> None:
    """As in a cluster that only serves: the digests, sources and commit of the bundle."""
    place = promoted.decisions(tmp_path / "home")
    whole = json.loads(signed.bundle_files()["bundle.json"])
    whole |= {"lineage": {"specialize": MODEL, "reformat": "5" * 64}, "code": {"commit": promoted.COMMIT}}
    whole |= {"sources": [{"key": "render"}, "odd"], "card": None}
    bundle = place.open().append_bundle({"bundle.json": signed.canonical(whole)})
    place.add("ada", "request", bundle=bundle)
    place.add("ada", "approve", bundle=bundle)
    graph = lineage(promoted.settings_of(tmp_path / "home"), MODEL[:8])
    assert graph.roots == ["face-mllm/1"]
    assert {"source:render", f"commit:{promoted.COMMIT}", MODEL, "5" * 64} <= set(graph.nodes)
    assert graph.nodes["5" * 64].text == "not remembered in this home"
    assert graph.nodes["source:render"].facts["licence"]
