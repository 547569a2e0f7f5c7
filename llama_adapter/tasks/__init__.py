"""The papers' tasks for ViT, RoBERTa and CLIP: files, what a host is given, scores."""
