"""How an update is made small on its way up, one file a compressor; see :mod:`nodes.compressors._compressor`."""
