"""How bytes move and are kept: the buses, the embedded broker, relays.

The first storey. It never knows a node kind, nor what a payload means, and never imports :mod:`nodes`.
"""
