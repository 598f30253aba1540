"""The faults of a drill, one file each; see :mod:`nodes.drill.fault` for what such a file has."""
