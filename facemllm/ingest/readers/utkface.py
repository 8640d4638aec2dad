"""UTKFace: age, sex and race in the file name.

    UTKFace/25_0_2_20170104020210475.jpg.chip.jpg     aligned and cropped, 200 x 200
    part1/ part2/ part3/25_0_2_20170104020210475.jpg  in the wild

A name is [age]_[sex]_[race]_[date and time]: age 0 to 116; sex 0 male, 1 female; race 0 white, 1 black, 2 asian,
3 indian, 4 others. Splits: none; drawn by picture, since people are unknown. The aligned and the wild version of a
picture have the same `source_id` and so fall into the same split.
Crop: aligned pictures are used as they are, wild ones whole.
Refused: names in which a label is missing or out of range (39_1_20170116174525125, 61_1_20170109142408075,
61_1_20170109150557335, 61_3_20170109150557335, 53__0_20170116184028385: public repairs disagree, so none is guessed),
a stem that stands there twice, files that are named otherwise. Names whose ending alone is damaged (…357jpg, …272.pg,
a blank before .jpg) have all their labels and are read; the content says what format they are.

Option: `pictures` (aligned, wild).
Source: https://susanqq.github.io/UTKFace/; Zhang, Song, Qi, "Age progression/regression by conditional adversarial
autoencoder", CVPR 2017.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refused
from facemllm.ingest.readers.files import files

KEY = "utkface"
OPTIONS = {"pictures": ("aligned", "wild")}
OFFICIAL = ()

GENDERS = ("male", "female")
RACES = ("white", "black", "asian", "indian", "others")
MAX_AGE = 116
_PARTS = ("part1", "part2", "part3")
_NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_\d{8,}", re.ASCII)
_ENDING = re.compile(r"[ .]*[a-z]+(\.chip\.jpg)?", re.ASCII | re.IGNORECASE)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their names. Raises UserError when no such picture lies there."""
    if options["pictures"] == "aligned":
        homes = [labels.existing(root, "UTKFace", "crop_part1", ".")]
        hint = "option pictures: wild reads part1 to part3"
    else:
        homes = [root / part for part in _PARTS if (root / part).is_dir()]
        hint = "in-the-wild pictures lie in part1, part2, part3"
    seen: set[str] = set()
    count = 0
    for home in homes:
        for name in files(home):
            count += 1
            yield _face(root, home, name, seen)
    if not count:
        raise UserError(f"{root}: no {options['pictures']} picture of UTKFace in it; {hint}")


def _face(root: Path, home: Path, name: str, seen: set[str]) -> Face | Refused:
    file = (home / name).relative_to(root).as_posix()
    found = _NAME.match(name)
    if found is None or not _ENDING.fullmatch(name, found.end()):
        return Refused(file, 0, "the name is not [age]_[sex]_[race]_[date].jpg; what is missing there is not guessed")
    if int(found[1]) > MAX_AGE:
        return Refused(file, 0, f"the age is {int(found[1])}, outside 0 to {MAX_AGE}")
    if found[0] in seen:
        return Refused(file, 0, f"{found[0]} stands there already")
    seen.add(found[0])
    facts = {"age": float(found[1]), "gender": GENDERS[int(found[2])], "ethnicity": RACES[int(found[3])]}
    return Face(file=file, source_id=found[0], image=home / name, labels=facts)
