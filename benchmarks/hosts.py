"""The papers' tables for ViT, RoBERTa and CLIP in kind, on a CPU: `python -m benchmarks.hosts`."""
