"""Names that readers, tasks and models share: facial attributes as the datasets that introduced them have them
(CelebA's forty, MAAD-Face's forty-seven, LFWA's seventy-three), classes of a segmentation, fairness groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CELEBA = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
    *("Wearing_Necklace", "Wearing_Necktie", "Young"),
)

MAAD_ONLY = (
    *("Middle_Aged", "Senior", "Asian", "White", "Black", "Shiny_Skin", "Square_Face", "Round_Face"),
    *("Obstructed_Forehead", "Fully_Visible_Forehead", "Brown_Eyes", "Mouth_Closed", "No_Eyewear"),
)
"""Those of MAAD-Face that CelebA has not."""

LFWA_ONLY = (
    *("Baby", "Child", "Youth", "Sunglasses", "Frowning", "Harsh_Lighting", "Flash", "Soft_Lighting", "Outdoor"),
    *("Curly_Hair", "Partially_Visible_Forehead", "Eyes_Open", "Mouth_Wide_Open", "Teeth_Not_Visible", "Round_Jaw"),
    *("Color_Photo", "Posed_Photo", "Attractive_Man", "Attractive_Woman", "Indian", "Strong_Nose_Mouth_Lines"),
    "Flushed_Face",
)
"""Those of LFWA's seventy-three that neither has (Kumar and others, ICCV 2009), spelled in CelebA's manner."""

SEGMENTATION = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip"),
    *("l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""Classes of a segmentation by their number in it (github switchablenorms/CelebAMask-HQ)."""

AGE_BANDS = ((18, "child"), (36, "young"), (60, "middle"))
SKIN_TONES = ((4, "light"), (7, "medium"), (11, "dark"))


def fairness_groups(row: Mapping[str, Any]) -> dict[str, str]:
    """Fairness groups of a row of `faces`: `gender`, `age_band` (child 0-17, young 18-35, middle 36-59, old 60+) and
    `skin_tone` (Monk scale: light 1-3, medium 4-6, dark 7-10). What is unknown is left out."""
    found = {}
    if row.get("gender") is not None:
        found["gender"] = str(row["gender"])
    age = row.get("age")
    if age is not None and age >= 0:
        found["age_band"] = next((band for below, band in AGE_BANDS if age < below), "old")
    tone = row.get("skin_tone")
    if tone is not None and 1 <= tone <= 10:
        found["skin_tone"] = next(name for below, name in SKIN_TONES if tone < below)
    return found
