"""Make the demo's data: the held-out digits as a camera's video, a stack of frames, and their known labels.

    pip install scikit-learn av
    python examples/digits/make_data.py

Writes into ``nodes/demo``: ``digits.mkv`` (450 frames, 64×64 grey, lossless), ``digits.npz`` (the same frames at their own
8×8, with labels), ``digits.csv`` (the label of each frame) and ``labels.txt`` (the ten classes).
The data are UCI's "Optical Recognition of Handwritten Digits", as scikit-learn ships them: see README.md.
"""

from __future__ import annotations

import argparse
import csv
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEMO = Path(__file__).resolve().parents[2] / "nodes" / "demo"
HELD_OUT = 450
ENLARGE = 8
FPS = 30

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def split() -> tuple[Images, Labels, Images, Labels]:
    """Images uint8 [n, 8, 8] in 0..255 and labels int64 [n]: to train on (1,347), and held out (450).

    Held out are the last 450 in the order of the data set, which runs writer by writer: most of them were written by
    people whose hand the model has never seen. Nothing is drawn at random, so every run splits the same.
    """
    digits = import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    cut = len(images) - HELD_OUT
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def write_video(path: Path, images: Images) -> None:
    """Grey frames, each pixel enlarged to 8×8, coded without loss (FFV1 in Matroska)."""
    av = import_module("av")
    with av.open(str(path), "w") as container:
        # Bit-exact: no random ids and no encoder's version in the file, so that the same data make the same bytes.
        container.flags |= 0x400
        stream = container.add_stream("ffv1", rate=FPS, options={"level": "3", "coder": "1", "slices": "4"})
        stream.width, stream.height = images.shape[2] * ENLARGE, images.shape[1] * ENLARGE
        stream.pix_fmt = "gray"
        stream.time_base = Fraction(1, FPS)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image.repeat(ENLARGE, 0).repeat(ENLARGE, 1), format="gray")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    _, _, images, labels = split()
    write_video(out / "digits.mkv", images)
    np.savez_compressed(out / "digits.npz", images=images[..., None], labels=labels)
    with (out / "digits.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["frame", "label"])
        table.writerows(enumerate(labels.tolist()))
    (out / "labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    for name in ("digits.mkv", "digits.npz", "digits.csv", "labels.txt"):
        print(f"{out / name}: {(out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
