"""Figures from saved answers: marks, uncertainty, fairness, consistency, comparison of two models. No model is loaded.

Below evaluation and promotion, which both stand on it.
"""
