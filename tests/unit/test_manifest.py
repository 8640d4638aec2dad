"""A model directory as a manifest: the same identity as before, what is refused, and the private copy."""

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.signing import manifest
from facemllm.signing.canonical import Refused
from tests.refusing import refuses


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(3 << 20))
    (folder / "adapter" / "model.safetensors").write_bytes(b"weights")
    (folder / "adapter.json").write_bytes(b"")  # sorts before the folder's files as a path, behind them as a name
    return folder


def test_a_manifest_names_every_file_and_has_the_digest_of_the_tree(model: Path) -> None:
    found = manifest.of(model)
    assert list(found.files) == ["adapter.json", "adapter/model.safetensors", "config.json", "model.safetensors"]
    assert found.files["config.json"] == digests.of_bytes(b"{}")
    assert found.digest == digests.of_tree(model)
    assert found.bytes == (3 << 20) + 2 + len(b"weights")
    assert found.differs(found.files) == ""


def test_a_difference_is_named(model: Path) -> None:
    before = manifest.of(model)
    (model / "config.json").write_text("{ }")
    assert manifest.of(model).differs(before.files) == "config.json was changed"
    (model / "config.json").unlink()
    assert manifest.of(model).differs(before.files) == "config.json is missing"
    (model / "config.json").write_text("{}")
    (model / "chat_template.jinja").touch()
    assert manifest.of(model).differs(before.files) == "chat_template.jinja was added"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path may have 107 characters
        try:
            bound.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def _bytes_name(model: Path) -> None:
    os.close(os.open(os.fsencode(model) + b"/\xff\xfe.json", os.O_CREAT | os.O_WRONLY))


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a file": (lambda m: (m / "extra.json").symlink_to("config.json"), "extra.json' is a symbolic link"),
    "a link to nothing": (lambda m: (m / "extra.json").symlink_to("nothing"), "is a symbolic link"),
    "a link to itself": (lambda m: (m / "extra.json").symlink_to("extra.json"), "is a symbolic link"),
    "a link to a folder": (lambda m: (m / "templates").symlink_to("adapter"), "templates' is a symbolic link"),
    "a FIFO": (lambda m: os.mkfifo(m / "pipe.json"), "pipe.json' is a FIFO"),
    "a socket": (lambda m: _socket(m / "socket"), "is a socket"),
    "an empty folder": (lambda m: (m / "adapter" / "empty").mkdir(), "empty is an empty folder"),
    "a name that is not UTF-8": (_bytes_name, r"\\udcff\\udcfe.json' has an odd name"),
    "a line break": (lambda m: (m / "a\nb.json").touch(), r"a\\nb.json' has an odd name"),
    "a backslash": (lambda m: (m / "..\\x").touch(), "is hidden"),
    "a look-alike": (lambda m: (m / "с.json").touch(), "has an odd name"),
    ".git": (lambda m: (m / ".git").mkdir(), ".git' is hidden"),
    "a hidden file": (lambda m: (m / "adapter" / ".hidden").touch(), ".hidden' is hidden"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_no_model_may_hold_is_refused_by_name(model: Path, case: str) -> None:
    make, words = MISFITS[case]
    make(model)
    refuses(words, manifest.of, model)


def test_the_directory_itself_may_be_no_link_and_has_to_be_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    refuses("link is no folder, or a symbolic link", manifest.of, tmp_path / "link")
    refuses("is not a model directory: it does not exist", manifest.of, tmp_path / "none")
    refuses("is no folder", manifest.of, model / "config.json")
    (tmp_path / "empty").mkdir()
    refuses("is empty, no model directory", manifest.of, tmp_path / "empty")


def test_devices_are_refused() -> None:
    state = os.stat("/dev/null")
    refuses("is a device", manifest._require_plain, Path("/model"), "null", state)


def test_too_many_files_and_too_deep_folders_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = model.joinpath(*"abcdefghijklmnopqrs")
    deep.mkdir(parents=True)
    (deep / "x.json").touch()
    refuses("levels of folders", manifest.of, model)
    monkeypatch.setattr(manifest, "MOST_FILES", 3)
    refuses("more than 3 files", manifest.of, model)


def test_the_copy_is_private_verified_and_gone_afterwards(model: Path, tmp_path: Path) -> None:
    digest = digests.of_tree(model)
    with manifest.verified_copy(model, digest, tmp_path / "scratch") as (copy, found):
        assert found.digest == digest == digests.of_tree(copy, fresh=True)
        assert [stat.S_IMODE(p.stat().st_mode) for p in (copy.parent, copy, copy / "adapter")] == [0o700] * 3
        assert stat.S_IMODE((copy / "model.safetensors").stat().st_mode) == 0o400
    assert not list((tmp_path / "scratch").iterdir())
    wrong = manifest.verified_copy(model, "0" * 64, tmp_path / "scratch")
    with pytest.raises(Refused, match="not those that were approved"), wrong:
        raise AssertionError
    assert not list((tmp_path / "scratch").iterdir())


def test_a_copy_that_shares_blocks_is_what_is_hashed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in where the file system cannot share blocks; for the real thing, --basetemp on Btrfs or XFS."""
    digest, weights, clone = digests.of_tree(model), model / "model.safetensors", manifest._clone
    shared = []

    def then_changed(source: FileIO, target: FileIO) -> bool:
        if not (done := clone(source, target)):
            target.write(source.read())
            target.seek(0)
        shared.append(done)
        if os.path.samestat(os.fstat(source.fileno()), weights.stat()):  # another file's thread may be earlier
            weights.write_bytes(b"other weights")
        return True

    monkeypatch.setattr(manifest, "_clone", then_changed)
    with manifest.verified_copy(model, digest, tmp_path / "scratch") as (copy, _):
        assert digests.of_tree(copy, fresh=True) == digest
        assert weights.read_bytes() == b"other weights"
    assert len(shared) == 4
    assert len(set(shared)) == 1


def never_unverified(model: Path, digest: str, scratch: Path, meanwhile: Callable[[], object]) -> None:
    """Copy and verify again and again while a thread changes the files as often: what is let through is right."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            meanwhile()

    working = threading.Thread(target=work)
    working.start()
    try:
        for _ in range(20):
            with suppress(UserError), manifest.verified_copy(model, digest, scratch) as (copy, _found):
                assert digests.of_tree(copy, fresh=True) == digest
    finally:
        stop.set()
        working.join()


def test_files_rewritten_in_place_never_reach_the_copy_unverified(model: Path, tmp_path: Path) -> None:
    digest, weights = digests.of_tree(model), model / "model.safetensors"
    good = weights.read_bytes()
    with weights.open("r+b", buffering=0) as file:

        def rewrite() -> None:
            for one in (bytes(len(good)), good):
                file.seek(0)
                file.write(one)

        never_unverified(model, digest, tmp_path / "scratch", rewrite)


def test_files_swapped_all_the_time_never_reach_the_copy_unverified(model: Path, tmp_path: Path) -> None:
    digest, weights = digests.of_tree(model), model / "model.safetensors"
    good, bad = weights.read_bytes(), bytes(3 << 20)

    def swap() -> None:
        for one in (bad, good):
            (tmp_path / "next").write_bytes(one)
            (tmp_path / "next").replace(weights)

    never_unverified(model, digest, tmp_path / "scratch", swap)
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_killed_process_left_is_removed_and_what_another_holds_stays(model: Path, tmp_path: Path) -> None:
    left = Path(tempfile.mkdtemp(prefix="facemllm-model-", dir=tmp_path))
    (left / "weights").touch()
    digest = digests.of_tree(model)
    with manifest.verified_copy(model, digest, tmp_path) as (first, _):
        assert not left.exists()
        with manifest.verified_copy(model, digest, tmp_path):
            assert first.is_dir()


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"0\.0 GB are free"), manifest.verified_copy(model, digests.of_tree(model)):
        raise AssertionError


def test_a_file_that_grows_while_it_is_read_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.fstat

    def smaller(descriptor: int) -> os.stat_result:
        state = list(usual(descriptor))
        state[6] = max(0, state[6] - 1)
        return os.stat_result(state)

    monkeypatch.setattr(manifest.os, "fstat", smaller)
    refuses("grows while it is read", manifest.of, model)


def test_a_copy_that_stays_is_made_once(model: Path, tmp_path: Path) -> None:
    digest, out = digests.of_tree(model), tmp_path / "volume" / "model"
    assert manifest.copy_to(model, digest, out).digest == digest
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert manifest.copy_to(model, digest, out).digest == digest
    (out / "config.json").chmod(0o600)
    (out / "config.json").write_text("{ }")
    refuses("not those that were approved", manifest.copy_to, model, digest, out)
