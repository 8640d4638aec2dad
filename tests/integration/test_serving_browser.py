"""The page of the model server in a real browser: with and without scripts, with the keyboard, at any size."""

import base64
import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facemllm.core import digests
from facemllm.core.corrections import PICTURES, Correction, read
from tests.conftest import picture
from tests.integration.browsing import SHOWN, as_shown, assert_readable, marks
from tests.integration.conftest import stop_tree
from tests.pictures import encode
from tests.ports import free_port

pytestmark = marks
Opened = Callable[..., Any]
"""Opens the page in a browser of its own; takes what Playwright's `new_context` takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of the page, and the folder of its corrections."""
    folder, port = tmp_path_factory.mktemp("corrections"), free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.serving_page", str(port), str(folder)])
    url = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        assert process.poll() is None
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            break
        time.sleep(0.2)
    yield url, folder
    stop_tree(process)


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faces") / "face.jpg"
    path.write_bytes(picture(1))
    return path


@pytest.fixture
def opened(browser: Any, server: tuple[str, Path]) -> Iterator[Opened]:
    with contextlib.ExitStack() as stack:

        def open_page(**options: Any) -> Any:
            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.said = said = []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(server[0])
            return page

        yield open_page


def loaded(page: Any, selector: str) -> bool:
    shown: bool = page.locator(selector).evaluate("one => one.decode().then(() => one.naturalWidth > 8)")
    return shown


def test_a_dropped_picture_is_answered_in_place(opened: Opened, face: Path) -> None:
    page = opened()
    page.evaluate("window.here = true")
    assert page.locator(".scripted").is_visible()
    drop = """data => {
      const file = new File([Uint8Array.from(atob(data), one => one.charCodeAt(0))], "face.jpg", {type: "image/jpeg"})
      const held = new DataTransfer()
      held.items.add(file)
      for (const name of ["dragenter", "dragover", "drop"])
        document.getElementById("drop").dispatchEvent(
          new DragEvent(name, {bubbles: true, cancelable: true, dataTransfer: held}))
    }"""
    page.evaluate(drop, base64.b64encode(face.read_bytes()).decode())
    page.get_by_role("rowheader", name="How old is the person?").wait_for()
    assert page.evaluate("window.here"), "the page was not loaded anew"
    assert loaded(page, "#own")
    assert page.locator("#own").get_attribute("src").startswith("blob:")
    meter = page.locator(".answers td.p meter").first
    assert meter.evaluate("one => one.value") == 70
    assert page.locator("#state").inner_text() == "Answered."
    assert page.evaluate("document.activeElement.id") == "answers"
    page.get_by_label("Questions of your own").fill("Who is this?\nthe weather?")
    page.get_by_role("button", name="Ask").click()
    page.locator(".tag.bad", has_text="refused: identification").wait_for()
    page.get_by_label("Questions of your own").fill("busy")
    page.get_by_role("button", name="Ask").click()
    assert "try again in a moment" in page.get_by_role("alert").inner_text()
    assert [one for one in page.said if "429" not in one] == [], "nothing was against the page's own rules"


def test_a_map_lies_over_the_picture(opened: Opened, face: Path, tmp_path: Path) -> None:
    page = opened()
    numbers = np.zeros((48, 48), np.uint8)
    numbers[12:36, 12:36] = 13
    (tmp_path / "map.png").write_bytes(encode(numbers))
    page.get_by_label("Picture of one face").set_input_files(face)
    page.get_by_label("Map of its parts").set_input_files(tmp_path / "map.png")
    page.get_by_role("button", name="Ask").click()
    page.locator("img.map").wait_for()
    assert loaded(page, "img.map")
    boxes = [page.locator(one).bounding_box() for one in ("#own", "img.map")]
    assert boxes[0] == boxes[1]
    assert page.locator(".legend").get_by_text("hair", exact=True).is_visible()
    assert page.said == []


def test_a_correction_with_the_picture_that_the_browser_has(
    opened: Opened, server: tuple[str, Path], face: Path
) -> None:
    page = opened()
    page.get_by_label("Picture of one face").set_input_files(face)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("An answer is wrong").click()
    assert page.get_by_label("The picture again").is_hidden()
    page.get_by_label("Which", exact=True).select_option(index=1)
    page.get_by_label("What is right").fill("42")
    page.get_by_role("checkbox", name="I may pass this picture on").check()
    page.get_by_role("button", name="Send the correction").click()
    page.get_by_text("stored with the picture").wait_for()
    found = [one for _, one in read(server[1]) if isinstance(one, Correction)]
    image = digests.of_bytes(picture(1))
    assert (found[-1].image, found[-1].item, found[-1].label, found[-1].consent_text) == (image, "age", "42", "1")
    assert (server[1] / PICTURES / image).read_bytes() == picture(1)
    assert page.said == []


def test_without_scripts_with_the_keyboard_alone(opened: Opened, face: Path) -> None:
    page = opened(java_script_enabled=False)

    def reach(selector: str) -> None:
        for _ in range(60):
            if page.locator(f"{selector}:focus").count():
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"the keyboard does not reach {selector}")

    reach(".skip")
    page.keyboard.press("Enter")
    reach("#picture")
    page.locator("#picture").set_input_files(face)  # the system's own dialog is not the page's
    reach("input[value=attributes]")
    page.keyboard.press("Space")
    assert page.locator("input[value=attributes]:checked").count() == 0
    reach("#questions")
    page.keyboard.type("Too dark?")
    reach("button")
    page.keyboard.press("Enter")
    page.get_by_text("the picture is darker than any that was evaluated").wait_for()
    assert page.locator(".group").all_inner_texts() == ["Expression", "Age", "Your own questions"]
    assert page.locator("#own").get_attribute("src").startswith("data:image/jpeg")
    assert loaded_without_scripts(page)
    reach("#h-wrong")
    page.keyboard.press("Enter")
    reach("#correction")
    page.keyboard.type("happy")
    reach("#wrong button")
    page.keyboard.press("Enter")
    page.get_by_text("stored without the picture").wait_for()


def loaded_without_scripts(page: Any) -> bool:
    box = page.locator("#own").bounding_box()
    return bool(box and box["width"] > 50 and box["height"] > 50)


def test_it_fits_and_can_be_read(opened: Opened, face: Path) -> None:
    page = opened()
    page.get_by_label("Picture of one face").set_input_files(face)
    page.get_by_label("Questions of your own").fill("W" * 100 + "\nWho?\nweather\ndark")
    page.get_by_role("button", name="Ask").click()
    page.locator(".tag.bad").wait_for()
    small = """() => [...document.querySelectorAll("button, summary, fieldset label, input[type=file]")]
      .filter(one => one.getClientRects().length && one.getBoundingClientRect().height < 24)
      .map(one => one.outerHTML)"""
    for shown in SHOWN:
        as_shown(page, *shown)
        assert_readable(page, shown)
        assert page.evaluate(small) == [], f"too small for a finger: {shown}"
        page.locator("#questions").focus()
        page.keyboard.press("Tab")
        assert page.locator(":focus").evaluate("one => getComputedStyle(one).outlineWidth") == "3px"
    assert page.said == []
