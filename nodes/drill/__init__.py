"""``penstock drill``: a user's own topology, run in a scratch folder while things break, and a verdict on what it kept.

:mod:`nodes.drill.disguise` makes the topology that is run, :mod:`nodes.drill.schedule` draws what is done to it,
:mod:`nodes.drill.faults` has the faults, one file each, :mod:`nodes.drill.performance` runs it, and
:mod:`nodes.drill.verdict` judges.
"""
