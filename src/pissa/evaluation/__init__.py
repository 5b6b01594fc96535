"""Judging models: a task (tasks.py) reads problems from a file and gives one figure and every sample."""
