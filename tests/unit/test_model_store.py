"""Models for production: sent once, hashed on both ways, refused where a byte differs."""

import hashlib
import json
from pathlib import Path

import pytest

from facemllm.serve import model_store
from facemllm.serve.evaluated import Evaluated
from facemllm.serve.model_store import ModelStore
from facemllm.signing import manifest
from tests.approved import flip, make_model
from tests.refusing import refuses


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, str]:
    folder = make_model(tmp_path / "model")
    return folder, manifest.of(folder).digest


def state(folder: Path) -> dict[str, tuple[int, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


def test_a_model_is_sent_once_and_never_written_again(model: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = model
    store = ModelStore(str(tmp_path / "models"))
    address = store.put(folder, digest)
    assert manifest.of(Path(address)).digest == digest
    before = state(tmp_path / "models")
    assert store.put(folder, digest) == address
    assert state(tmp_path / "models") == before
    refuses("not those that were approved", store.put, folder, "0" * 64)
    with model_store.verified_copy(address, digest, tmp_path / "scratch") as (copy, found):
        assert found.digest == manifest.of(copy).digest == digest
    assert list((tmp_path / "scratch").iterdir()) == []


def test_half_a_model_is_none_and_is_gone_on_with(model: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = model
    store = ModelStore(str(tmp_path / "models"))
    store.put(folder, digest)
    place = tmp_path / "models" / digest
    (place / "manifest.json").unlink()
    (place / "files" / "config.json").unlink()
    flip(place / "files" / "tokenizer.json")
    kept = (place / "files" / "model.safetensors").stat().st_mtime_ns
    store.put(folder, digest)
    assert (place / "files" / "model.safetensors").stat().st_mtime_ns == kept
    assert manifest.of(place / "files").digest == digest


def test_what_changes_while_it_is_sent_is_refused(
    model: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digest = model
    found = manifest.require(folder, digest)
    monkeypatch.setattr(manifest, "require", lambda *_: found)
    flip(folder / "model.safetensors")
    refuses("changed while it was sent", ModelStore(str(tmp_path / "models")).put, folder, digest)
    assert not (tmp_path / "models" / digest / "manifest.json").exists()
    assert not (tmp_path / "models" / digest / "files" / "model.safetensors").exists()


def test_figures_are_named_after_what_they_say(tmp_path: Path) -> None:
    store = ModelStore(str(tmp_path / "models"))
    figures = json.dumps({"tasks": {"age": {"value": 3}}, "split": "test"}).encode()
    address = store.put_figures("d" * 64, figures)
    assert store.put_figures("d" * 64, figures) == address != store.put_figures("d" * 64, b"{}")
    assert Evaluated.read(address).tasks == {"age": {"value": 3}}


def test_other_places_are_refused() -> None:
    refuses("neither s3://bucket/prefix nor an absolute folder", ModelStore, "models")
    refuses("neither a folder nor s3", ModelStore, "gs://bucket/models")
