"""Bridges to other libraries: PEFT, transformers, lm-evaluation-harness; each imports its own."""
