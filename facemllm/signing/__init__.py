"""Who decided what about which bytes, in signed statements, and what may be served because of it."""
