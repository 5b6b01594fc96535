"""Data of the user: files and hub data become rows, rows become conversations and prompts; plain text becomes windows.

What calibration, training, evaluation and comparison all read, they read here.
"""
