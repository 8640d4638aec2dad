"""Figures from saved answers, without a model: below evaluation and promotion, which both stand on it."""
