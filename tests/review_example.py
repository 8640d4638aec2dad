"""A decisions repository to review: keys of people, bundles like the one in `bundle_example/`, statements.

`bundle_example/` is what `promote request` collected of a laptop run against a champion of the same data.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from facemllm.core.digests import of_bytes
from facemllm.settings import load
from facemllm.signing import keys, local
from facemllm.signing.canonical import canonical, utc_now
from facemllm.signing.policy import add_key
from facemllm.signing.statements import Draft, sign
from tests.approved import ADA, GRACE, Home

FOLDER = Path(__file__).with_name("bundle_example")
BUNDLE: Mapping[str, Any] = json.loads((FOLDER / "bundle.json").read_text("utf-8"))
PASSPHRASE = "correct horse ☂ battery"
PIPELINE = "pipeline"


class Example(Home):
    """A home whose keys are a year old and may have a passphrase, and whose bundles are whole."""

    def person(self, name: str, *roles: str, passphrase: str | None = None) -> str:
        made = local.make_key(self.settings, name, roles, passphrase.encode() if passphrase else None)
        policy = self.settings.policy_file
        add_key(policy, replace(made, not_before=ago(days=365)), local.new_rule(self.settings))
        self.keys[name] = made.id
        return made.id

    def bundle(self, version: int = 1, change: Callable[[dict[str, Any]], None] = lambda _: None) -> str:
        """Add a bundle of a model of its own; `change` edits what it says. Returns its digest."""
        files = {name: (FOLDER / name).read_bytes() for name in ("card.md", "sbom.json")}
        files |= {f"samples/{path.name}": path.read_bytes() for path in (FOLDER / "samples").iterdir()}
        facts = copy.deepcopy(dict(BUNDLE))
        facts["model"] |= {"version": version, "digest": of_bytes(f"model {version}".encode())}
        facts["lineage"]["specialize"] = facts["model"]["digest"]
        change(facts)
        return self.decisions.append_bundle({**files, "bundle.json": canonical(facts)})

    def say(
        self,
        decision: Any,
        bundle: str,
        person: str,
        reason: str = "figures are in order",
        passphrase: str | None = None,
        **draft: Any,
    ) -> str:
        """Sign a decision and append it. Returns the statement's id."""
        decisions = self.decisions
        model = decisions.bundle(bundle)["model"]["digest"]
        key = self.keys[person]
        signer = keys.signer(local.keys_folder(self.settings), key, lambda _: (passphrase or "").encode())
        known = decisions.policy
        role = next(role for role in known.roles_for(decision) if role in known.keys[key].roles)
        given = {"previous": decisions.previous(model), "issued": utc_now(), **draft}
        return decisions.append(sign(Draft(decision, bundle, model, reason, role, **given), signer)).id


STRICT = ("promote.rule.requester_may_approve=false", "promote.rule.request_by=[requester]")
"""Settings of a policy by which whoever asks may not approve."""


def example(home: Path, *overrides: str, people: bool = True) -> Example:
    """A home with Ada (approver and requester, with a passphrase), Grace (approver) and the pipeline; no bundle."""
    made = Example(load("laptop", [f"storage.home={home}", "tracking.uri=http://127.0.0.1:15000", *overrides]))
    made.person(PIPELINE, "pipeline", "releaser")
    if people:
        made.person(ADA, "approver", "requester", passphrase=PASSPHRASE)
        made.person(GRACE, "approver")
    return made


def hidden(html: str) -> dict[str, str]:
    """The hidden fields of a page's form."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', html))


def ago(**how: float) -> datetime:
    return utc_now() - timedelta(**how)
