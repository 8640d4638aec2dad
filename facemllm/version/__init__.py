"""Data versions in a data repository of their own (git + DVC); the ledger of sources; what was forgotten."""
