"""Readers of native dataset layouts, and the renderer of synthetic heads."""
