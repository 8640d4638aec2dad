"""Server time of the review page with many requests: the queue and one request, before and after somebody signs.

    .venv/bin/python benchmarks/review.py --requests 1000

Requests are made in a repository of their own, all signed for real; a page's time is that of the whole answer, from
the guard to the last byte, without the network. The first page after a start reads and verifies everything.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from facemllm.core.digests import of_bytes
from facemllm.review.app import application
from facemllm.review.pages import Pages
from facemllm.review.security import Sessions
from facemllm.signing import keys, local
from facemllm.signing.canonical import canonical, utc_now
from facemllm.signing.statements import Draft, sign, statement_id
from tests.review_example import BUNDLE, GRACE, PIPELINE, Example, example


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = example(Path(scratch) / "home")
        bundles = filled(workspace, given.requests)
        print(json.dumps(measured(workspace, bundles, given.rounds), indent=2))


def filled(workspace: Example, count: int) -> list[str]:
    """Bundles and requests, in two commits."""
    decisions, files, digests = workspace.decisions, {}, []
    signer = keys.signer(local.keys_folder(workspace.settings), workspace.keys[PIPELINE])
    for version in range(1, count + 1):
        facts = copy.deepcopy(dict(BUNDLE))
        facts["model"] |= {"version": version, "digest": of_bytes(f"model {version}".encode())}
        data = canonical(facts)
        digests.append(of_bytes(data))
        envelope = sign(Draft("request", digests[-1], facts["model"]["digest"], "", PIPELINE, issued=utc_now()), signer)
        files[f"bundles/{digests[-1]}/bundle.json"] = data
        files[f"statements/{facts['model']['digest']}/{statement_id(envelope)}.json"] = envelope
    decisions._repository.add(files, "requests", "benchmark", "none")
    return digests


def measured(workspace: Example, bundles: list[str], rounds: int) -> dict[str, object]:
    """Milliseconds by page."""
    from starlette.testclient import TestClient

    pages, sessions = Pages(workspace.settings), Sessions()
    began = time.perf_counter()
    pages.queue()
    start = time.perf_counter() - began
    client = TestClient(application(pages, sessions, ["127.0.0.1:15080"]), "http://127.0.0.1:15080")
    client.get("/login", params={"token": sessions.token})

    def timed(path: str) -> tuple[float, float]:
        began, worked = time.perf_counter(), time.process_time()
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        return 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked)

    found: dict[str, object] = {"requests": len(bundles), "start, everything verified, s": round(start, 2)}
    middle = bundles[len(bundles) // 2]
    for name, path in {
        "queue": "/",
        "queue, last page": f"/?state=all&page={-(-len(bundles) // 50)}",
        "one request": f"/requests/{middle}",
    }.items():
        found[f"{name}, ms"] = summed([timed(path) for _ in range(rounds)])
    after = []
    for bundle in bundles[:5]:
        workspace.say("approve", bundle, GRACE)
        after.append(timed("/"))
    found["queue after somebody signed, ms"] = summed(after)
    return found


def summed(times: list[tuple[float, float]]) -> dict[str, float]:
    """Of elapsed time the median and the worst, of the server's processor time (git's left out) the median."""
    elapsed, worked = zip(*times, strict=True)
    summary = {"median": statistics.median(elapsed), "worst": max(elapsed), "processor": statistics.median(worked)}
    return {name: round(value, 1) for name, value in summary.items()}


if __name__ == "__main__":
    main()
