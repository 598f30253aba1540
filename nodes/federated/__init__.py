"""Federated learning: the two sides of a job as machines without I/O, what they say, and what carries them.

``coordinator`` (of ``federate``) and ``client`` (of ``train``) are given what arrived, what time it is and what was computed, and
answer with what to keep, to publish and to compute (:mod:`nodes.federated.machine`). ``party`` gives them a bus, a disk and a
thread; ``simulate`` gives a thousand of them a bus and a clock that are not real.
"""
