"""The paper's experiments and published figures, and what reproduces them.

rows         each experiment as a configuration
published    the figures that the paper gives
results      the results file of finished rows
seeds        means over seeds, and shares of the conventional run's figures
gates        which comparisons mean anything
reproduce    what trains the rows
"""
