"""Scoring: one resumable runner, and the benchmarks that go through it."""
