"""The paper's experiments and published figures."""
