"""Topics of the common items, from which the grammar of `paraphrases` words their questions. Sides are those of the
picture and stay words of their own, so that a mirrored picture only swaps them."""

from __future__ import annotations

from collections.abc import Mapping

from facemllm.tasks.paraphrases import Topic

_PERSON = "[the person|this person|the individual|the subject]"
_OWN = "[the person's|this person's|their]"
_HAS = "[does the person have|does this person have|do they have|do you see|can you see|can be seen|is visible]"
_HE_HAS = "[the person has|this person has|they have|you see|can be seen|is visible]"
_SEEN = "[can you see|do you see|can we see|does the person have|does this person have|do they have]"
_WORN = (
    "[is the person wearing|is this person wearing|does the person wear|does this person wear|are they wearing"
    "|does the person have|can you see|do you see]"
)
_IS_WORN = "[the person is wearing|this person is wearing|the person wears|they are wearing|this person has|you see]"


def _color(thing: str, are: str, shades: str) -> Topic:
    """The color of hair or eyes."""
    names = f"[the|the person's|their|this person's] {thing} [color|shade|colouring]"
    of = f"the [color|shade|tone] of [the|the person's|their|this person's] {shades}"
    return Topic(
        direct=(
            f"[what|which] color {are} [the person's|their|this person's|his or her] {shades}",
            f"[what|which] {thing} [color|shade] {_HAS}",
            f"[what|which] [shade|tone] {are} [the|the person's|their] {shades}",
            f"how would you describe [the|the person's|their] {thing} color",
            f"what color {shades} {_HAS}",
        ),
        clause=(
            f"[what|which] color [the|the person's|their] {shades} {are}",
            f"[what|which] {thing} [color|shade] {_HE_HAS}",
            f"what color {shades} {_HE_HAS}",
        ),
        noun=(names, of),
    )


def _kind(things: str, clause: str, direct: tuple[str, ...], noun: tuple[str, ...]) -> Topic:
    """A kind of thing that is worn or grown."""
    return Topic(
        direct=(f"[what|which] [kind|type|sort|style] of {things} {_HAS}", f"what {things} {_HAS}", *direct),
        clause=(f"[what|which] [kind|type|sort|style] of {things} {clause}", f"what {things} {clause}"),
        noun=(f"the [kind|type|sort|style] of {things}", *noun),
    )


def _there(things: str, extra: tuple[str, ...], *, worn: bool = False) -> Topic:
    """Whether a thing is there, or is worn: `things` with their article."""
    verbs, clauses = (_WORN, _IS_WORN) if worn else (_SEEN, "[the person has|this person has|they have|you see]")
    return Topic(
        direct=(
            f"{verbs} {things}",
            f"does [the picture|this photo|the image] show {things}",
            f"[can|could] {things} be [seen|made out]",
            *extra,
        ),
        clause=(f"[whether|if] {clauses} {things}", f"[whether|if] {things} can be seen"),
    )


_TURN = "[left or right|right or left|to the left or to the right|to the left or right|sideways]"
_HEAD = "[the head|the face|the person's head|their head|this head]"

TOPICS: Mapping[str, Topic] = {
    "hair_color": _color("hair", "is", "hair"),
    "eye_color": _color("eye", "are", "eyes"),
    "hair_style": Topic(
        direct=(
            f"[what|which] [hair style|hairstyle|haircut|kind of haircut|type of hairdo|hairdo] {_HAS}",
            f"how does {_PERSON} wear [the|their] hair",
            "how is [the person's|their|this person's] hair [worn|styled|cut|done]",
            "how long is [the|the person's|their|this person's] hair",
            "what length is [the|the person's|their] hair",
            "what is [the length|the cut] of [the|the person's|their] hair",
        ),
        clause=(
            f"[what|which] [hair style|hairstyle|haircut|hairdo] {_HE_HAS}",
            "how [the|the person's|their] hair is [worn|styled|cut|done]",
            "how long [the|the person's|their] hair is",
            f"how {_PERSON} wears [the|their] hair",
        ),
        noun=(
            "[the|the person's|their|this person's] [hair style|hairstyle|haircut|hairdo|hair length]",
            "the [style|cut|length] of [the|their] hair",
        ),
    ),
    "beard": _kind(
        "[beard|facial hair|beard or mustache|whiskers]",
        "[the person has|this person has|they have|you see|is worn|is there]",
        (
            f"how does {_PERSON} wear [the|their] [beard|facial hair]",
            f"what [beard|facial hair] style does {_PERSON} have",
            "what does [the person's|their|the] [beard|facial hair] look like",
            f"is {_PERSON} clean shaven or bearded",
        ),
        (
            "[the|the person's|their] [facial hair|beard|beard style|beard type]",
            "the [beard|facial hair] on [the|this] face",
        ),
    ),
    "eyewear": _kind(
        "[eyewear|glasses|spectacles|eyeglasses]",
        "[the person has|the person wears|this person wears|is worn|they have on|you see]",
        (
            f"[what|which] [glasses|eyewear|spectacles] does {_PERSON} wear",
            "[what|which] [glasses|eyewear|spectacles] is [the person|this person] wearing",
            f"is {_PERSON} wearing [glasses or sunglasses|any glasses, and which kind]",
            f"what is {_PERSON} wearing over [the|their] eyes",
            "what is [worn over|in front of|on] [the|their] eyes",
            f"does {_PERSON} wear [anything|something] over [the|their] eyes, and what",
        ),
        ("[the|the person's|their] [eyewear|glasses|spectacles|eyeglasses]", "what is worn [over|on] the eyes"),
    ),
    "Bangs": _there(
        "[bangs|a fringe|hair on the forehead|hair over the forehead|hair hanging over the forehead]",
        (
            "is there [a fringe|hair on the forehead|hair over the forehead]",
            "is the forehead covered by [bangs|hair|a fringe]",
            f"does {_PERSON} wear [the|their] hair [in bangs|with bangs|with a fringe]",
            "does the hair [fall|hang] [over|into|onto] the forehead",
        ),
    ),
    "Wearing_Hat": _there(
        "[a hat|a hat or cap|any hat|some kind of hat|headwear|a hat on the head]",
        (
            *("is there [a hat|any hat|a hat on the head|headwear]", f"does {_PERSON} have a hat on"),
            *("is the head covered by a hat", "is there anything worn on the head"),
        ),
        worn=True,
    ),
    "Wearing_Earrings": _there(
        "[earrings|any earrings|an earring|earrings in the ears|ear jewellery]",
        (
            "is anything worn [in|on] the ears",
            "are there [earrings|any earrings]",
            f"does {_PERSON} have earrings [in|on]",
        ),
        worn=True,
    ),
    "Wearing_Lipstick": _there(
        "[lipstick|any lipstick|lip color|some lipstick|lipstick on the lips]",
        (
            *("is there [lipstick|any lipstick|some lipstick]", f"does {_PERSON} have lipstick on"),
            "are the lips [painted|made up|colored with lipstick]",
        ),
        worn=True,
    ),
    "expression": Topic(
        direct=(
            "[what|which] [expression|emotion|feeling|mood|facial expression] "
            "[is on the face|does the person show|does this person show|can be seen|is visible|do you see|is it]",
            "how [does this person|does the person|do they|does the face] [feel|look|seem]",
            "what [mood|emotional state] is [the person|this person|the subject] in",
            "[what|which] [emotion|feeling|mood] does [the|this] [face|expression] [express|convey|suggest]",
            "what is [the person|this person|the face] [feeling|expressing|showing]",
            "what does [the|this] face [express|say about the mood]",
        ),
        clause=(
            "[what|which] [expression|emotion|feeling|mood] [the face shows|the person shows|is shown|you see]",
            "how [the person|this person|the face] [feels|looks|seems]",
            "what [the person|this person] [feels|is feeling|expresses]",
        ),
        noun=(
            "[the|the person's|this person's|their] [facial expression|expression|emotion|mood|feeling]",
            "the [emotion|expression|feeling|mood] [on the face|shown|of the face|of the person]",
        ),
    ),
    "age": Topic(
        direct=(
            f"[how|about how|roughly how] old is {_PERSON}",
            f"how old does {_PERSON} [look|seem|appear]",
            f"how many years old is {_PERSON}",
            f"[about what|what|around what] age is {_PERSON}",
            f"what [is|would you guess is] the [age|approximate age|apparent age] of {_PERSON}",
            f"what age would you [give|guess for] {_PERSON}",
            "how old would you [say|guess|think] [they are|the person is|this person is]",
        ),
        clause=(
            f"how old {_PERSON} [is|looks|seems|appears]",
            f"what age {_PERSON} [is|looks]",
            f"how many years old {_PERSON} is",
        ),
        noun=(
            "[the|the person's|this person's|their] [age|apparent age|age in years|approximate age|estimated age]",
            f"the age of {_PERSON}",
        ),
    ),
    "gender": Topic(
        direct=(
            f"is {_PERSON} [a woman or a man|a man or a woman|female or male|male or female]",
            "is [this|it|that] [a man or a woman|a male or a female|a lady or a gentleman|male or female]",
            f"[what|which] [gender|sex] is {_PERSON}",
            f"[what|which] [gender|sex] does {_PERSON} have",
            "do [you|we] see [a man or a woman|a woman or a man]",
            "does the [picture|photo|image] show [a man or a woman|a woman or a man|a male or a female]",
        ),
        clause=(
            f"[whether|if] {_PERSON} is [a woman or a man|a man or a woman|female or male]",
            "[whether|if] this is [a man or a woman|a woman or a man|a lady or a gentleman]",
            f"[what|which] [gender|sex] {_PERSON} [is|has]",
        ),
        noun=("[the|the person's|this person's|their] [gender|sex]", f"the [gender|sex] of {_PERSON}"),
    ),
    "yaw": Topic(
        direct=(
            f"how [much|far|strongly] is {_HEAD} [turned|rotated] {_TURN}",
            f"how many degrees is {_HEAD} [turned|rotated] {_TURN}",
            f"[which|what] [way|direction] is {_HEAD} [turned|facing|rotated], and [how far|by how much]",
            f"by how [much|many degrees] is {_HEAD} [turned|rotated] {_TURN}",
            f"[at|by] what angle is {_HEAD} [turned|rotated] {_TURN}",
            f"what is the yaw of {_HEAD}",
        ),
        clause=(
            f"how [far|much] {_HEAD} is [turned|rotated] {_TURN}",
            f"[which|what] way {_HEAD} is [turned|facing], and [how far|by how much]",
        ),
        noun=("the [yaw|yaw angle|turn|rotation] of [the|this|their] head", "the head's [yaw|yaw angle|turn]"),
    ),
    "pitch": Topic(
        direct=(
            f"how [much|far|strongly] is {_HEAD} [raised or lowered|lowered or raised|tilted up or down]",
            f"how many degrees is {_HEAD} [raised or lowered|tilted up or down|pointing up or down]",
            f"is {_HEAD} [raised or lowered|tilted up or down|looking up or down], and [how far|by how much]",
            f"[how far|by how much] [up or down] does {_PERSON} hold [the|their] head",
            f"by what angle is {_HEAD} [raised or lowered|tilted up or down|nodded]",
            f"what is the pitch of {_HEAD}",
        ),
        clause=(
            f"how [far|much] {_HEAD} is [raised or lowered|lowered or raised|tilted up or down]",
            f"[whether|if] {_HEAD} is [raised or lowered|tilted up or down], and [how far|by how much]",
        ),
        noun=("the [pitch|pitch angle|nod] of [the|this|their] head", "the head's [pitch|pitch angle]"),
    ),
    "roll": Topic(
        direct=(
            f"how [much|far|strongly] is {_HEAD} [tilted|leaning] to [one|the] side",
            f"how [much|far] does {_HEAD} lean to [one|the] side",
            f"how many degrees is {_HEAD} [tilted|leaning] [sideways|to one side|to one shoulder]",
            f"[which|what] [way|side|shoulder] does {_HEAD} lean [to|towards], and [how far|by how much]",
            f"[to which|towards which] [side|shoulder] is {_HEAD} [tilted|leaning], and [how far|by how much]",
            f"by how [much|many degrees] is {_HEAD} tilted [sideways|to one side|to one shoulder|to the left or right]",
            f"what is the roll of {_HEAD}",
        ),
        clause=(
            f"how [far|much] {_HEAD} [leans|tilts|is tilted] [sideways|to one side|to the left or right]",
            f"[which|what] [way|side] {_HEAD} leans, and [how far|by how much]",
        ),
        noun=(
            "the [roll|roll angle|sideways tilt|lean] of [the|this|their] head",
            "the head's [roll|roll angle|sideways tilt]",
        ),
    ),
    "caption": Topic(
        orders=(
            "[describe|please describe|sketch] [this|the] [face|person|individual] [briefly|in a sentence|in words]",
            "[describe|please describe] [what you see|the photo|the image|what the picture shows]",
            "[tell me|please tell me|say] [what you see|what this person looks like|what the face looks like]",
            "[give|write|please write] [a short|a brief|a] description of [the|this] [face|person|photo]",
            "[caption|please caption] [this|the] [picture|photo|image]",
        ),
        direct=(
            "[can|could] you describe [the|this] [face|person|picture]",
            "what do you see [on this face|in the image]",
            "how would you describe [this|the] [face|person]",
            "what does [the|this] [face|person|individual] look like",
            "who [is to be seen|can be seen], in words",
        ),
    ),
}
"""Item name -> its topic."""
