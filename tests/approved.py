"""Approved models for tests: a home with keys, a policy and decisions, bundles, and a registry in memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from facemllm.core.digests import of_bytes
from facemllm.errors import UserError
from facemllm.promote import registry
from facemllm.promote.registry import Version
from facemllm.settings import Settings, load
from facemllm.signing import keys, local, manifest
from facemllm.signing.canonical import canonical
from facemllm.signing.decisions import Decisions
from facemllm.signing.statements import Draft, Statement, sign

ADA, GRACE = "Ada Lovelace", "Grace Hopper"


def make_model(folder: Path, content: bytes = b"weights") -> Path:
    """A directory that looks like a model, and that nothing can load."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content * 1000)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text(f'"{name}"', "utf-8")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)
    return folder


@dataclass
class Home:
    """A home in which models are decided on, with one key a person."""

    settings: Settings
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def decisions(self) -> Decisions:
        return Decisions.open(self.settings)

    def person(self, name: str, *roles: str) -> str:
        self.keys[name] = local.new_person_key(self.settings, name, roles, None).id
        return self.keys[name]

    def bundle(self, model: Path, version: int = 1, **changed: Any) -> str:
        """Add a bundle about a model directory. Returns its digest."""
        found = manifest.of(model)
        return self.decisions.append_bundle(bundle_files(found.digest, version, found.files, **changed))

    def say(
        self, decision: Any, bundle: str, person: str | None = None, reason: str = "fine", **more: Any
    ) -> Statement:
        """Sign and append a statement about a bundle."""
        decisions = self.decisions
        model = decisions.bundle(bundle)["model"]["digest"]
        signer = keys.signer(
            local.keys_folder(self.settings), self.keys[person or (ADA if ADA in self.keys else next(iter(self.keys)))]
        )
        role = more.pop("role", "requester" if decision == "request" else "approver")
        draft = Draft(decision, bundle, model, reason, role, more.pop("previous", decisions.previous(model)), **more)
        return decisions.append(sign(draft, signer))

    def approve(self, model: Path, version: int = 1, **changed: Any) -> str:
        """Have a model asked for and approved. Returns the bundle's digest."""
        bundle = self.bundle(model, version, **changed)
        self.say("request", bundle)
        self.say("approve", bundle)
        return bundle

    def flags(self) -> list[str]:
        """What makes a server ask for authorization."""
        place = self.settings.home / "signing"
        given = {"decisions": place / "decisions", "policy": place / "policy.yaml", "checkpoint": place / "check.json"}
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def make_home(folder: Path, *more: str) -> Home:
    """A home with Ada, who may ask and approve, and Grace, who may approve; and the pipeline's own key."""
    home = Home(load("laptop", [f"storage.home={folder}", *more]))
    local.policy(home.settings)
    home.person(ADA, "requester", "approver")
    home.person(GRACE, "approver")
    return home


def bundle_files(
    digest: str, version: int = 1, files: Mapping[str, str] | None = None, **changed: Any
) -> dict[str, bytes]:
    card = b"# face-mllm"
    whole: dict[str, Any] = {
        "schema": 1,
        "model": {"name": "face-mllm", "version": version, "digest": digest, "files": dict(files or {})},
        "evaluation": {"digest": evaluation_of(version)},
        "gate": {"passed": True, "reasons": ["7 thresholds are met"], "checks": []},
        "card": of_bytes(card),
    }
    return {"bundle.json": canonical(whole | changed), "card.md": card}


def evaluation_of(version: int) -> str:
    return of_bytes(f"evaluation {version}".encode())


class Registry:
    """MLflow's registry in memory, in place of the functions that ask it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: dict[int, Version] = {}
        for name in ("find_version", "of_digest", "set_alias", "set_tags"):
            monkeypatch.setattr(registry, name, getattr(self, name))
        monkeypatch.setattr(registry, "versions", lambda settings: self.newest_first())
        for module in ("decide", "overview"):
            monkeypatch.setattr(f"facemllm.promote.{module}.find_version", self.find_version)
        monkeypatch.setattr("facemllm.promote.overview.versions", lambda settings: self.newest_first())
        monkeypatch.setattr("facemllm.promote.decide.set_tags", self.set_tags)

    def add(self, number: int, digest: str, **more: Any) -> Version:
        evaluation = more.pop("evaluation", evaluation_of(number))
        created = "2026-11-29T08:00:00+00:00"
        made = Version("face-mllm", number, digest, "passed", evaluation, "models:/m-x", "", created, "", **more)
        self.versions[number] = made
        return made

    def newest_first(self) -> list[Version]:
        return sorted(self.versions.values(), key=lambda one: -one.version)

    def find_version(self, settings: Settings, version: int | str) -> Version:
        for one in self.versions.values():
            if str(version) in (str(one.version), *one.aliases):
                return one
        raise UserError(f"face-mllm has no version '{version}'")

    def of_digest(self, settings: Settings, digest: str) -> Version:
        return next(one for one in self.versions.values() if one.digest == digest)

    def set_alias(self, settings: Settings, version: int | str, alias: str) -> Version:
        for number, one in self.versions.items():
            kept = {name for name in one.aliases if name != alias} | ({alias} if number == int(version) else set())
            self.versions[number] = replace(one, aliases=tuple(sorted(kept)))
        return self.versions[int(version)]

    def set_tags(self, settings: Settings, version: Version, tags: Mapping[str, str]) -> None:
        found = self.versions[version.version]
        self.versions[version.version] = replace(found, tags={**found.tags, **tags})


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def bytes_name(folder: Path) -> None:
    """Make a file whose name is not UTF-8."""
    os.close(os.open(os.fsencode(folder) + b"/\xff\xfe.json", os.O_CREAT | os.O_WRONLY))
