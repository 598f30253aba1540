"""Decoders on tensors made by hand; suppression against the plainest possible one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes import kinds
from nodes.backends._backend import Spec
from nodes.decoders._boxes import corners, overlap, suppress
from nodes.decoders._decoder import Decoder
from nodes.decoders.classification import activated
from schemas.errors import ConfigError
from schemas.messages import Array
from schemas.problems import validated

LETTERS = ["a", "b", "c"]


def spec(*shape: int, name: str = "out") -> Spec:
    return Spec(name, shape, "float32")


def decoder(kind: str, labels: Sequence[str] = (), top: int = 1, **config: Any) -> Decoder:
    module = kinds.module("decoder", kind)
    made = module.build(validated(module.Config, config), labels, top)
    assert isinstance(made, Decoder)
    return made


def floats(*values: Any) -> Array:
    return np.array(values, np.float32)


# -- classification ------------------------------------------------------------------------------------------------


def test_the_best_classes_best_first_and_the_first_of_equals() -> None:
    it = decoder("classification", LETTERS, top=2, activation="none")
    it.check([spec(3)])
    one, two, three = it.decode({"out": floats([0.1, 0.7, 0.2], [0.4, 0.2, 0.4], [0, 0, 0])}, [(1, 1)] * 3)
    assert (one.labels, one.scores.tolist()) == (["b", "c"], pytest.approx([0.7, 0.2]))
    assert two.labels == ["a", "c"]
    assert three.labels == ["a", "b"]
    assert one.boxes is None
    assert one.scores.dtype == np.float32


def test_more_than_there_are_is_all() -> None:
    it = decoder("classification", top=9, activation="none")
    it.check([spec(1, 1, 3)])  # axes of one, as some models end
    (answer,) = it.decode({"out": floats([[[0.5, 0.2, 0.3]]])}, [(1, 1)])
    assert answer.labels == ["0", "2", "1"]


def test_one_number_is_the_second_of_two_classes() -> None:
    it = decoder("classification", ["good", "bad"], top=2)
    it.check([spec(1)])
    it.tune({"out": floats([0.2], [0.9])})
    (answer,) = it.decode({"out": floats([0.75])}, [(1, 1)])
    assert (answer.labels, answer.scores.tolist()) == (["bad", "good"], [0.75, 0.25])
    it.tune({"out": floats([-3.0], [4.0])})
    (answer,) = it.decode({"out": floats([0.0])}, [(1, 1)])
    assert answer.scores.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("trial", "given_", "expected"),
    [
        ([[0.2, 0.8], [0.5, 0.5]], [0.9, 0.1], [0.9, 0.1]),
        ([[0.9, 0.8], [0.0, 0.1]], [0.9, 0.8], [0.9, 0.8]),  # several labels may hold
        ([[-1.0, 0.8], [0.5, 0.5]], [0.0, 0.0], [0.5, 0.5]),
        ([[3.0, 0.8], [0.5, 0.5]], [0.0, -np.inf], [1.0, 0.0]),
    ],
)
def test_the_activation_is_found_out(trial: Any, given_: Any, expected: Any) -> None:
    it = decoder("classification", ["a", "b"], top=2)
    it.check([spec(2)])
    it.tune({"out": np.array(trial, np.float32)})
    (answer,) = it.decode({"out": floats(given_)}, [(1, 1)])
    assert answer.scores.tolist() == pytest.approx(expected)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=8))
def test_softmax_and_sigmoid_stay_in_range(values: list[float]) -> None:
    for activation in ("softmax", "sigmoid"):
        scores = activated(floats(values), activation)
        assert np.isfinite(scores).all()
        assert scores.min() >= 0
        assert scores.max() <= 1
        if activation == "softmax":
            assert scores.sum() == pytest.approx(1, abs=1e-5)
            assert scores[0, int(np.argmax(values))] == scores.max()


# -- regression and raw --------------------------------------------------------------------------------------------


def test_numbers_by_name_in_their_unit() -> None:
    it = decoder("regression", ["heat", "flow"], scale=10, offset=-1)
    it.check([spec(2)])
    one, two = it.decode({"out": floats([1, 2], [3, 4])}, [(1, 1)] * 2)
    assert one.values is not None
    assert two.values is not None
    assert {k: v.tolist() for k, v in one.values.items()} == {"heat": [9], "flow": [19]}
    assert {k: v.tolist() for k, v in two.values.items()} == {"heat": [29], "flow": [39]}
    assert (one.labels, one.scores.size) == ([], 0)


def test_a_single_number_is_value() -> None:
    it = decoder("regression")
    it.check([spec()])
    (answer,) = it.decode({"out": floats(5)}, [(1, 1)])
    assert answer.values is not None
    assert answer.values["value"].tolist() == [5]


@pytest.mark.parametrize("names", [[], ["one"], ["one", "two", "three"]])
def test_every_number_needs_its_name(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="answers 2 numbers"):
        decoder("regression", names).check([spec(2)])


def test_raw_passes_the_named_outputs_on() -> None:
    it = decoder("raw", outputs=["b"])
    it.check([spec(2, name="a"), spec(2, 2, name="b")])
    one, two = it.decode({"a": floats([0, 0], [0, 0]), "b": np.arange(8).reshape(2, 2, 2)}, [(1, 1)] * 2)
    assert one.values is not None
    assert two.values is not None
    assert list(one.values) == ["b"]
    assert two.values["b"].tolist() == [[4, 5], [6, 7]]


# -- boxes ---------------------------------------------------------------------------------------------------------


def plain_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(wide, 0) * max(high, 0)
    union = max(a[2] - a[0], 0) * max(a[3] - a[1], 0) + max(b[2] - b[0], 0) * max(b[3] - b[1], 0) - common
    return common / union if union > 0 else 0.0


def plain_suppression(
    boxes: list[list[float]], scores: list[float], classes: list[int] | None, limit: float, most: int
) -> list[int]:
    """By the book: walk from the best down, keep what no kept one covers."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        rivals = [j for j in kept if classes is None or classes[i] == classes[j]]
        if all(plain_overlap(boxes[i], boxes[j]) <= limit for j in rivals):
            kept.append(i)
    return kept[:most]


BOX = st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: [float(v) for v in b])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    rows=st.lists(st.tuples(BOX, st.integers(0, 8).map(lambda v: v / 8), st.integers(0, 2)), max_size=24),
    limit=st.sampled_from([0.0, 0.125, 0.3, 0.5, 1.0]),
    most=st.integers(1, 24),
    by_class=st.booleans(),
)
def test_suppression_is_the_plain_one(
    rows: list[tuple[list[float], float, int]], limit: float, most: int, by_class: bool
) -> None:
    boxes, scores, classes = ([row[i] for row in rows] for i in range(3))
    table = np.array(boxes, np.float64).reshape(-1, 4)
    found = suppress(table, np.array(scores), np.array(classes) if by_class else None, limit, most)
    assert found.tolist() == plain_suppression(boxes, scores, classes if by_class else None, limit, most)  # type: ignore[arg-type]
    for box in table:
        np.testing.assert_allclose(overlap(box, table), [plain_overlap(list(box), b) for b in boxes], atol=1e-12)  # type: ignore[arg-type]


def test_corners_of_a_centre_and_a_size() -> None:
    assert corners(floats([5, 6, 4, 2])).tolist() == [[3, 5, 7, 7]]


YOLO = [  # cx, cy, w, h, score of a, b, c
    [0.5, 0.5, 0.2, 0.4, 0.9, 0.1, 0.0],
    [0.5, 0.5, 0.2, 0.4, 0.8, 0.1, 0.0],  # the same thing again
    [0.5, 0.5, 0.2, 0.4, 0.1, 0.7, 0.0],  # the same place, another class
    [0.0, 0.0, 0.4, 0.4, 0.0, 0.0, 0.6],  # over the corner of the picture
    [0.2, 0.8, 0.1, 0.1, 0.3, 0.2, 0.1],  # too faint
    [0.9, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2],
    [0.9, 0.3, 0.1, 0.1, 0.2, 0.2, 0.2],
    [0.9, 0.5, 0.1, 0.1, 0.2, 0.2, 0.2],
]
EXPECTED = [
    ("a", 0.9, [40.0, 15.0, 60.0, 35.0]),
    ("b", 0.7, [40.0, 15.0, 60.0, 35.0]),
    ("c", 0.6, [0.0, 0.0, 20.0, 10.0]),
]


def check_answer(it: Decoder, outputs: dict[str, Array], expected: list[tuple[str, float, list[float]]]) -> None:
    (answer,) = it.decode(outputs, [(100, 50)])
    assert answer.labels == [label for label, _, _ in expected]
    np.testing.assert_allclose(answer.scores, [score for _, score, _ in expected], atol=1e-6)
    assert answer.boxes is not None
    assert answer.boxes.dtype == answer.scores.dtype == np.float32
    np.testing.assert_allclose(answer.boxes, [box for _, _, box in expected], atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", ["auto", "yolo"])
def test_yolo(turned: bool, form: str) -> None:
    table = floats(*YOLO)
    table = table.T if turned else table
    it = decoder("detection", LETTERS, format=form)
    it.check([spec(*table.shape)])
    check_answer(it, {"out": table[None]}, EXPECTED)


def test_yolo_across_classes_and_at_most() -> None:
    across = decoder("detection", LETTERS, across=True)
    across.check([spec(8, 7)])
    check_answer(across, {"out": floats(YOLO)}, [EXPECTED[0], EXPECTED[2]])
    most = decoder("detection", LETTERS, most=2)
    most.check([spec(8, 7)])
    check_answer(most, {"out": floats(YOLO)}, EXPECTED[:2])


def test_yolo_in_pixels() -> None:
    table = floats(*YOLO)
    table[:, :4] *= [100, 50, 100, 50]
    it = decoder("detection", LETTERS, coordinates="pixels")
    it.check([spec(*table.shape)])
    check_answer(it, {"out": table[None]}, EXPECTED)


def test_yolo5_multiplies_by_objectness() -> None:
    rows = [[*r[:4], 0.5, *(min(2 * s, 1.0) for s in r[4:])] for r in YOLO]
    it = decoder("detection", LETTERS, threshold=0.45)
    it.check([spec(9, 8)])
    rows.append([0.9, 0.9, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0])  # sure of the class, not that there is something
    check_answer(it, {"out": floats(rows)}, [(label, 0.5, box) for label, _, box in EXPECTED])


def test_rows() -> None:
    rows = [[0.4, 0.3, 0.6, 0.7, 0.9, 0], [0.4, 0.3, 0.6, 0.7, 0.7, 1], [-0.2, -0.2, 0.2, 0.2, 0.6, 2]]
    rows += [[0, 0, 0, 0, 0, 0]] * 7
    it = decoder("detection", LETTERS, format="rows")
    it.check([spec(10, 6)])
    check_answer(it, {"out": floats(rows)}, EXPECTED)


BOXES = floats([[0.3, 0.4, 0.7, 0.6], [0.3, 0.4, 0.7, 0.6], [-0.2, -0.2, 0.2, 0.2], [0, 0, 1, 1]])
CLASSES, SCORES, COUNT = floats([0, 1, 2, 0]), floats([0.9, 0.7, 0.6, 0.99]), floats([3])


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("P", "P:1", "P:2", "P:3"), {}),
        (("output_3", "output_2", "output_1", "output_0"), {}),
        (("detection_boxes", "detection_classes", "detection_scores", "num_detections"), {}),
        (("w", "z", "y", "x"), {"outputs": {"boxes": "w", "classes": "z", "scores": "y", "count": "x"}}),
    ],
)
def test_ssd_by_whatever_names(names: tuple[str, ...], config: dict[str, Any]) -> None:
    arrays = dict(zip(names, (BOXES[0], CLASSES[0], SCORES[0], COUNT), strict=True))
    specs = [spec(*a.shape[:-1] if n == names[3] else a.shape, name=n) for n, a in arrays.items()]
    for order in (specs, specs[::-1], [specs[2], specs[0], specs[3], specs[1]]):
        it = decoder("detection", LETTERS, **config)
        it.check(order)
        check_answer(it, {name: array[None] for name, array in arrays.items()}, EXPECTED)


def test_ssd_without_a_count_and_with_a_class_that_has_no_label() -> None:
    it = decoder("detection", ["a"], outputs={"boxes": "w", "classes": "z", "scores": "y"})
    it.check([spec(4, 4, name="w"), spec(4, name="z"), spec(4, name="y")])
    (answer,) = it.decode({"w": BOXES, "z": CLASSES, "y": SCORES}, [(100, 50)])
    assert answer.labels == ["a", "a", "1", "2"]


def test_a_picture_full_of_boxes_is_bounded() -> None:
    draw = np.random.default_rng(0)
    table = draw.random((20_000, 7), np.float32)
    it = decoder("detection", LETTERS, threshold=0, iou=1.0, most=10_000)
    it.check([spec(20_000, 7)])
    (answer,) = it.decode({"out": table[None]}, [(100, 50)])
    assert len(answer.labels) == 3000
    assert answer.scores.min() >= np.sort(table[:, 4:].max(axis=1))[-3000]


@pytest.mark.parametrize(
    ("labels", "config", "outputs", "words"),
    [
        ([], {}, [spec(8, 7)], "without labels"),
        (["x"] * 2, {}, [spec(100, 6)], "may be of the formats rows, yolo"),
        (["x"], {}, [spec(100, 6)], "may be of the formats rows, yolo5"),
        (["x"] * 9, {"format": "yolo"}, [spec(100, 6)], "yolo: 13"),
        ([], {"format": "rows"}, [spec(100, 7)], "not of the format rows"),
        ([], {"format": "ssd"}, [spec(4, 4)], "needs four outputs"),
        ([], {"format": "ssd"}, [spec(4, name=n) for n in "abcd"], "cannot tell ssd's outputs"),
        ([], {"outputs": {"boxes": "a", "classes": "b"}}, [spec(4, name=n) for n in "abcd"], "has the scores"),
        ([], {"outputs": {"boxes": "nix"}}, [spec(4, name=n) for n in "abcd"], "no output 'nix'"),
        ([], {}, [spec(4, name="a"), spec(4, name="b")], "has 2 outputs"),
    ],
)
def test_outputs_that_do_not_fit_detection(labels: list[str], config: Any, outputs: list[Spec], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decoder("detection", labels, **config).check(outputs)
    assert words in str(caught.value)
