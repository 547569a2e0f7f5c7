"""Measurements behind the README's numbers, each run by hand, its results committed beside it."""
