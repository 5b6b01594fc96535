"""The user's verbs on a live model: `adapt`, `load`, and saving by PEFT's own methods.

Everything below this room makes parts: splits, layers, files. Here they become a model that keeps its promise under
whatever another library calls on it (`guards.py`).
"""
