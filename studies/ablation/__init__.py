"""What each part of the recipe is worth: every variant trained from several seeds, compared seed by seed."""
