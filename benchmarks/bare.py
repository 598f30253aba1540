"""A model in a bare loop: ``python -m benchmarks.bare MODEL BATCH THREADS SECONDS`` prints items per second.

What a user would write without Penstock, and nothing else: set the input, invoke, get the output.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np


def measure(model: Path, batch: int, threads: int, seconds: float) -> float:
    """Items per second of LiteRT on random input that is ready in memory."""
    interpreter = import_module("ai_edge_litert.interpreter").Interpreter(str(model), num_threads=threads)
    source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    shape = (batch, *source["shape"][1:])
    interpreter.resize_tensor_input(source["index"], shape)
    interpreter.allocate_tensors()
    draw = np.random.default_rng(0)
    value = draw.integers(-128, 128, shape).astype(source["dtype"])
    if source["dtype"] == np.float32:
        value /= 128
    count, began = 0, 0.0
    for warm in (True, False):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < (seconds / 10 if warm else seconds):
            interpreter.set_tensor(source["index"], value)
            interpreter.invoke()
            interpreter.get_tensor(sink["index"])
            count += batch
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    path, size, cores, duration = sys.argv[1:]
    print(measure(Path(path), int(size), int(cores), float(duration)))
