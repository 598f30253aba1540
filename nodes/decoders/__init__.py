"""Decoders of ``infer``: from a model's tensors to predictions, one file each."""
