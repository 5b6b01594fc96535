"""Judging models: answers.py reads a final number, generate.py writes solutions and counts the right ones."""
