"""Experiments: problems whose answers are known, and comparisons of methods on them or on real data."""
