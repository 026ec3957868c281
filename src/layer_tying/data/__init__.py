"""Texts, tokens, images, GLUE and batches. No torch."""
