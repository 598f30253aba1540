"""Backends of ``infer``: one runtime, one file; the file's name is the kind's."""
