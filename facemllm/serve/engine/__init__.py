"""Who computes answers, in which order, and how many at once."""
