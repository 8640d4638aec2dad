"""The data repository with an S3 remote: a real S3 server (moto's) on loopback, and DVC's own client."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from facemllm import settings
from facemllm.core import digests
from facemllm.forgetting.erasing import forget
from facemllm.tables import open_table
from facemllm.version.record import diff, has, record, restore
from tests.refusing import refuses

pytest.importorskip("boto3", reason="pip install dvc-s3")

BUCKET = "faces"
ADA = {"reason": "she asked", "by": "Ada Lovelace"}


@pytest.fixture
def place(tmp_path, project):
    """`place(home)`: settings of a project of this test's own, with the bucket as the remote."""

    def make(home="home", **versioning):
        versioning = {"remote": f"s3://{BUCKET}/data", **versioning}
        given = [f"version.{key}={value}" for key, value in versioning.items()]
        return settings.load("laptop", [f"storage.home={tmp_path / home}", "services.mlflow_port=1025", *given])

    return make


def objects(client) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read() for entry in listed}


def trees(folder: Path) -> list[str]:
    return [digests.of_tree(folder / name) for name in ("faces", "conversations")]


def test_a_clean_clone_gets_the_same_bytes_from_s3(bucket, place, faces_table, conversations_table, tmp_path):
    tables = faces_table(), conversations_table()
    revision = record(place(), *tables)
    assert len(objects(bucket)) == 6, "two listings, two manifests, two shards"
    assert all(key.startswith("data/files/md5/") for key in objects(bucket))
    assert has(place(), revision.sha)
    assert not (tmp_path / "home" / "dvc-remote").exists()

    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", tmp_path / "home" / "data-repo", clone], check=True)
    shutil.rmtree(tmp_path / "home")
    clean = place("other", repository=clone)
    assert has(clean, revision.sha)
    restore(clean, revision.sha, tmp_path / "back")
    assert trees(tmp_path / "back") == [digests.of_tree(table) for table in tables]
    found = diff(clean, revision.sha, revision.sha)
    assert found["tables"]["faces"]["same"] == 40
    assert record(clean, *tables).sha == revision.sha

    shard = max(objects(bucket), key=lambda key: len(objects(bucket)[key]))
    bucket.delete_object(Bucket=BUCKET, Key=shard)
    assert not has(clean, revision.sha), "the remote is asked, not the cache"
    assert record(clean, *tables).sha == revision.sha
    assert has(clean, revision.sha), "recording again brings back what the remote lost"


def test_what_is_forgotten_leaves_s3_too(
    bucket, place, faces_table, conversations_table, face_rows, conversation_rows, tmp_path
):
    rows = face_rows()
    tables = faces_table(rows), conversations_table(conversation_rows(rows))
    old = record(place(), *tables)
    kept = record(place(), faces_table(rows[:10], "few"), conversations_table(conversation_rows(rows[:10]), "said"))
    before = objects(bucket)
    report = forget(place(), image=rows[20]["image_id"], **ADA)
    after = objects(bucket)
    successor = report["revisions"][0]["successor"]
    assert (report["found"], len(report["revisions"])) == (0, 1)
    assert len(set(before) - set(after)) == 6, "all objects of the old revision"
    assert len(set(after) - set(before)) == 6, "all objects of its successor"
    assert has(place(), kept.sha)
    assert has(place(), successor)
    shutil.rmtree(tmp_path / "home" / "data-repo" / ".dvc" / "cache")
    restore(place(), successor, tmp_path / "back")
    pictures = [row["image"]["bytes"] for row in open_table(tmp_path / "back" / "faces").iterate(["image"])]
    assert len(pictures) == 39
    assert rows[20]["image"]["bytes"] not in pictures
    refuses(f"restore {successor[:12]}, which replaces it", restore, place(), old.sha, tmp_path / "old")


def test_a_remote_that_does_not_answer_is_one_clear_line(bucket, place, faces_table, conversations_table, monkeypatch):
    tables = faces_table(), conversations_table()
    refuses(r"DVC failed in .*s3://no-such-bucket", record, place(remote="s3://no-such-bucket/data"), *tables)
    revision = record(place(), *tables)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1025")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refuses(r"DVC failed in .*s3://faces/data", has, place(), revision.sha)


def test_without_its_client_there_is_one_clear_line(place, faces_table, conversations_table, monkeypatch):
    monkeypatch.setattr(importlib.import_module("facemllm.version.archive"), "find_spec", lambda name: None)
    refuses(r"s3://faces/data needs .*pip install dvc-s3", record, place(), faces_table(), conversations_table())
