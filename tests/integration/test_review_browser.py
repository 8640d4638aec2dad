"""The review page in a real browser, against a real server and a real decisions repository."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from facemllm.signing.standing import standing
from tests.integration.browsing import SHOWN, as_shown, assert_readable, marks
from tests.integration.conftest import stop_tree
from tests.ports import free_port
from tests.review_example import ADA, GRACE, PASSPHRASE, PIPELINE, Example, example

pytestmark = marks
WAITING = 3

Opened = Callable[..., Any]
"""Opens the queue in a browser of its own; takes what Playwright's `new_context` takes, and `read_only`."""


@pytest.fixture
def workspace(tmp_path: Path) -> Example:
    """A champion that was approved, one that was rejected, one nobody asked about, and three that wait."""

    def first(bundle: dict[str, Any]) -> None:
        bundle["champion"] = None

    made = example(tmp_path / "home")
    champion, rejected, _ = made.bundle(1, first), made.bundle(2), made.bundle(3)
    made.say("request", champion, PIPELINE, "")
    made.say("approve", champion, GRACE, "the first")
    made.say("request", rejected, PIPELINE, "")
    made.say("reject", rejected, ADA, "age is worse", passphrase=PASSPHRASE)
    for version in range(4, 4 + WAITING):
        made.say("request", made.bundle(version), PIPELINE, "")
    return made


@pytest.fixture
def opened(browser: Any, workspace: Example) -> Iterator[Opened]:
    with contextlib.ExitStack() as stack:

        def open_page(read_only: bool = False, **options: Any) -> Any:
            port = free_port()
            command = [sys.executable, "-m", "facemllm", "review", "--port", str(port)]
            command += ["--set", f"storage.home={workspace.settings.home}", *(["--read-only"] if read_only else [])]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
            stack.callback(stop_tree, server)
            assert server.stdout is not None
            link = server.stdout.readline().strip()
            assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/login\?token=[\w-]{{40,}}", link)
            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.goto(link)
            page.get_by_role("heading", name="Requests for a decision").or_(
                page.get_by_role("link", name="Open the queue")
            ).first.wait_for()
            page.wait_for_url(f"http://127.0.0.1:{port}/")
            return page

        yield open_page


def state(workspace: Example, version: int) -> str:
    decisions = workspace.decisions
    bundle = next(one for one in decisions.bundles() if decisions.bundle(one)["model"]["version"] == version)
    return standing(decisions, decisions.policy, bundle).state


def fill(page: Any, decision: str = "Approve", who: str = ADA) -> None:
    page.get_by_label(decision, exact=True).check()
    page.get_by_label("Reason").fill("looked at the faces")
    option = page.locator("#key option", has_text=who).get_attribute("value")
    page.get_by_label("Key", exact=True).select_option(option)
    page.get_by_role("button", name="Look at what is signed").click()


def test_from_the_queue_to_a_signature(opened: Opened, workspace: Example) -> None:
    page = opened()
    assert page.locator("tbody tr").count() == WAITING
    page.get_by_role("link", name="face-mllm 4").click()
    assert page.get_by_role("heading", level=1).inner_text() == "face-mllm version 4"
    assert page.locator("#champion tbody tr").first.inner_text().startswith("age")
    eager = "image => { image.loading = 'eager'; return image.decode().then(() => image.naturalWidth) }"
    assert page.locator(".face img").first.evaluate(eager) > 50
    fill(page)
    bundle = page.url.split("/")[4]
    model = workspace.decisions.bundle(bundle)["model"]["digest"]
    text = page.locator("main").inner_text()
    assert bundle in text
    assert model in text
    page.get_by_label("Passphrase of the key").fill("wrong")
    page.get_by_role("button", name="Sign: approve").click()
    assert "wrong passphrase" in page.get_by_role("alert").inner_text()
    assert state(workspace, 4) == "requested"
    page.get_by_label("Passphrase of the key").fill(PASSPHRASE)
    page.get_by_role("button", name="Sign: approve").click()
    assert f"Signed: approve by {ADA}" in page.get_by_role("status").inner_text()
    assert state(workspace, 4) == "approved"
    page.get_by_role("link", name="Queue").click()
    assert page.locator("tbody tr").count() == WAITING - 1
    page.get_by_role("link", name="approved 2").click()
    assert page.locator("tbody tr").count() == 2
    page.get_by_role("link", name="face-mllm 4").click()
    fill(page, "Revoke an approval", GRACE)
    page.get_by_role("button", name="Sign: revoke").click()
    page.get_by_role("status").wait_for()
    assert state(workspace, 4) == "revoked"


def test_without_scripts_with_the_keyboard_alone(opened: Opened, workspace: Example) -> None:
    page = opened(java_script_enabled=False)

    def press(key: str, times: int = 1) -> None:
        for _ in range(times):
            page.keyboard.press(key)

    def reach(selector: str, key: str = "Tab") -> None:
        for _ in range(120):
            if page.locator(f"{selector}:focus").count():
                return
            press(key)
        raise AssertionError(f"the keyboard does not reach {selector}")

    press("Tab")
    assert page.locator(".skip:focus").count() == 1
    reach("tbody tr:nth-child(2) a")
    press("Enter")
    page.wait_for_url("**/requests/*")
    reach("#champion table, a[href='#decide']")
    press("Enter")
    reach("input[value=approve]")
    press("Space")
    press("ArrowDown")
    assert page.locator("input[value=reject]:checked").count() == 1
    reach("#reason")
    page.keyboard.type("age got worse")
    reach("#key")
    page.keyboard.type(ADA[:3])
    reach("button")
    press("Enter")
    page.wait_for_url("**/confirm")
    reach("#passphrase")
    page.keyboard.type("wrong")
    press("Enter")
    page.get_by_role("alert").wait_for()
    reach("#passphrase")
    page.keyboard.insert_text(PASSPHRASE)
    press("Enter")
    page.wait_for_url("**signed=*")
    assert state(workspace, 5) == "rejected"


def test_a_forged_form_and_a_stale_page_sign_nothing(opened: Opened, workspace: Example, tmp_path: Path) -> None:
    page = opened()
    page.get_by_role("link", name="face-mllm 4").click()
    page.evaluate("document.querySelector('input[name=csrf]').value = 'forged'")
    fill(page)
    assert "not of this session" in page.get_by_role("alert").inner_text()
    page.go_back()
    page.reload()
    workspace.say("reject", page.url.split("/")[4], GRACE, "meanwhile")
    fill(page)
    assert "read the page again" in page.get_by_role("alert").inner_text()
    # a page of another site, posted by the same browser with the same cookies
    action = page.url
    forged = f'<form method=post action="{action}"><input name=csrf value=x><button>go</button></form>'
    page.route("http://evil.example/", lambda route: route.fulfill(body=forged, content_type="text/html"))
    page.goto("http://evil.example/")
    page.get_by_role("button").click()
    assert re.search("another site|no session", page.locator("main").inner_text())
    assert state(workspace, 4) == "rejected"
    assert [e.statement.reason for e in workspace.decisions.statements() if e.statement][-1] == "meanwhile"


def test_read_only_shows_and_prints_the_command(opened: Opened, workspace: Example) -> None:
    page = opened(read_only=True)
    page.get_by_role("link", name="face-mllm 4").click()
    assert page.locator("form").count() == 0
    bundle = page.url.split("/")[4]
    text = page.locator("#decide").inner_text()
    assert "facemllm promote approve 4 --by" in text
    assert bundle[:12] in text


def test_it_fits_and_can_be_read(opened: Opened, workspace: Example) -> None:
    long = "W" * 300

    def wordy(bundle: dict[str, Any]) -> None:
        bundle["sources"][0]["name"] = bundle["image"] = bundle["gate"]["checks"][0]["reason"] = long
        bundle["gate"]["checks"][0]["passed"] = False
        bundle["samples"]["faces"][0]["answers"][0]["candidate"] = long
        bundle["tasks"][long] = bundle["tasks"]["age"]

    made = workspace.bundle(9, wordy)
    workspace.say("request", made, PIPELINE, long)
    page = opened()
    reject = []
    page.on("console", lambda message: reject.append(message.text))
    address = page.url
    for shown in SHOWN:
        as_shown(page, *shown)
        for path in ("", "?state=all", f"requests/{made}"):
            page.goto(address + path)
            assert_readable(page, shown)
        assert page.locator("main, header, aside, nav").count() >= 4
        page.locator("a").nth(2).focus()
        page.keyboard.press("Tab")
        assert page.locator(":focus").evaluate("one => getComputedStyle(one).outlineWidth") == "3px"
    assert reject == []
