"""What travels and what is wired: message bodies, codec, topic names, topology, errors.

The ground storey. It imports neither :mod:`broker` nor :mod:`nodes` and does no I/O beyond
reading a topology file.
"""
