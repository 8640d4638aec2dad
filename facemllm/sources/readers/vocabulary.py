"""Names of facial attributes that users may give labels for: CelebA's forty, MAAD-Face's further ones, and those that
the questions of `facemllm.tasks.attributes` are about."""

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

ASKED = (
    *("Dark_Brown_Hair", "Red_Hair", "White_Hair", "Short_Hair", "Medium_Hair", "Long_Hair", "Buzz_Cut", "Hair_Bun"),
    *("Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes", "Full_Beard", "Sunglasses"),
)

ATTRIBUTES = (*CELEBA, *MAAD_ONLY, *ASKED)
