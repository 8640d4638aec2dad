"""Names of facial attributes that users may give labels for: CelebA's forty, MAAD-Face's and LFWA's further ones, and
those that the questions of `facemllm.tasks.attributes` are about."""

from facemllm.tables.vocabulary import CELEBA, LFWA_ONLY, MAAD_ONLY

ASKED = (
    *("Dark_Brown_Hair", "Red_Hair", "White_Hair", "Short_Hair", "Medium_Hair", "Long_Hair", "Buzz_Cut", "Hair_Bun"),
    *("Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes", "Full_Beard", "Sunglasses"),
)

ATTRIBUTES = tuple(dict.fromkeys((*CELEBA, *MAAD_ONLY, *LFWA_ONLY, *ASKED)))
