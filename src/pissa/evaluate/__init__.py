"""Judging models: tasks.py has the tasks by name; each reads problems from a file and gives one figure and its samples."""
