"""The Ray Data job on real Ray: the same bytes however it is cut, bad rows set aside, Ray left as it was found."""

from contextlib import closing

import pyarrow.parquet as pq
import pytest

from facemllm import settings
from facemllm.annotate import job
from facemllm.annotate.run import annotate
from facemllm.asking.requests import JobStopped, Reply
from facemllm.asking.store import Replies
from facemllm.tables import FACES, open_table, pairs
from facemllm.tasks import caption
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

SILENT = ("attributes", "expression", "age", "gender", "yaw", "pitch", "roll")


def cut(batch_size, concurrency):
    given = [f"annotate.batch_size={batch_size}", f"annotate.concurrency={concurrency}"]
    return settings.load("laptop", [*given, "ingest.shard_mb=1"])


@pytest.fixture
def faces(faces_table, face_rows):
    """Six hundred faces in five shards; 333 says nothing that could be put into words."""
    rows = [
        row | {"image_id": f"{n:064x}", "attributes": pairs({"Wearing_Hat": n % 5 == 0}), "yaw": float(n % 50)}
        for n, row in enumerate(face_rows(40) * 15)
    ]
    rows[333] |= dict.fromkeys((*SILENT, "caption"))
    return faces_table(rows, shard_mb=0)


def test_bytes_do_not_depend_on_batches_or_concurrency(faces, tmp_path, monkeypatch, request):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not ray.is_initialized()
    manifests = [annotate(cut(1000, 2), faces, tmp_path / "own")]
    assert not ray.is_initialized(), "Ray was left running"

    request.getfixturevalue("ray_head")
    manifests += [annotate(cut(b, c), faces, tmp_path / f"{b}-{c}") for b, c in ((7, 1), (250, 2))]
    assert ray.is_initialized(), "a Ray that was there before was stopped"

    assert len({manifest["digest"] for manifest in manifests}) == 1
    assert manifests[0]["parents"] == [open_table(faces).digest]
    assert (manifests[0]["rows"], manifests[0]["quarantined"]) == (599, 1)
    (refused,) = pq.read_table(tmp_path / "own" / "quarantine.parquet").to_pylist()
    assert (refused["file"], refused["row"]) == (open_table(faces).digest, 333)
    assert "no label that can be put into words" in refused["reason"]

    before = [row for number, row in enumerate(open_table(faces).iterate()) if number != 333]
    for was, now in zip(before, open_table(tmp_path / "own", FACES).iterate(), strict=True):
        assert now["image_id"] == was["image_id"]
        assert now["image"] == was["image"]
        assert caption.TASK.item("caption").parse(now["caption"]) == caption.facts_text(caption.facts(was))
        assert {e["field"]: e["origin"] for e in now["provenance"]}["caption"] == "annotator"


def test_replies_are_kept_on_the_driver_s_machine_for_tasks_on_any(tmp_path, ray_head):
    import ray

    reply = Reply(key="k", image_id="a" * 64, model="m", prompt_hash="p", text="half a pair: \ud800")
    with job._ray(1):
        kept = job._kept_here(tmp_path, {"ray.io/node-id": ray.get_runtime_context().get_node_id()})()

        @ray.remote(num_cpus=0)
        def task():
            kept.write(reply)
            return kept.read(reply.image_id, "k"), kept.read(reply.image_id, "other")

        assert ray.get(task.remote()) == (reply, None)
        ray.get(kept.actor.close.remote())
        with pytest.raises(JobStopped, match=r"the store of replies .* cannot be used \(Cannot operate on a closed"):
            kept.read(reply.image_id, "k")

        def gone() -> bool:
            try:
                ray.get(kept.actor.close.remote())
            except ray.exceptions.RayActorError:
                return True
            return False

        ray.kill(kept.actor)
        wait_until(gone)  # it may answer once more
        with pytest.raises(JobStopped, match="the replies on the driver's machine are out of reach: "):
            kept.read(reply.image_id, "k")
    with closing(Replies(tmp_path)) as store:
        assert store.read(reply.image_id, "k") == reply
