"""The papers' tasks for ViT, RoBERTa and CLIP: files, inputs of a host, scores."""
