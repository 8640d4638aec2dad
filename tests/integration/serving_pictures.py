"""The pictures of the page of the model server in the docs, from a server that runs:

    .venv/bin/python -m tests.integration.serving_pictures http://127.0.0.1:18081 FACE.jpg [MAP.png]

writes docs/images/serving-page.png, -dark.png and -phone.png.
"""

import sys
from pathlib import Path
from typing import Any

from tests.integration.browsing import launched

FOLDER = Path(__file__).parents[2] / "docs" / "images"
SIZES: dict[str, dict[str, Any]] = {
    "serving-page": {"color_scheme": "light", "viewport": {"width": 1200, "height": 820}},
    "serving-page-dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 820}},
    "serving-page-phone": {
        "color_scheme": "light",
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
    },
}
QUESTIONS = "Who is this?\nIs the person smiling?\nWhat is the weather like?"


def main(url: str, face: Path, parts: Path | None, folder: Path = FOLDER) -> None:
    """Ask about a face and write the pictures."""
    with launched() as browser:
        for name, options in SIZES.items():
            page = browser.new_page(**options)
            page.goto(url)
            page.get_by_label("Picture of one face").set_input_files(face)
            if parts is not None:
                page.get_by_label("Map of its parts").set_input_files(parts)
            page.locator("input[name=task]:checked").evaluate_all("all => all.slice(4).forEach(one => one.click())")
            page.get_by_label("Questions of your own").fill(QUESTIONS)
            page.get_by_role("button", name="Ask").click()
            page.locator(".answers").wait_for()
            page.locator("#own").evaluate("one => one.decode()")
            if "phone" in name:
                page.locator("#answers").evaluate("one => one.scrollIntoView()")
            else:
                page.evaluate("scrollTo(0, 0); document.getElementById('ask').scrollTop = 0")
            page.screenshot(path=folder / f"{name}.png")
            page.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
