"""Serving: what a request may hold, how it is answered, the KServe server, and putting a model into service."""
