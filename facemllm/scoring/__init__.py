"""Figures from saved answers: marks, uncertainty, comparison of two models. No model is loaded here.

Below evaluation and promotion, which both stand on it.
"""
