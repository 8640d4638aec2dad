"""Models in S3, against a server of S3's API."""

import json
from pathlib import Path
from typing import Any

import pytest

from facemllm.serve import model_store
from facemllm.serve.model_store import ModelStore
from facemllm.signing import manifest
from tests.approved import make_model
from tests.refusing import refuses

pytestmark = pytest.mark.integration


def test_a_model_comes_back_as_it_was_sent_or_not_at_all(bucket: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", b"12345678" * 1500)  # in several parts
    digest, store = manifest.of(folder).digest, ModelStore("s3://faces/models")
    address = store.put(folder, digest)
    assert address == f"s3://faces/models/{digest}"
    keys = [one["Key"] for one in bucket.list_objects_v2(Bucket="faces")["Contents"]]
    assert f"models/{digest}/manifest.json" in keys
    times = {one["Key"]: one["LastModified"] for one in bucket.list_objects_v2(Bucket="faces")["Contents"]}
    store.put(folder, digest)
    assert {one["Key"]: one["LastModified"] for one in bucket.list_objects_v2(Bucket="faces")["Contents"]} == times
    out = tmp_path / "out" / "model"
    assert model_store.copy_to(address, digest, out).digest == manifest.of(out).digest == digest
    assert model_store.copy_to(address, digest, out).digest == digest
    refuses("holds model", model_store.copy_to, address, "0" * 64, tmp_path / "no")

    name = f"models/{digest}/files/config.json"
    bucket.put_object(Bucket="faces", Key=name, Body=b'"config.jsoN"')
    refuses("config.json is not the file that was stored", model_store.copy_to, address, digest, tmp_path / "changed")
    bucket.put_object(Bucket="faces", Key=name, Body=b"x" * 10_000_000)
    refuses("config.json is not the file that was stored", model_store.copy_to, address, digest, tmp_path / "longer")
    bucket.delete_object(Bucket="faces", Key=name)
    refuses("is it reachable", model_store.copy_to, address, digest, tmp_path / "gone")
    forged = {"digest": digest, "files": {"../x": {"sha256": "0" * 64, "bytes": 1}}}
    bucket.put_object(Bucket="faces", Key=f"models/{digest}/manifest.json", Body=json.dumps(forged).encode())
    refuses("no model directory may hold", model_store.copy_to, address, digest, tmp_path / "odd")
    bucket.delete_object(Bucket="faces", Key=f"models/{digest}/manifest.json")
    refuses("holds no whole model", model_store.copy_to, address, digest, tmp_path / "half")
    assert store.put(folder, digest) == address
    assert model_store.copy_to(address, digest, tmp_path / "again").digest == digest
    assert not any(path.name.startswith(manifest.COPY) for path in tmp_path.iterdir())
