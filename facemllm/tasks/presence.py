"""Attributes that are there or not, name by name: the union of CelebA's forty, MAAD-Face's 47 and LFWA's 73, in the
words of a caption and in patterns that name them.

Not here are Bangs, Wearing_Hat, Wearing_Earrings and Wearing_Lipstick, which `attributes` asks, and those that speak of
persons (Male, Asian, Black, Indian, White, Attractive, Attractive_Man, Attractive_Woman): `presence_of_persons` asks
them.
"""

from collections.abc import Mapping

from facemllm.tasks.base import Task
from facemllm.tasks.items import Boolean, Words


def _hair(name: str, pattern: str = "") -> Words:
    kind = pattern or name
    return f"{name} hair", (rf"{kind}(?: (?:short|long|curly|wavy|straight))? hair(?:ed)?", rf"hair (?:is|:) {kind}")


def _is(part: str, kind: str, pattern: str = "") -> Words:
    """A part of a certain kind: "a big nose", "the nose is big"."""
    article = "" if part.endswith("s") or part == "skin" else "an " if kind[0] in "aeiou" else "a "
    kinds = pattern or kind
    return f"{article}{kind} {part}", (rf"(?:an? )?(?:{kinds}) {part}", rf"{part} (?:is|are|looks?|:) (?:{kinds})")


_WORDS: Mapping[str, Words] = {
    "Oval_Face": _is("face", "oval", "oval(?: shaped)?"),
    "Square_Face": _is("face", "square", "square(?: shaped)?"),
    "Round_Face": _is("face", "round", "round(?:ed)?(?: shaped)?"),
    "Chubby": _is("face", "chubby"),
    "Flushed_Face": _is("face", "flushed"),
    "High_Cheekbones": _is("cheekbones", "high"),
    "Rosy_Cheeks": _is("cheeks", "rosy"),
    "Pale_Skin": _is("skin", "pale"),
    "Shiny_Skin": _is("skin", "shiny"),
    "Fully_Visible_Forehead": _is("forehead", "fully visible"),
    "Partially_Visible_Forehead": _is("forehead", "partly visible", "(?:partly|partially) visible"),
    "Obstructed_Forehead": _is("forehead", "obstructed", "obstructed|covered|hidden"),
    "Double_Chin": ("a double chin", ("(?:a )?double chin",)),
    "Round_Jaw": _is("jaw", "round"),
    "Strong_Nose_Mouth_Lines": (
        "strong lines from nose to mouth",
        ("strong nose mouth lines", "strong lines from (?:the )?nose to (?:the )?mouth"),
    ),
    "Bald": ("a bald head", ("(?:a )?bald(?: head)?",)),
    "Black_Hair": _hair("black"),
    "Blond_Hair": _hair("blond", "blonde?"),
    "Brown_Hair": _hair("brown", "(?:(?:dark|light) )?brown"),
    "Gray_Hair": _hair("gray", "gr[ae]y"),
    "Curly_Hair": _hair("curly"),
    "Straight_Hair": _hair("straight"),
    "Wavy_Hair": _hair("wavy"),
    "Receding_Hairline": _is("hairline", "receding"),
    "Sideburns": ("sideburns", ("sideburns",)),
    "5_o_Clock_Shadow": ("a 5 o clock shadow", ("(?:a )?5 o ?clock shadow", "stubble")),
    "Goatee": ("a goatee", ("(?:a )?goatee(?: beard)?",)),
    "Mustache": ("a mustache", ("(?:a )?mo?ustache",)),
    "No_Beard": (
        "a face without a beard",
        ("(?:face )?(?:without|no|not have) (?:a |any )?(?:beard|facial hair)", "clean shaven(?: face)?", "beardless"),
    ),
    "Arched_Eyebrows": _is("eyebrows", "arched"),
    "Bushy_Eyebrows": _is("eyebrows", "bushy"),
    "Bags_Under_Eyes": ("bags under the eyes", ("bags under (?:the |his |her |their )?eyes", "eye ?bags")),
    "Brown_Eyes": _is("eyes", "brown"),
    "Narrow_Eyes": _is("eyes", "narrow"),
    "Eyes_Open": _is("eyes", "open", "(?:wide )?open"),
    "Eyeglasses": ("eyeglasses", ("eyeglasses", "glasses", "spectacles")),
    "Sunglasses": ("sunglasses", ("sunglasses",)),
    "No_Eyewear": (
        "eyes without eyewear",
        ("(?:eyes )?(?:without|no|not wear|not wearing) (?:any )?(?:eyewear|glasses or sunglasses)",),
    ),
    "Big_Nose": _is("nose", "big", "big|large"),
    "Pointy_Nose": _is("nose", "pointy", "pointy|pointed"),
    "Big_Lips": _is("lips", "big", "big|full|thick"),
    "Mouth_Closed": _is("mouth", "closed", "closed|shut"),
    "Mouth_Slightly_Open": _is("mouth", "slightly open", "slightly open(?:ed)?"),
    "Mouth_Wide_Open": _is("mouth", "wide open", "wide open|open wide"),
    "Teeth_Not_Visible": (
        "a mouth without visible teeth",
        (
            "(?:mouth )?(?:without|no) (?:any )?(?:visible )?teeth(?: visible)?",
            "teeth (?:are )?(?:not visible|hidden|covered)",
        ),
    ),
    "Smiling": ("a smile", ("(?:a )?smile", "smiles", "smiling")),
    "Frowning": ("a frown", ("(?:a )?frown", "frowns", "frowning")),
    "Heavy_Makeup": ("heavy makeup", ("heavy make ?up",)),
    "Wearing_Necklace": ("a necklace", ("(?:a )?necklace",)),
    "Wearing_Necktie": ("a necktie", ("(?:a )?(?:neck)?tie",)),
    "Blurry": ("a blurry picture", ("(?:a )?blurr(?:y|ed)(?: (?:picture|image|photo))?",)),
    "Harsh_Lighting": ("harsh lighting", ("harsh light(?:ing)?", "lighting is harsh")),
    "Soft_Lighting": ("soft lighting", ("soft light(?:ing)?", "lighting is soft")),
    "Flash": ("the flash of a camera", ("(?:camera )?flash(?: of a camera)?",)),
    "Outdoor": ("an outdoor scene", ("(?:an )?outdoors?(?: scene)?", "outside")),
    "Color_Photo": ("a color photo", ("(?:a )?colou?r (?:photo|picture|image)",)),
    "Posed_Photo": ("a posed photo", ("(?:a )?posed (?:photo|picture|image)",)),
    "Baby": ("a baby", ("(?:a )?baby", "infant")),
    "Child": ("a child", ("(?:a )?child",)),
    "Youth": ("a youth", ("(?:a )?youth",)),
    "Young": ("a young person", ("(?:a )?young(?: (?:person|adult|face|woman|man))?",)),
    "Middle_Aged": ("a middle aged person", ("(?:a )?middle aged(?: (?:person|adult|face|woman|man))?",)),
    "Senior": ("a senior person", ("(?:a )?senior(?: (?:person|adult|citizen))?", "(?:an )?elderly(?: person)?")),
}


def attribute_item(name: str, words: Words) -> Boolean:
    """An attribute as a yes/no item of its own name."""
    text, nouns = words
    return Boolean(
        name=name,
        templates=(f"Does the picture show {text}?", f"Can {text} be seen?"),
        unseen=(f"Do you see {text}?",),
        text=text,
        nouns=nouns,
    )


TASK = Task(
    name="presence",
    metric="balanced_accuracy",
    items=tuple(attribute_item(name, words) for name, words in _WORDS.items()),
    use="what is to be seen of a face, and of the picture",
)
