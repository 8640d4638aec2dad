"""Walking a lineage in a store of many records, against reading all of it.

    .venv/bin/python benchmarks/lineage.py --records 10000

The store: synthetic records of runs as the pipeline leaves them (a tenth shares tables, as experiments do), with real
small tables of faces and conversations behind the data steps, and forty versions with signed requests and approvals.
Walks: up from a version, down from a picture and from a person; each in a fresh index, as the command makes it. The
full scan reads every record and every column of every table once. Ratio: its time / ours, above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import in_turns, median, report

RUNS = 12  # records of one run


def build(home: Path, records: int, faces: int) -> dict[str, str]:
    """Fill a home; gives a picture, a person and a version to ask about."""
    from facemllm.core.digests import of_bytes
    from facemllm.tables import CONVERSATIONS, FACES, TableWriter, subject_id

    (home / "keys").mkdir(parents=True)
    (home / "store").mkdir()
    written = 0

    def note(step: str, digest: str, inputs: dict[str, str], **facts: Any) -> str:
        nonlocal written
        record = {"digest": digest, "step": step, "inputs": inputs, "output": digest, "figure": f"{step} done"}
        record |= {"commit": "a" * 40, "run_id": "b" * 32, "seconds": 1.0, "settings": {"padding": ["x" * 20] * 80}}
        name = of_bytes(f"{written}".encode())
        (home / "keys" / f"{name}.json").write_text(json.dumps(record | facts, indent=2))
        written += 1
        return digest

    def table(schema: Any, number: int, parents: list[str]) -> str:
        with TableWriter(home / "new", schema, parents=parents, about={"sources": ["render"], "run": number}) as made:
            empty = dict.fromkeys(schema.names)
            for face in range(faces):
                about = {"image_id": of_bytes(f"{number} {face}".encode()), "split": ("train", "test")[face % 5 == 4]}
                about |= {"subject_id": subject_id("render", f"{number} {face // 2}"), "source": "render"}
                about |= {"image": {"bytes": b"x" * 2000, "path": None}, "conversation_id": f"{number} {face}"}
                about |= {"images": [{"bytes": b"x" * 2000, "path": None}]}
                made.write([{name: about.get(name, empty[name]) for name in schema.names}])
        (home / "new").rename(home / "store" / made.manifest["digest"])
        return str(made.manifest["digest"])

    number, tables = 0, ("", "", "")
    while written < records:
        if number % 10 == 0:
            first = note("ingest", table(FACES, number, []), {})
            second = note("annotate", table(FACES, number, [first]), {"faces": first})
            tables = (first, second, note("reformat", table(CONVERSATIONS, number, [second]), {"annotated": second}))
            note("validate", of_bytes(f"v{number}".encode()), {"conversations": tables[2]})
        model = ""
        for stage in ("align", "instruct", "specialize"):
            inputs = {"conversations": tables[2], **({"model": model} if model else {})}
            model = note(stage, of_bytes(f"{stage} {number}".encode()), inputs)
            (home / "store" / model).mkdir()
        evaluation = of_bytes(f"evaluation {number}".encode())
        note("evaluate", evaluation, {"conversations": tables[2], "model": model})
        note("gate", of_bytes(f"gate {number}".encode()), {"evaluation": evaluation, "champion": ""})
        if number % max(1, records // RUNS // 40) == 0:
            facts = {"name": "face-mllm", "version": number, "output": str(number)}
            registered = of_bytes(f"registered {number}".encode())
            note("register", registered, {"model": model, "evaluation": evaluation, "gate": "passed"}, **facts)
            decide(home, number, model, evaluation)
        number += 1
    person = subject_id("render", "0 0")
    return {"image": of_bytes(b"0 0"), "subject": person, "version": "0", "home": str(home)}


def decide(home: Path, number: int, model: str, evaluation: str) -> None:
    """A signed request and approval of a version, by a key of this home."""
    from facemllm.settings import load
    from facemllm.signing import local
    from facemllm.signing.canonical import canonical
    from facemllm.signing.decisions import Decisions
    from facemllm.signing.statements import Draft, sign

    settings = load("laptop", [f"storage.home={home}"])
    decisions = Decisions.open(settings, local.policy(settings))
    about = {"name": "face-mllm", "version": number, "digest": model}
    whole = {"schema": 1, "model": about, "evaluation": {"digest": evaluation}}
    bundle = decisions.append_bundle({"bundle.json": canonical(whole)})
    for decision in ("request", "approve"):
        signer, role = local.person_signer(settings, decision, "Ada Lovelace")
        decisions = Decisions.open(settings, local.policy(settings))
        draft = Draft(decision, bundle, model, "synthetic", role, decisions.previous(model))  # type: ignore[arg-type]
        decisions.append(sign(draft, signer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--faces", type=int, default=200, help="rows of each table")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from facemllm.promote.lineage import lineage
    from facemllm.report.lineage import lines
    from facemllm.settings import load

    scratch = Path(tempfile.mkdtemp(prefix="lineage-"))
    try:
        known = build(scratch / "home", arguments.records, arguments.faces)
        settings = load("laptop", [f"storage.home={scratch / 'home'}", "tracking.uri=http://127.0.0.1:9"])
        nodes: dict[str, int] = {}

        def walk(name: str, id: str, direction: Any = None) -> None:
            graph = lineage(settings, id, direction)
            nodes[name] = len(graph.nodes)
            lines(graph.as_json(), 80)

        def scan() -> None:
            for path in (scratch / "home" / "keys").glob("*.json"):
                json.loads(path.read_text("utf-8"))
            for path in (scratch / "home" / "store").glob("*/part-*.parquet"):
                pq.read_table(path)

        ways = {
            "up": lambda: walk("up", known["version"]),
            "picture": lambda: walk("picture", known["image"]),
            "person": lambda: walk("person", known["subject"]),
            "source": lambda: walk("source", "render"),
        }
        seconds = in_turns(arguments.rounds, full_scan=scan, **ways)
        files = sum(1 for _ in (scratch / "home" / "store").glob("*/part-*.parquet"))
        times = {name: round(median(values), 3) for name, values in seconds.items()}
        ratios = {name: times["full_scan"] / times[name] for name in ways}
        sizes = {"records": arguments.records, "tables": files, "faces": arguments.faces, "nodes": nodes}
        report("lineage", ratios, ("pyarrow",), seconds=times, **sizes)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
