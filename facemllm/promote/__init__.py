"""From an evaluated model to one that may serve: gate, registry, the decision of a named person."""
