"""Names of facial attributes as the datasets that introduced them have them: CelebA's forty, MAAD-Face's forty-seven,
LFWA's seventy-three. Readers and tasks both speak them."""

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
