"""What each part of the recipe is worth: every variant trained from several seeds, compared seed by seed.

`python -m studies.ablation` runs it. It stands above the steps, as `workflow` does: it trains and measures with their
code.
"""
