"""Decide which layers share weights."""
