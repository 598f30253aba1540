"""Make a small network for the digits that learns on the device: a .tflite file with training signatures.

    pip install tensorflow-cpu
    python examples/federated/make_litert_model.py

Only this script needs TensorFlow; what it writes runs in LiteRT by its built-in operators alone. Gradients are written out, as
those that TensorFlow would derive need operators that LiteRT lacks: the slope of ReLU is a mask.

The model keeps its weights in variables (``train``, ``infer``, ``get_weights``, ``set_weights``). With ``--stateless`` they go in
and out of every call, and ``get_weights`` has the first ones: no ``set_weights``, no variables, but a call takes longer.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
INPUTS, HIDDEN, CLASSES = 64, 32, 10
NAMES = ("w1", "b1", "w2", "b2")


def first_weights(seed: int) -> dict[str, Any]:
    """As the trainer ``mlp`` draws them: He's scale, biases zero."""
    drawn = np.random.default_rng(seed)
    w1 = drawn.standard_normal((INPUTS, HIDDEN)) * np.sqrt(2 / INPUTS)
    w2 = drawn.standard_normal((HIDDEN, CLASSES)) * np.sqrt(2 / HIDDEN)
    arrays = (w1, np.zeros(HIDDEN), w2, np.zeros(CLASSES))
    return {name: array.astype(np.float32) for name, array in zip(NAMES, arrays, strict=True)}


def forward(tf: Any, x: Any, weights: dict[str, Any]) -> tuple[Any, Any]:
    """(hidden activations, probabilities)."""
    hidden = tf.nn.relu(tf.matmul(x, weights["w1"]) + weights["b1"])
    return hidden, tf.nn.softmax(tf.matmul(hidden, weights["w2"]) + weights["b2"])


def step(tf: Any, x: Any, y: Any, rate: Any, weights: dict[str, Any], batch: int) -> tuple[Any, dict[str, Any]]:
    """One step of gradient descent: (mean cross-entropy before it, the new weights)."""
    hidden, answers = forward(tf, x, weights)
    # tf.one_hot is no built-in operator for every type of y; rows of the identity are
    right = tf.gather(tf.constant(np.eye(CLASSES, dtype=np.float32)), y)
    loss = -tf.reduce_mean(tf.math.log(tf.maximum(tf.reduce_sum(answers * right, axis=1), 1e-12)))
    up = (answers - right) / batch
    mask = tf.cast(hidden > 0, tf.float32)
    down = tf.matmul(up, tf.transpose(weights["w2"])) * mask
    slopes = {
        "w1": tf.matmul(tf.transpose(x), down),
        "b1": tf.reduce_sum(down, axis=0),
        "w2": tf.matmul(tf.transpose(hidden), up),
        "b2": tf.reduce_sum(up, axis=0),
    }
    return loss, {name: weights[name] - rate * slopes[name] for name in NAMES}


def stateless(tf: Any, first: dict[str, Any], batch: int) -> tuple[Any, dict[str, Any]]:
    """Weights go in and out of every call."""
    module = tf.Module()
    forms = [tf.TensorSpec(first[name].shape, tf.float32, name) for name in NAMES]
    x, y = tf.TensorSpec((batch, INPUTS), tf.float32, "x"), tf.TensorSpec((batch,), tf.int32, "y")
    rate = tf.TensorSpec((), tf.float32, "rate")

    def train(x: Any, y: Any, rate: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> dict[str, Any]:
        loss, after = step(tf, x, y, rate, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}, batch)
        return {"loss": loss, **after}

    def infer(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> dict[str, Any]:
        return {"output": forward(tf, x, {"w1": w1, "b1": b1, "w2": w2, "b2": b2})[1]}

    def get_weights() -> dict[str, Any]:
        return {name: tf.constant(first[name]) for name in NAMES}

    made = {
        "train": tf.function(train, input_signature=[x, y, rate, *forms]),
        "infer": tf.function(infer, input_signature=[x, *forms]),
        "get_weights": tf.function(get_weights, input_signature=[]),
    }
    return module, made


def with_variables(tf: Any, first: dict[str, Any], batch: int) -> tuple[Any, dict[str, Any]]:
    """The model keeps its weights."""
    module = tf.Module()
    module.kept = {name: tf.Variable(first[name], name=name) for name in NAMES}
    forms = [tf.TensorSpec(first[name].shape, tf.float32, name) for name in NAMES]
    x, y = tf.TensorSpec((batch, INPUTS), tf.float32, "x"), tf.TensorSpec((batch,), tf.int32, "y")
    rate = tf.TensorSpec((), tf.float32, "rate")

    def train(x: Any, y: Any, rate: Any) -> dict[str, Any]:
        loss, after = step(tf, x, y, rate, {name: tf.identity(v) for name, v in module.kept.items()}, batch)
        for name in NAMES:
            module.kept[name].assign(after[name])
        return {"loss": loss}

    def infer(x: Any) -> dict[str, Any]:
        return {"output": forward(tf, x, {name: tf.identity(v) for name, v in module.kept.items()})[1]}

    def get_weights() -> dict[str, Any]:
        return {name: tf.identity(module.kept[name]) for name in NAMES}

    def set_weights(w1: Any, b1: Any, w2: Any, b2: Any) -> dict[str, Any]:
        for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
            module.kept[name].assign(value)
        return {"done": tf.constant(1, tf.int32)}

    made = {
        "train": tf.function(train, input_signature=[x, y, rate]),
        "infer": tf.function(infer, input_signature=[x]),
        "get_weights": tf.function(get_weights, input_signature=[]),
        "set_weights": tf.function(set_weights, input_signature=forms),
    }
    return module, made


def convert(tf: Any, module: Any, signatures: dict[str, Any], *, variables: bool) -> bytes:
    """The .tflite file; fails where an operator is not built in."""
    for name, function in signatures.items():
        setattr(module, name, function)  # what is saved with a module must hang on it
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = variables
        made: bytes = converter.convert()
    return made


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stateless", action="store_true", help="weights go in and out of every call")
    parser.add_argument("--batch", type=int, default=32, help="rows of one call")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights")
    parser.add_argument("--output", type=Path, default=HERE / "digits-train.tflite")
    options = parser.parse_args()
    tf = import_module("tensorflow")
    make = stateless if options.stateless else with_variables
    data = convert(tf, *make(tf, first_weights(options.seed), options.batch), variables=not options.stateless)
    options.output.write_bytes(data)
    print(f"{options.output}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
