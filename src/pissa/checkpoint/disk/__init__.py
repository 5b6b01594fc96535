"""Bytes that appear whole or not at all, and runs that go on where they stopped."""
