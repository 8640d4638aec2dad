"""Where the limits of `serve.quality` come from: figures of drawn heads, as they are and made worse as in evaluation.

    python benchmarks/picture_limits.py            # about 10 s
    python benchmarks/picture_limits.py FOLDER     # of your own pictures (.jpg, .png) of one face each

For each kind it prints the value that 99 in 100 pictures reach. A limit is that of the kind that is hardest on its
figure: sharpness of `blur`, brightness and contrast of `dark`; the least side is the smallest as sharp as `blur`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from facemllm.evaluate.predict import KINDS
from facemllm.heads.render import render_identity
from facemllm.serve.asked.quality import measure

HEADS, SEED, SIZE = 150, 4242, 128
SIDES = (12, 16, 20, 24, 28, 32, 40, 48)
FIGURES = ("sharpness", "brightness", "contrast", "color")


def pictures(folder: Path | None) -> list[Image.Image]:
    """Drawn heads, or the pictures of a folder."""
    if folder is not None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return [Image.open(path).convert("RGB") for path in found]
    rows = [row for identity in range(HEADS) for row in render_identity(SEED, identity, 1, SIZE)]
    return [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]


def smaller(side: int) -> Callable[[Image.Image, str], Image.Image]:
    """A picture reduced to so many pixels."""
    return lambda image, _: image.resize((side, side), Image.Resampling.LANCZOS)


def main() -> None:
    """Print the figures."""
    shown = pictures(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    changes = {"as it is": lambda image, _: image, **KINDS, **{f"{side} pixels": smaller(side) for side in SIDES}}
    print(f"{len(shown)} pictures; reached by 99 in 100\n{'':12}" + "".join(f"{name:>12}" for name in FIGURES))
    for kind, change in changes.items():
        facts = [measure(change(image, str(number))) for number, image in enumerate(shown)]
        least = [np.percentile([one[name] for one in facts], 1) for name in FIGURES]
        print(f"{kind:12}" + "".join(f"{value:12.4f}" for value in least))


if __name__ == "__main__":
    main()
