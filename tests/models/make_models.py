"""Make the small models of the tests; each does one thing that a test needs. They are kept beside this script.

pip install tensorflow-cpu
python tests/models/make_models.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SEED = 3


def main() -> None:
    """Write them all."""
    tf = import_module("tensorflow")
    draw = np.random.default_rng(SEED)
    weights = tf.constant(draw.normal(size=(4, 3)).astype("float32"))
    bias = tf.constant(draw.normal(size=3).astype("float32"))

    def logits(x: Any) -> Any:
        return {"logits": tf.matmul(x, weights) + bias}

    def spec(*shape: int | None, name: str = "x") -> Any:
        return tf.TensorSpec(shape, tf.float32, name=name)

    def write(name: str, function: Callable[..., Any], *specs: Any, **settings: Any) -> None:
        module = tf.Module()
        module.serve = tf.function(function, input_signature=list(specs))
        concrete = module.serve.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
        for key, value in settings.items():
            setattr(converter, key, value)
        content = converter.convert()
        (HERE / f"{name}.tflite").write_bytes(content)
        print(f"{name}: {len(content):,} bytes")

    write("logits", logits, spec(None, 4))
    write("fixed", logits, spec(1, 4))
    write("four", logits, spec(4, 4))
    write("vector", lambda x: {"sums": tf.reshape(tf.reduce_sum(tf.reshape(x, (4, 2)), axis=0), (1, 2))}, spec(8))
    # 0 / 0 is not a number.
    write("ratio", lambda x: {"ratio": x[:, :1] / x[:, 1:]}, spec(None, 2))
    write("chance", lambda x: {"chance": tf.sigmoid(tf.reduce_sum(x, axis=1, keepdims=True))}, spec(None, 4))
    write("pair", lambda a, b: {"sum": a + b, "product": a * b}, spec(None, 2, name="a"), spec(None, 2, name="b"))

    def samples() -> Iterator[list[Any]]:
        for _ in range(100):
            yield [draw.uniform(-2, 2, (1, 4)).astype("float32")]

    for kind in (tf.uint8, tf.int8):
        write(
            f"logits-{kind.name}",
            logits,
            spec(None, 4),
            optimizations=[tf.lite.Optimize.DEFAULT],
            representative_dataset=samples,
            inference_input_type=kind,
            inference_output_type=kind,
        )

    # Detectors whose answers follow from the picture: its brightest value scales every score.
    boxes = draw.uniform(0, 0.5, (1, 6, 4))
    boxes[..., 2:] += 0.4
    classes = tf.constant(draw.integers(0, 3, (1, 6)).astype("float32"))
    scores = tf.constant(np.sort(draw.uniform(0.2, 1, (1, 6)))[:, ::-1].astype("float32"))
    corners = tf.constant(boxes.astype("float32"))

    def ssd(image: Any) -> Any:
        light = tf.reduce_max(image)
        # The names sort as they stand, so the order of outputs is: boxes, classes, scores, count.
        return {
            "o0": corners + 0 * light,
            "o1": classes + 0 * light,
            "o2": scores * light,
            "o3": tf.fill((1,), 5.0) + 0 * light,
        }

    write("ssd", ssd, spec(1, 16, 24, 3, name="image"))
    table = draw.uniform(0.1, 0.9, (1, 4 + 3, 40))
    table[:, 2:4] *= 0.4
    rows = tf.constant(table.astype("float32"))

    def yolo(image: Any) -> Any:
        light = tf.reduce_max(image, axis=(1, 2, 3), keepdims=False)[:, None, None]
        return {"rows": tf.concat([rows[:, :4] + 0 * light, rows[:, 4:] * light], axis=1)}

    write("yolo", yolo, spec(None, 16, 24, 3, name="image"))


if __name__ == "__main__":
    main()
