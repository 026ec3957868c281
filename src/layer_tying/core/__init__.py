"""Ties the layers of any torch model. Knows no transformers, no files and no policy."""
