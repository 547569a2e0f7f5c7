"""The papers' tasks for ViT, RoBERTa and CLIP: their files, what a host is given, their scores."""
