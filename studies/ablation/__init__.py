"""What each part of the recipe is worth: every variant trained from several seeds, compared seed by seed.

`facemllm ablate` is the door. It stands above the steps, as `workflow` does: it trains and measures with their code.
"""
