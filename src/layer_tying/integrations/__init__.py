"""Dynamic layer tying inside other training loops."""
