"""Synthetic heads a second of one core: this project's renderer beside the prototype that it was written anew from.

    .venv/bin/python benchmarks/renderer.py --prototype FOLDER [--people 30] [--rounds 6] [--size 128]

One process, one thread. In every round each renderer draws the same number of people, two pictures each, from random
numbers to encoded JPEG, mask PNG and labels; who begins changes from round to round. The ratio is the median over the
rounds of the rates per second of processor time, which other work on the machine hardly moves; by the clock beside it.

The prototype is not part of the project: FOLDER holds its scripts and the `head.npz` that its `bake.py` makes. Without
it our own rate is printed alone. It draws its people by other random numbers, so what "the same picture" means is
measured apart: heads of ours are handed to its drawing routine (same shape, expression, pose, light, hair, clothes) and
compared with ours. They cannot agree to the pixel: either has noise of its own on skin, hair and background, and some
borders (hair, collar, peak of a hat) were drawn anew. Reported are the share of pixels of the same class, the same on
the face alone, how far nose tip and mouth corners lie apart, and the mean difference of the colours on the face.

On a shared AMD EPYC (2 cores), 128 pixels, 6 rounds of 60 pictures: 3.6 times the prototype's rate (3.3 to 3.7 over the
rounds; 96 against 27 pictures a second of processor). Same class in 97.3 % of all pixels and 98.9 % of the face's,
landmarks 0.0 pixels and colours 7 of 255 apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from common import median, report

PICTURES_EACH = 2
SEED = 17
COMPARED = 40  # heads

HAIR = {
    "Bald": "bald",
    "Buzz_Cut": "buzz",
    "Short_Hair": "short",
    "Medium_Hair": "medium",
    "Long_Hair": "long",
    "Hair_Bun": "bun",
}
BEARD = {
    "No_Beard": "none",
    "5_o_Clock_Shadow": "stubble",
    "Mustache": "mustache",
    "Goatee": "goatee",
    "Full_Beard": "full",
}
GLASSES = {"No_Eyewear": "none", "Eyeglasses": "glasses", "Sunglasses": "sunglasses"}

Draw = Callable[[int, int, int], int]
"""Draws people from a first number, so many, at a size; returns how many pictures that made."""


def our_rows(first: int, people: int, size: int) -> int:
    from facemllm.heads.render import render_identity

    return sum(len(render_identity(SEED, first + i, PICTURES_EACH, size)) for i in range(people))


def prototype_rows(first: int, people: int, size: int) -> int:
    rows, _ = import_module("render").work((range(first, first + people), PICTURES_EACH, size, 1, SEED))
    return len(rows)


def rates(draw: Draw, first: int, people: int, size: int) -> tuple[float, float]:
    """Pictures a second of processor time, and by the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    pictures = draw(first, people, size)
    return pictures / (time.process_time() - processor), pictures / (time.perf_counter() - clock)


def open_prototype(folder: Path) -> None:
    """Make its modules importable; they read `head.npz` from the working folder."""
    if missing := [
        name for name in ("headgen.py", "rast.py", "render.py", "head.npz") if not (folder / name).is_file()
    ]:
        sys.exit(f"error: {folder} has no {', '.join(missing)}; give the prototype's folder, after its bake.py has run")
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(Path.cwd()))
    import_module("headgen")
    os.chdir(before)


def same_head(number: int) -> tuple[Any, Any, dict[str, Any]]:
    """A person and look of ours, and the parameters that make the prototype draw the same.

    What the prototype draws by `iseed` while it renders (place, light, background) is drawn here in its order and given
    to our look; what it counts off its number `seed` (shades, cut of clothes and glasses) likewise.
    """
    import numpy as np

    from facemllm.heads.model import head_rotation
    from facemllm.heads.sampling import sample_appearance, sample_identity

    iseed, seed = 1000 + number, 7919 * (number + 1) % 1_000_000
    rng = np.random.default_rng(iseed)
    aside, up, zoom = rng.normal(0, 0.06), rng.normal(0, 0.06) - 0.12, rng.uniform(0.62, 0.74)
    azimuth, elevation = rng.uniform(-60, 60), rng.uniform(15, 60)
    warmth, power = rng.uniform(0.9, 1.05), rng.uniform(0.75, 1.15)
    top = rng.uniform(0.1, 0.85, 3) * 0.4 + rng.uniform(0.1, 0.55)
    bottom = rng.uniform(0.1, 0.85, 3) * 0.4 + rng.uniform(0.05, 0.5)

    person = sample_identity(np.random.default_rng([SEED, number]))
    person = replace(person, skin_seed=number % 89, freckled=number % 4 == 0)
    look = replace(
        sample_appearance(np.random.default_rng([SEED, number, 1]), person),
        shift=(aside, up),
        zoom=zoom,
        light_azimuth=azimuth,
        light_elevation=elevation,
        light_warmth=warmth,
        light_power=power,
        background=(tuple(top), tuple(bottom)),
        hair_seed=seed % 97,
        lipstick_shade=seed % 3,
        neckline=seed % 3,
        brim=bool(seed % 3),
        frame_shade=seed % 4,
        hat_shade=seed % 4,
        cloth_shade=seed % 6,
        square_glasses=bool(seed % 2),
    )
    turn = head_rotation(look.yaw, look.pitch, look.roll)  # the prototype writes it as Ry Rx Rz
    parameters = {
        "local": dict(person.shape),
        "expr": {name.removeprefix("units/"): weight for name, weight in look.units.items()},
        "yaw": np.degrees(np.arctan2(turn[0, 2], turn[2, 2])),
        "pitch": np.degrees(-np.arcsin(turn[1, 2])),
        "roll": np.degrees(np.arctan2(turn[1, 0], turn[1, 1])),
        "gaze": look.gaze,
        "mel": person.melanin,
        "age": person.age,
        "browt": person.brow_thickness,
        "hairc": person.hair_color.removesuffix("_Hair").replace("_", " ").lower(),
        "eyec": person.eye_color.removesuffix("_Eyes").lower(),
        "hair": HAIR[look.hair_style],
        "bangs": look.bangs,
        "beard": BEARD[look.beard],
        "glasses": GLASSES[look.eyewear],
        "hat": look.hat,
        "earrings": look.earrings,
        "lipstick": look.lipstick,
        "seed": seed,
        "iseed": iseed,
        "tseed": number,
        # an age off its scale gives no shape by age, sex and weight: all of the shape stands in `local`
        **{"age_v": -1.0, "male": 0.0, "weight": 0.5, "anc": (0.0, 0.0, 0.0)},
    }
    return person, look, parameters


def agreement(size: int) -> dict[str, float]:
    """How far `COMPARED` heads look the same when the prototype draws them."""
    import numpy as np

    from facemllm.heads.materials import CLASS
    from facemllm.heads.render import FACE_CLASSES, draw, shape_head, stage

    prototype = import_module("headgen")
    to_ours = np.array([CLASS[name] for name in prototype.SEG])
    face = [CLASS[name] for name in FACE_CLASSES]
    found = []
    for number in range(COMPARED):
        person, look, parameters = same_head(number)
        ours = draw(stage(shape_head(person), look), person, look, size, np.random.default_rng(number))
        image, segmentation, points = prototype.render(parameters, size, 1)
        same = to_ours[segmentation] == ours.segmentation
        on_face = np.isin(ours.segmentation, face)
        apart = np.array([points[name] for name in ("nose", "r_mouth", "l_mouth")]) - ours.landmarks[2:]
        colours = np.abs(image.astype(float) - ours.image)[on_face & same]
        found.append((same.mean(), same[on_face].mean(), np.hypot(*apart.T).mean(), colours.mean()))
    names = ("same_class", "same_class_on_the_face", "landmarks_apart_pixels", "colours_apart_of_255")
    return dict(zip(names, np.mean(found, axis=0).round(4).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototype", type=Path, metavar="FOLDER", help="its scripts and head.npz")
    parser.add_argument("--people", type=int, default=30, help="a round, two pictures of each (30)")
    parser.add_argument("--rounds", type=int, default=6, help="of each renderer (6)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    options = parser.parse_args()
    # before numpy and numba are imported, which every function here does for itself
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))

    renderers: dict[str, Draw] = {"ours": our_rows}
    if options.prototype is None:
        print("no --prototype FOLDER: our own rate alone, with nothing to compare it with")
    else:
        open_prototype(options.prototype)
        renderers["prototype"] = prototype_rows
    for draw in renderers.values():
        draw(0, 1, options.size)  # compiles

    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in renderers}
    for turn in range(options.rounds):
        for name in renderers if turn % 2 == 0 else reversed(renderers):
            rate = rates(renderers[name], 1 + turn * options.people, options.people, options.size)
            measured[name].append(rate)
            print(
                f"round {turn + 1} {name:9} {rate[0]:6.1f} pictures a second of processor, {rate[1]:6.1f} by the clock"
            )

    more: dict[str, Any] = {"size": options.size, "pictures": options.people * PICTURES_EACH, "rounds": options.rounds}
    more |= {f"{name}_per_second": round(median([rate for rate, _ in values]), 1) for name, values in measured.items()}
    ratios = {}
    if options.prototype is not None:
        both = list(zip(measured["ours"], measured["prototype"], strict=True))
        for place, kind in enumerate(("processor", "clock")):
            each = [ours[place] / prototype[place] for ours, prototype in both]
            ratios[f"images_per_{kind}_second"] = median(each)
            more[f"{kind}_range"] = [round(min(each), 2), round(max(each), 2)]
        more["same_picture"] = agreement(options.size)
    report("renderer", ratios, ("numpy", "numba", "pillow"), **more)


if __name__ == "__main__":
    main()
