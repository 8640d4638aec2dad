"""Deciding on the review page: what is signed is what was shown, once, by a key that may."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from facemllm.review.app import application
from facemllm.review.pages import Pages
from facemllm.review.security import Sessions
from facemllm.signing.canonical import utc_now
from facemllm.signing.policy import revoke_key
from facemllm.signing.standing import standing
from tests.review_example import ADA, GRACE, PASSPHRASE, PIPELINE, STRICT, Example, example, hidden

HOST = "127.0.0.1:15080"


class Browser:
    """A session of the page, which posts the forms it is shown."""

    def __init__(self, workspace: Example) -> None:
        self.workspace, sessions = workspace, Sessions()
        self.client = TestClient(
            application(Pages(workspace.settings), sessions, [HOST]), f"http://{HOST}", follow_redirects=False
        )
        self.client.get("/login", params={"token": sessions.token})

    def read(self, bundle: str) -> dict[str, str]:
        return hidden(self.client.get(f"/requests/{bundle}").text)

    def confirm(self, bundle: str, form: dict[str, str], **fields: str) -> tuple[int, str]:
        asked = {"decision": "approve", "reason": "looked at it", "key": self.workspace.keys[ADA]}
        return self._post(f"/requests/{bundle}/confirm", {**form, **asked, **fields})

    def sign(self, bundle: str, page: str, passphrase: str = PASSPHRASE) -> tuple[int, str]:
        return self._post(f"/requests/{bundle}/sign", {**hidden(page), "passphrase": passphrase})

    def _post(self, path: str, fields: dict[str, str]) -> tuple[int, str]:
        answer = self.client.post(path, data=fields, headers={"origin": f"http://{HOST}"})
        return answer.status_code, answer.text or answer.headers.get("location", "")


@pytest.fixture
def workspace(tmp_path: Path) -> Example:
    made = example(tmp_path / "home")
    made.say("request", made.bundle(1), PIPELINE, "")
    return made


@pytest.fixture
def bundle(workspace: Example) -> str:
    return workspace.decisions.bundles()[0]


def state(workspace: Example, bundle: str) -> str:
    decisions = workspace.decisions
    return standing(decisions, decisions.policy, bundle).state


def test_what_was_shown_is_signed_once(workspace: Example, bundle: str) -> None:
    browser = Browser(workspace)
    status, page = browser.confirm(bundle, browser.read(bundle), reason="  two\r\nlines ")
    model = workspace.decisions.bundle(bundle)["model"]["digest"]
    assert status == 200
    assert all(f">{digest}</code>" in page for digest in (bundle, model, workspace.keys[ADA]))
    assert state(workspace, bundle) == "requested"
    status, where = browser.sign(bundle, page)
    assert status == 303
    decisions = workspace.decisions
    (statement,) = [
        one.statement for one in decisions.statements() if one.statement and one.statement.decision == "approve"
    ]
    assert where == f"/requests/{bundle}?signed={statement.id}"
    assert (statement.bundle, statement.model, statement.person) == (bundle, model, ADA)
    assert (statement.reason, statement.role) == ("two lines", "approver")
    assert statement.expires is not None
    assert (statement.expires - statement.issued).days == 90
    assert statement.previous == tuple(sorted(e.id for e in decisions.statements() if e.id != statement.id))
    assert state(workspace, bundle) == "approved"
    assert f"Signed: approve by {ADA}" in browser.client.get(where).text
    assert browser.sign(bundle, page)[0] == 409
    assert len(workspace.decisions.statements()) == 2


def test_a_wrong_passphrase_signs_nothing_and_may_be_tried_again(workspace: Example, bundle: str) -> None:
    browser = Browser(workspace)
    _, page = browser.confirm(bundle, browser.read(bundle))
    for wrong in ("", "wrong", PASSPHRASE + " "):
        status, page = browser.sign(bundle, page, wrong)
        assert status == 403
        assert "passphrase" in page
    assert state(workspace, bundle) == "requested"
    assert browser.sign(bundle, page)[0] == 303


def test_a_form_is_taken_once_also_where_nothing_was_signed(workspace: Example, bundle: str) -> None:
    browser = Browser(workspace)
    _, page = browser.confirm(bundle, browser.read(bundle))
    assert browser.sign(bundle, page, "wrong")[0] == 403
    assert browser.sign(bundle, page)[0] == 409
    assert state(workspace, bundle) == "requested"


@pytest.mark.parametrize("when", ["before the confirmation", "before the signature"])
@pytest.mark.parametrize("what", ["a rejection", "a revoked key", "another key"])
def test_what_changed_since_it_was_shown_is_not_signed(workspace: Example, bundle: str, when: str, what: str) -> None:
    def change() -> None:
        if what == "a rejection":
            workspace.say("reject", bundle, GRACE)
        elif what == "a revoked key":
            revoke_key(workspace.settings.policy_file, workspace.keys[GRACE], "lost", utc_now())
        else:
            workspace.person("Edsger", "approver")

    browser = Browser(workspace)
    form = browser.read(bundle)
    if when == "before the confirmation":
        change()
        status, text = browser.confirm(bundle, form)
    else:
        _, page = browser.confirm(bundle, form)
        change()
        status, text = browser.sign(bundle, page)
    assert status == 409
    assert "read the page again" in text
    assert "approve" not in [e.statement.decision for e in workspace.decisions.statements() if e.statement]


def test_a_bundle_whose_bytes_changed_is_not_signed(workspace: Example, bundle: str) -> None:
    other = workspace.bundle(2)
    browser = Browser(workspace)
    status, text = browser.confirm(other, browser.read(bundle))
    assert status == 409
    _, page = browser.confirm(bundle, browser.read(bundle))
    assert browser.sign(other, page)[0] == 409
    assert browser.sign(bundle, page)[0] == 303
    assert state(workspace, other) == "pending"
    assert "read the page again" in text


def test_the_requester_may_not_approve_where_the_policy_says_so(tmp_path: Path) -> None:
    workspace = example(tmp_path / "home", *STRICT)
    bundle = workspace.bundle(1)
    workspace.say("request", bundle, ADA, passphrase=PASSPHRASE)
    browser = Browser(workspace)
    status, text = browser.confirm(bundle, browser.read(bundle))
    assert status == 400
    assert f"still may: {GRACE}" in text
    status, page = browser.confirm(bundle, browser.read(bundle), key=workspace.keys[GRACE])
    assert "no passphrase" in page
    assert browser.sign(bundle, page, "")[0] == 303
    assert state(workspace, bundle) == "approved"


def test_a_reject_and_a_revoke_take_an_approval_away(workspace: Example, bundle: str) -> None:
    workspace.say("approve", bundle, GRACE)
    browser = Browser(workspace)
    status, page = browser.confirm(bundle, browser.read(bundle), decision="revoke", reason="licence withdrawn")
    assert status == 200
    assert browser.sign(bundle, page)[0] == 303
    assert state(workspace, bundle) == "revoked"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"decision": "release"}, "choose a decision"),
        ({"decision": ""}, "choose a decision"),
        ({"reason": " \n "}, "a decision needs a reason"),
        ({"reason": "x" * 2001}, "2001 characters"),
        ({"reason": "r\u202eeason"}, "cannot be seen"),
        ({"reason": "nul \x00"}, "cannot be seen"),
        ({"key": "0" * 64}, "does not lie here"),
        ({"key": "../../policy"}, "does not lie here"),
    ],
)
def test_a_form_filled_in_wrongly_is_told_in_one_line(
    workspace: Example, bundle: str, fields: dict[str, str], why: str
) -> None:
    browser = Browser(workspace)
    status, text = browser.confirm(bundle, browser.read(bundle), **fields)
    assert status == 400
    assert why in text


def test_a_model_that_its_gate_refused_cannot_be_approved(workspace: Example) -> None:
    def refuse(bundle: dict[str, Any]) -> None:
        bundle["gate"]["passed"] = False

    refused = workspace.bundle(2, refuse)
    workspace.say("request", refused, PIPELINE, "")
    browser = Browser(workspace)
    status, text = browser.confirm(refused, browser.read(refused))
    assert status == 400
    assert "did not pass its gate" in text
    assert browser.confirm(refused, browser.read(refused), decision="reject")[0] == 200


def test_a_key_without_the_role_is_not_offered(workspace: Example, bundle: str) -> None:
    browser = Browser(workspace)
    page = browser.client.get(f"/requests/{bundle}").text
    assert workspace.keys[ADA] in page
    assert workspace.keys[PIPELINE] not in page
    status, text = browser.confirm(bundle, browser.read(bundle), key=workspace.keys[PIPELINE])
    assert status == 400
    assert "does not lie here" in text
