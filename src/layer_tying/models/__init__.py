"""Transformers that are built already tied."""
