"""Instruction data: records, the papers' prompt template, tokenised examples and label masks."""
