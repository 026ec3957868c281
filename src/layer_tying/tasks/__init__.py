"""Data and a model make a loss and scores."""
