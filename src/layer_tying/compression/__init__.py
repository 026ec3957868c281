"""Making a trained model smaller by sharing weights between its layers.

``sensitivity`` measures what sharing costs, ``grouping`` finds groups in what was measured,
``healing`` trains the tied model to do what the untouched one did, and ``compress`` is the three in
one call. The command adds a folder that it can go on from (``run``, ``source``, ``card``).
"""
