"""Texts, tokens, images, GLUE, generated sequences, and batches. No torch."""
