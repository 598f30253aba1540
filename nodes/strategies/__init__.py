"""How a round's updates become the next model, one file a strategy; see :mod:`nodes.strategies._strategy`."""
