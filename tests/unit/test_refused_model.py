"""What the model server refuses before it loads anything: each with one line, the check's name, and exit code 1."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from facemllm.serve import server
from facemllm.settings import load
from facemllm.signing import manifest
from tests.approved import GRACE, Home, bytes_name, evaluation_of, flip, make_home, make_model

FILES = ("model.safetensors", "config.json", "tokenizer.json", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an approved model, to be copied."""
    folder = tmp_path_factory.mktemp("approved")
    home = make_home(folder / "home")
    home.approve(make_model(folder / "model"))
    make_model(folder / "other", b"Weights")
    return folder


class Place:
    """A copy of that, and a server of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.other = folder, folder / "model", folder / "other"
        home = load("laptop", [f"storage.home={folder / 'home'}"])
        names = {one["person"]: key for key, one in self.policy(folder)["keys"].items()}
        self.home, self.digest = Home(home, names), manifest.of(self.model).digest

    @staticmethod
    def policy(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
        found: dict[str, dict[str, dict[str, str]]] = yaml.safe_load((folder / "home/signing/policy.yaml").read_text())
        return found

    def change_policy(self, change: Callable[[dict], object]) -> None:
        policy = self.policy(self.folder)
        change(policy)
        (self.folder / "home/signing/policy.yaml").write_text(yaml.safe_dump(policy, default_flow_style=False))

    def serve(self, *more: str, model: Path | None = None, digest: str | None = None) -> int:
        flags = ["--model", str(model or self.model), "--digest", digest or self.digest, "--port", "18999"]
        return server.main([*flags, *self.home.flags(), "--scratch", str(self.folder / "scratch"), *more])


@pytest.fixture
def place(approved: Path, tmp_path: Path) -> Place:
    return Place(shutil.copytree(approved, tmp_path / "place"))


class _Loaded(Exception):
    """Every check held: the model would be loaded now."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(options: object, chosen: object, folder: Path) -> None:
        raise _Loaded(manifest.of(folder).digest)

    monkeypatch.setattr(server, "_load", load)


def test_the_approved_model_is_loaded_from_a_copy_that_is_gone_afterwards(place: Place) -> None:
    with pytest.raises(_Loaded, match=place.digest):
        place.serve()
    assert not list((place.folder / "scratch").iterdir())


def test_weights_swapped_between_check_and_load_are_not_what_is_loaded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(options: object, chosen: object, folder: Path) -> None:
        flip(place.model / "model.safetensors")
        (place.model / "chat_template.jinja").write_text("added")
        raise _Loaded(manifest.of(folder).digest)

    monkeypatch.setattr(server, "_load", load)
    with pytest.raises(_Loaded, match=place.digest):
        place.serve()
    assert manifest.of(place.model).digest != place.digest


Case = tuple[Callable[[Place], object], str, str]


def _renamed(place: Place) -> None:
    (place.model / "tokenizer.json").rename(place.model / "tokeniser.json")


def _another_of_the_same_name(place: Place) -> None:
    shutil.rmtree(place.model)
    place.other.rename(place.model)


def _linked(place: Place) -> None:
    place.model.rename(place.folder / "elsewhere")
    place.model.symlink_to(place.folder / "elsewhere")


def _link_for_a_file(place: Place) -> None:
    (place.model / "config.json").rename(place.folder / "config.json")
    (place.model / "config.json").symlink_to(place.folder / "config.json")


def _empty_decisions(place: Place) -> None:
    """Another repository in the decisions' place, as if nobody had ever decided."""
    with pytest.raises(_Loaded):
        place.serve()  # so that there is a checkpoint
    shutil.rmtree(place.folder / "home/signing/decisions")
    shutil.copytree(make_other(place), place.folder / "home/signing/decisions")


def make_other(place: Place) -> Path:
    """A decisions repository in which the other model is approved, by keys of another policy."""
    other = make_home(place.folder / "home2")
    other.approve(place.other)
    return place.folder / "home2/signing/decisions"


def _forged_decisions(place: Place) -> None:
    """The decisions of somebody whose keys the policy does not list, about the model that is to be served."""
    other = make_home(place.folder / "home2")
    other.approve(place.model)
    shutil.rmtree(place.folder / "home/signing/decisions")
    shutil.copytree(place.folder / "home2/signing/decisions", place.folder / "home/signing/decisions")


def _revoked_key(place: Place) -> None:
    def revoke(policy: dict) -> None:
        policy["keys"][place.home.keys["Ada Lovelace"]]["revoked"] = "2026-11-29T00:00:00Z"

    place.change_policy(revoke)


def _say(decision: str) -> Callable[[Place], object]:
    def act(place: Place) -> None:
        place.home.say(decision, place.home.decisions.bundles()[0], GRACE, "second thoughts")

    return act


CASES: dict[str, Case] = {
    **{
        f"a flipped bit in {one}": (lambda p, n=one: flip(p.model / n), "digest", f"{one} was changed") for one in FILES
    },
    "a file added": (lambda p: (p.model / "added.json").touch(), "digest", "added.json was added"),
    "a file removed": (lambda p: (p.model / "tokenizer.json").unlink(), "digest", "tokenizer.json is missing"),
    "a file renamed": (_renamed, "digest", "tokeniser.json was added"),
    "a file moved into a folder": (
        lambda p: (p.model / "config.json").rename(p.model / "adapter/config.json"),
        "digest",
        "adapter/config.json was added",
    ),
    "code added": (lambda p: (p.model / "modeling.py").touch(), "digest", "modeling.py was added"),
    "another model of the same name": (_another_of_the_same_name, "digest", "was changed"),
    "a link in the folder's place": (_linked, "files", "symbolic link"),
    "a link in a file's place": (_link_for_a_file, "files", "config.json' is a symbolic link"),
    "a link added": (lambda p: (p.model / "x.json").symlink_to("/etc/passwd"), "files", "x.json' is a symbolic link"),
    "a link to a folder": (lambda p: (p.model / "chat").symlink_to("adapter"), "files", "chat' is a symbolic link"),
    "a link out of the folder": (lambda p: (p.model / "up").symlink_to(".."), "files", "up' is a symbolic link"),
    "an empty folder": (lambda p: (p.model / "empty").mkdir(), "files", "is an empty folder"),
    "a .git folder": (lambda p: shutil.copytree(p.model, p.model / ".git"), "files", ".git' is hidden"),
    "a .gitattributes file": (lambda p: (p.model / ".gitattributes").touch(), "files", "is hidden"),
    "a FIFO": (lambda p: os.mkfifo(p.model / "pipe.json"), "files", "is a FIFO"),
    "a name that is not UTF-8": (lambda p: bytes_name(p.model), "files", "has an odd name"),
    "a name with a traversal": (lambda p: (p.model / "..\\..\\x.json").touch(), "files", "is hidden"),
    "a name with a line break": (lambda p: (p.model / "a\nb.json").touch(), "files", r"a\nb.json' has an odd name"),
    "no approval": (lambda p: None, "missing", "nobody has decided about it"),
    "rejected since": (_say("reject"), "rejected", "second thoughts"),
    "revoked since": (_say("revoke"), "revoked", "second thoughts"),
    "the key revoked since": (_revoked_key, "revoked_key", "counts for nothing"),
    "replaced decisions": (_empty_decisions, "history", "decisions were removed or rewritten"),
    "decisions by unknown keys": (_forged_decisions, "unknown_key", ""),
    "the decisions gone": (lambda p: shutil.rmtree(p.folder / "home/signing/decisions"), "", ""),
    "the policy gone": (lambda p: (p.folder / "home/signing/policy.yaml").unlink(), "", "no policy at"),
    "a policy that is none": (lambda p: (p.folder / "home/signing/policy.yaml").write_text("[]"), "", "policy.yaml"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(place: Place, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, check, words = CASES[case]
    digest = place.digest
    change(place)
    capsys.readouterr()
    if case == "no approval":
        code = place.serve(model=place.other, digest=manifest.of(place.other).digest)
    else:
        code = place.serve(digest=digest)
    said = capsys.readouterr().err
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith(f"refused: [{check}] " if check else "refused: "), said
    assert words in said
    assert not (place.folder / "scratch").exists() or not list((place.folder / "scratch").iterdir())


def test_every_other_address_than_loopback_needs_authorization(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(place.model), "--digest", place.digest]
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.com", ""):
        assert server.main([*flags, "--host", host]) == 1
        assert capsys.readouterr().err.startswith("refused: [policy] cannot serve on ")
    for one in (["--policy", "x"], ["--decisions", "x"]):
        assert server.main([*flags, *one]) == 1
        assert "belong together" in capsys.readouterr().err
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        with pytest.raises(_Loaded):
            server.main([*flags, "--host", host])
    with pytest.raises(_Loaded):
        place.serve("--host", "0.0.0.0")


def test_a_pods_first_container_copies_what_is_approved_and_nothing_else(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place.folder / "volume" / "model"
    assert place.serve("--copy-to", str(out)) == 0
    assert manifest.of(out).digest == place.digest
    assert place.serve("--copy-to", str(out)) == 0  # the container was started again
    assert server.main(["--model", str(place.model), "--digest", place.digest, "--copy-to", str(out)]) == 1
    assert "from a copy without --decisions" in capsys.readouterr().err
    flip(place.model / "config.json")
    other = place.folder / "volume" / "again"
    assert place.serve("--copy-to", str(other)) == 1
    assert "[digest]" in capsys.readouterr().err
    assert not other.exists()


def test_files_that_can_carry_code_are_refused_even_if_approved(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("pytorch_model.bin", "modeling.py", "x.PKL"), start=2):
        folder = make_model(place.folder / f"model{number}")
        (folder / name).write_bytes(b"pickle")
        place.home.approve(folder, number, evaluation={"digest": evaluation_of(number)})
        assert place.serve(model=folder, digest=manifest.of(folder).digest) == 1
        assert f"[files] the model holds {name}, which can carry code" in capsys.readouterr().err
    bare = place.folder / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    place.home.approve(bare, 9)
    assert place.serve(model=bare, digest=manifest.of(bare).digest) == 1
    assert "no *.safetensors" in capsys.readouterr().err


def test_the_checkpoint_is_kept(place: Place) -> None:
    with pytest.raises(_Loaded):
        place.serve()
    assert json.loads((place.folder / "home/signing/check.json").read_text())["head"] == place.home.decisions.head
