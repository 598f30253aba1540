"""Train the digits CNN and write it as float and int8 .tflite, each checked on the held-out images.

    pip install tensorflow-cpu scikit-learn
    python examples/digits/make_model.py

Only this script needs TensorFlow (a 274 MB wheel); running the models does not. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from make_data import DEMO, split
from numpy.typing import NDArray

EPOCHS = 60
SEED = 7
Floats = NDArray[np.float32]


def network(tf: Any) -> Any:
    """float32 [n, 8, 8, 1] in 0..1 → probabilities float32 [n, 10]; about 38,000 parameters."""
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(24, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(48, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )


def augmented(tf: Any, images: Floats, labels: NDArray[np.int64]) -> Any:
    """Batches of 32: each image turned a little and moved by up to one pixel, new in every epoch."""
    change = tf.keras.Sequential(
        [
            tf.keras.layers.RandomRotation(0.03, fill_mode="constant", seed=SEED),
            tf.keras.layers.RandomTranslation(0.09, 0.09, fill_mode="constant", seed=SEED),
            tf.keras.layers.RandomZoom(0.08, fill_mode="constant", seed=SEED),
        ]
    )
    data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=SEED).batch(32)
    return data.map(lambda x, y: (change(x, training=True), y))


def convert(tf: Any, model: Any, representative: Floats | None = None) -> bytes:
    """The .tflite file; with ``representative`` images all of it in int8, inputs and outputs too."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if representative is not None:

        def samples() -> Iterator[list[Floats]]:
            for image in representative:
                yield [image[None]]

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = samples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def accuracy(tf: Any, content: bytes, images: Floats, labels: NDArray[np.int64]) -> float:
    """Share of images that the file's model names rightly, one by one, by the plain interpreter."""
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    right = 0
    for image, label in zip(images, labels, strict=True):
        value = image[None]
        if source["dtype"] == np.int8:
            scale, zero = source["quantization"]
            value = np.clip(np.rint(value / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(source["index"], value)
        interpreter.invoke()
        right += int(interpreter.get_tensor(sink["index"])[0].argmax()) == label
    return right / len(labels)


def main() -> None:
    """Train, convert, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tf = import_module("tensorflow")
    tf.keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    seen, seen_labels, held, held_labels = split()
    train: Floats = (seen[..., None] / 255).astype(np.float32)
    test: Floats = (held[..., None] / 255).astype(np.float32)

    model = network(tf)
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, EPOCHS * (len(train) // 32 + 1))
    model.compile(tf.keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(augmented(tf, train, seen_labels), epochs=EPOCHS, verbose=2)
    print(f"{model.count_params():,} parameters, trained on {len(train):,} images")
    for name, content in (("float", convert(tf, model)), ("int8", convert(tf, model, train[:500]))):
        path = out / f"digits-{name}.tflite"
        path.write_bytes(content)
        print(f"{path}: {len(content):,} bytes, {accuracy(tf, content, test, held_labels):.4f} of {len(test)} right")


if __name__ == "__main__":
    main()
