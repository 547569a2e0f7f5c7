"""Training of adapters and their baselines on ViT, RoBERTa, BERT and CLIP."""
