"""``infer`` on plain values: real models, no bus."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nodes.backends._backend import Quantisation, Scaling, Signature, Spec, quantise
from nodes.features import Gatherer
from nodes.infer import Config, build
from nodes.inference import Infer
from nodes.loaded import sizes
from nodes.operator import Context, Emit
from schemas.codec import decode, encode
from schemas.errors import PenstockError
from schemas.messages import Array, Body, Event, Frame, Message, Model, Predictions, Readings, Tensors

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nodes" / "demo"
MODELS = ROOT / "tests" / "models"
BORN = 1_700_000_000_000_000_000

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")


def context(base: Path = MODELS) -> Context:
    return Context("line", "infer", base, base)


def opened(base: Path = MODELS, **config: Any) -> Infer:
    made = Config.model_validate(config)
    made.check(context(base))
    operator = build(made, context(base))
    assert isinstance(operator, Infer)
    operator.open()
    return operator


def message(body: Body, ident: str = "cam:1:0", *, time: int = 7, born: int = 0) -> Message:
    return Message(ident, "cam", time, body, None, born)


def run(operator: Infer, messages: Sequence[Message]) -> Emit:
    emit = Emit()
    operator.process(list(messages), "cam.out", emit)
    return emit


def predicted(emit: Emit) -> list[Predictions]:
    bodies = [m.body for m in emit.messages()]
    assert not emit.dead, emit.dead
    assert all(isinstance(b, Predictions) for b in bodies)
    return [b for b in bodies if isinstance(b, Predictions)]


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(DEMO / "digits.npz") as stack:
        return stack["images"], stack["labels"]


def digit_messages() -> list[Message]:
    images, labels = digits()
    return [
        message(
            Frame(data=(image / 255).astype(np.float32), attributes={"label": str(label)}),
            f"cam:1:{i}",
            time=i,
            born=BORN,
        )
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def bare(path: Path, inputs: Array) -> Array:
    """The interpreter alone, one by one; int8 in and out by hand."""
    runner = interpreter.Interpreter(str(path), num_threads=1)
    runner.allocate_tensors()
    source, sink = runner.get_input_details()[0], runner.get_output_details()[0]
    answers = []
    for item in inputs:
        value = item[None]
        if source["dtype"] != np.float32:
            scale, zero = source["quantization"]
            limits = np.iinfo(source["dtype"])
            value = np.clip(np.rint(value / np.float32(scale)) + zero, limits.min, limits.max).astype(source["dtype"])
        runner.set_tensor(source["index"], value)
        runner.invoke()
        answer = runner.get_tensor(sink["index"])[0]
        if sink["dtype"] != np.float32:
            scale, zero = sink["quantization"]
            answer = (answer.astype(np.float32) - zero) * np.float32(scale)
        answers.append(answer)
    return np.stack(answers)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_all_held_out_digits_as_the_interpreter_alone_answers(kind: str) -> None:
    operator = opened(DEMO, model=f"digits-{kind}.tflite", labels="labels.txt", top=10)
    messages = digit_messages()
    answers = predicted(run(operator, messages))
    images, labels = digits()
    direct = bare(DEMO / f"digits-{kind}.tflite", (images / 255).astype(np.float32))
    assert len(answers) == len(messages) == 450
    for answer, expected in zip(answers, direct, strict=True):
        scores = np.empty(10, np.float32)
        scores[[int(name) for name in answer.labels]] = answer.scores
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        assert answer.labels[0] == str(expected.argmax())
    right = sum(a.labels[0] == str(label) for a, label in zip(answers, labels, strict=True))
    assert right == (direct.argmax(axis=1) == labels).sum()
    assert right / 450 >= 0.97


@pytest.mark.parametrize("kind", ["float", "int8"])
@settings(deadline=None, derandomize=True, max_examples=12)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), most=st.integers(1, 20))
def test_any_batching_gives_the_same_predictions(kind: str, cuts: list[int], most: int) -> None:
    operator = opened(DEMO, model=f"digits-{kind}.tflite", batch={"max": most})
    messages = digit_messages()[:60]
    alone = [predicted(run(operator, [m]))[0] for m in messages]
    edges = [0, *sorted(cuts), 60]
    together: list[Message] = []
    for low, high in pairwise(edges):
        together += run(operator, messages[low:high]).messages()
    assert [m.id for m in together] == [m.id for m in messages]
    for one, many in zip(alone, together, strict=True):
        assert isinstance(many.body, Predictions)
        assert one.labels == many.body.labels
        np.testing.assert_allclose(one.scores, many.body.scores, atol=1e-6)


def test_a_prediction_says_what_was_seen_by_which_model_and_when() -> None:
    operator = opened(DEMO, model="digits-int8.tflite", labels="labels.txt")
    (sent,) = run(operator, digit_messages()[5:6]).messages()
    body = sent.body
    assert isinstance(body, Predictions)
    assert (sent.id, sent.source, sent.time, sent.born, body.seen) == ("cam:1:5", "cam", 5, BORN, "cam:1:5")
    assert body.attributes == {"label": str(digits()[1][5])}
    assert body.times["ingest"] == BORN
    assert body.times["infer"] > BORN
    assert body.model.name == "digits-int8"
    assert len(body.model.digest) == 64
    assert body.model.version == body.model.digest[:8]
    assert decode(encode(sent)).body == body or np.array_equal(decode(encode(sent)).body.scores, body.scores)  # type: ignore[union-attr]


def test_name_and_version_may_be_given() -> None:
    operator = opened(model="logits.tflite", name="belt", version="4")
    assert (operator.model.name, operator.model.version) == ("belt", "4")


@pytest.mark.parametrize(
    ("data", "layout", "reason", "words"),
    [
        (np.zeros((9, 8, 1), np.float32), "HWC", "bad-shape", "[9, 8, 1]; the model takes [8, 8, 1]"),
        (np.zeros((8, 8, 3), np.float32), "HWC", "bad-shape", "the model takes [8, 8, 1]"),
        (np.zeros((64,), np.float32), "T", "bad-shape", "the model takes [8, 8, 1]"),
        (np.zeros((0, 8, 1), np.float32), "HWC", "bad-shape", "the model takes [8, 8, 1]"),
        (np.zeros((8, 8, 1), np.uint8), "HWC", "bad-dtype", "uint8; the model takes float32; scale it"),
        (np.zeros((8, 8, 1), np.complex64), "HWC", "bad-dtype", "complex64"),
        (b"\xff\xd8", "HWC", "bad-encoding", "decode it in preprocess"),
        (np.full((8, 8, 1), np.nan, np.float32), "HWC", "nan-input", "NaN"),
    ],
)
def test_a_frame_that_does_not_fit_is_rejected_and_the_others_pass(
    data: Array | bytes, layout: str, reason: str, words: str
) -> None:
    operator = opened(DEMO, model="digits-float.tflite")
    good = digit_messages()[:2]
    encoding = "jpeg" if isinstance(data, bytes) else "raw"
    bad = message(Frame(data=data, layout=layout, encoding=encoding), "bad")
    emit = run(operator, [good[0], bad, good[1]])
    assert [m.id for m in emit.messages()] == ["cam:1:0", "cam:1:1"]
    ((dead, why, detail),) = emit.dead
    assert (dead, why) == (bad, reason)
    assert words in detail


def test_axes_of_one_may_be_missing_and_floats_of_any_width_are_taken() -> None:
    operator = opened(DEMO, model="digits-float.tflite", top=10)
    frame = digit_messages()[0].body
    assert isinstance(frame, Frame)
    assert isinstance(frame.data, np.ndarray)
    grey = Frame(data=frame.data[..., 0], layout="HW")
    wide = Frame(data=frame.data.astype(np.float64))
    half = Frame(data=frame.data.astype(np.float16))
    answers = predicted(run(operator, [message(b) for b in (frame, grey, wide, half)]))
    for other in answers[1:3]:
        np.testing.assert_allclose(other.scores, answers[0].scores, atol=1e-6)
    assert answers[3].labels[0] == answers[0].labels[0]


def test_other_bodies_are_rejected() -> None:
    emit = run(opened(model="logits.tflite"), [message(Event(name="x"))])
    assert emit.dead[0][1] == "bad-type"


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_quantised_inputs_take_stored_numbers_and_real_ones_together(kind: str) -> None:
    operator = opened(model=f"logits-{kind}.tflite", decoder="raw")
    values = np.random.default_rng(1).uniform(-2, 2, (5, 4)).astype(np.float32)
    direct = bare(MODELS / f"logits-{kind}.tflite", values)
    detail = interpreter.Interpreter(str(MODELS / f"logits-{kind}.tflite")).get_input_details()[0]
    scale, zero = detail["quantization"]
    limits = np.iinfo(detail["dtype"])
    stored = np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(detail["dtype"])
    real = [message(Tensors(tensors={"anything": row})) for row in values]
    whole = [message(Tensors(tensors={"x": row})) for row in stored]
    for batch in (real, whole, [real[0], whole[1], real[2], whole[3], whole[4]]):
        found = [a.values["logits"] for a in predicted(run(operator, batch)) if a.values is not None]
        np.testing.assert_allclose(np.stack(found), direct, atol=1e-6)
    broken = message(Tensors(tensors={"x": np.array([0, np.nan, 0, 0], np.float32)}))
    emit = run(operator, [real[0], broken, whole[1]])
    assert [why for _, why, _ in emit.dead] == ["nan-input"]
    assert len(emit.messages()) == 2


def test_raw_can_leave_outputs_as_stored() -> None:
    rows = [message(Tensors(tensors={"x": np.ones(4, np.float32)}))]
    stored = predicted(run(opened(model="logits-int8.tflite", decoder={"raw": {"quantised": True}}), rows))[0].values
    real = predicted(run(opened(model="logits-int8.tflite", decoder="raw"), rows))[0].values
    assert stored is not None
    assert real is not None
    assert stored["logits"].dtype == np.int8
    detail = interpreter.Interpreter(str(MODELS / "logits-int8.tflite")).get_output_details()[0]
    scale, zero = detail["quantization"]
    np.testing.assert_allclose((stored["logits"].astype(float) - zero) * scale, real["logits"], rtol=1e-6)


@pytest.mark.parametrize("model", ["fixed.tflite", "four.tflite", "logits.tflite"])
def test_a_fixed_batch_is_obeyed(model: str) -> None:
    operator = opened(model=model, decoder="raw", batch={"max": 8})
    values = np.random.default_rng(2).normal(size=(11, 4)).astype(np.float32)
    found = predicted(run(operator, [message(Tensors(tensors={"x": row})) for row in values]))
    direct = bare(MODELS / "fixed.tflite", values)
    np.testing.assert_allclose(np.stack([a.values["logits"] for a in found if a.values]), direct, atol=1e-5)
    assert (
        sorted(operator.invoke_times) == {"fixed.tflite": [1], "four.tflite": [4], "logits.tflite": [1, 2, 4, 8]}[model]
    )


def test_an_input_without_a_batch_axis() -> None:
    operator = opened(model="vector.tflite", decoder="raw")
    sound = [message(Frame(data=np.arange(8, dtype=np.float32) + i, layout="T")) for i in range(3)]
    sums = [a.values["sums"].tolist() for a in predicted(run(operator, sound)) if a.values]
    assert sums == [[12, 16], [16, 20], [20, 24]]


def test_several_inputs_come_as_named_tensors() -> None:
    operator = opened(model="pair.tflite", decoder="raw")
    a, b = np.array([1, 2], np.float32), np.array([3, 5], np.float32)
    good = message(Tensors(tensors={"b": b, "a": a, "more": a}, attributes={"line": 3}))
    lacking = message(Tensors(tensors={"a": a}), "lacking")
    frame = message(Frame(data=a, layout="T"), "frame")
    emit = run(operator, [lacking, good, frame])
    (body,) = [m.body for m in emit.messages()]
    assert isinstance(body, Predictions)
    assert body.values is not None
    assert body.values["sum"].tolist() == [4, 7]
    assert body.values["product"].tolist() == [3, 10]
    assert body.attributes == {"line": 3}
    assert [(m.id, why) for m, why, _ in emit.dead] == [("lacking", "bad-shape"), ("frame", "bad-shape")]
    assert "'b'" in emit.dead[0][2]


def readings(n: int = 3) -> Readings:
    return Readings(
        n=n,
        columns={
            "label": [f"r{i}" for i in range(n)],
            "d": np.arange(n, dtype=np.int64),
            "a": np.arange(n) + 0.5,
            "b": np.ones(n, np.bool_),
            "c": np.full(n, -1.0),
        },
        time=np.arange(n, dtype=np.int64) + 100,
        source=[f"m{i}" for i in range(n)],
    )


def test_each_row_of_readings_is_one_prediction() -> None:
    operator = opened(model="logits.tflite", fields=["a", "b", "c", "d"], keep=["label", "d"], decoder="raw")
    emit = run(operator, [message(readings())])
    table = np.array([[i + 0.5, 1, -1, i] for i in range(3)], np.float32)
    direct = bare(MODELS / "fixed.tflite", table)
    for i, (sent, body) in enumerate(zip(emit.messages(), predicted(emit), strict=True)):
        assert (sent.id, sent.source, sent.time, body.seen) == (f"cam:1:0/{i}", f"m{i}", 100 + i, "cam:1:0")
        assert body.attributes == {"label": f"r{i}", "d": i}
        assert body.values is not None
        np.testing.assert_allclose(body.values["logits"], direct[i], atol=1e-5)
    (single,) = run(operator, [message(readings(1))]).messages()
    assert (single.id, single.time, single.source) == ("cam:1:0", 100, "m0")
    assert run(operator, [message(readings(0))]).sent == []


def test_only_the_rows_with_a_missing_value_are_rejected() -> None:
    operator = opened(model="logits.tflite", fields=["a", "b", "c", "d"])
    body = readings()
    assert isinstance(body.columns["a"], np.ndarray)
    body.columns["a"][1] = np.nan
    emit = run(operator, [message(body)])
    assert [m.id for m in emit.messages()] == ["cam:1:0/0", "cam:1:0/2"]
    ((dead, why, _),) = emit.dead
    assert why == "nan-input"
    assert isinstance(dead.body, Readings)
    assert (dead.body.n, dead.body.columns["label"], dead.body.source) == (1, ["r1"], ["m1"])
    assert dead.body.time is not None
    assert dead.body.time.tolist() == [101]


@pytest.mark.parametrize(
    ("columns", "reason"), [({"a": np.zeros(2)}, "missing-field"), ({"a": np.zeros(2), "b": ["x", None]}, "bad-shape")]
)
def test_readings_without_the_fields_are_rejected(columns: dict[str, Any], reason: str) -> None:
    operator = opened(model="ratio.tflite", fields=["a", "b"], decoder="regression")
    emit = run(operator, [message(Readings(n=2, columns=columns))])
    assert [why for _, why, _ in emit.dead] == [reason]
    assert "'b'" in emit.dead[0][2]


def test_answers_that_are_no_numbers_are_rejected_alone() -> None:
    operator = opened(model="ratio.tflite", fields=["a", "b"], decoder="regression")
    body = Readings(n=4, columns={"a": np.array([1.0, 0, 3, 0]), "b": np.array([2.0, 0, 4, 0])})
    emit = run(operator, [message(body)])
    kept = [
        m.body.values["value"].tolist() for m in emit.messages() if isinstance(m.body, Predictions) and m.body.values
    ]
    assert kept == [[0.5], [0.75]]
    assert [why for _, why, _ in emit.dead] == ["nan-output"] * 2
    assert sum(m.rows for m, _, _ in emit.dead) == 2
    alone = message(Tensors(tensors={"x": np.zeros(2, np.float32)}))
    assert run(operator, [alone]).dead[0][0] is alone


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_batch_sizes(most: int, expected: list[int]) -> None:
    assert sizes(most) == expected


def test_the_operator_waits_and_gathers_as_it_was_told() -> None:
    operator = opened(model="logits.tflite", batch={"max": 32, "wait": "20ms"})
    assert (operator.max_batch, operator.linger) == (32, 0.02)
    assert not operator.blocking  # a few microseconds
    operator.close()


def test_boxes_are_in_pixels_of_the_frame() -> None:
    operator = opened(model="ssd.tflite", decoder={"detection": {"threshold": 0.1, "iou": 1.0}}, labels=["a", "b", "c"])
    image = np.zeros((16, 24, 3), np.float32)
    image[3, 3] = 1
    (body,) = predicted(run(operator, [message(Frame(data=image))]))
    runner = interpreter.Interpreter(str(MODELS / "ssd.tflite"))
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], image[None])
    runner.invoke()
    boxes, classes, scores = (runner.get_signature_runner()(image=image[None])[f"o{i}"][0] for i in range(3))
    assert body.boxes is not None
    assert len(body.labels) == 5  # the model counts five of its six
    np.testing.assert_allclose(body.boxes, (boxes[:5, [1, 0, 3, 2]] * [24, 16, 24, 16]), atol=1e-4)
    np.testing.assert_allclose(body.scores, scores[:5], atol=1e-6)
    assert body.labels == ["abc"[int(c)] for c in classes[:5]]
    dark = predicted(run(operator, [message(Frame(data=image * 0))]))[0]
    assert (dark.labels, dark.scores.shape) == ([], (0,))
    assert dark.boxes is not None
    assert dark.boxes.shape == (0, 4)
    assert decode(encode(message(dark))).body.boxes.shape == (0, 4)  # type: ignore[union-attr]


def test_yolo_frames_in_one_batch_do_not_mix() -> None:
    operator = opened(model="yolo.tflite", decoder={"detection": {"threshold": 0.3}}, labels=["a", "b", "c"])
    frames = [message(Frame(data=np.full((16, 24, 3), light, np.float32))) for light in (1.0, 0.0, 0.5)]
    full, dark, dim = predicted(run(operator, frames))
    assert len(full.labels) > len(dim.labels) > len(dark.labels) == 0
    assert full.scores.max() == pytest.approx(2 * dim.scores.max())
    assert (np.diff(full.scores) <= 0).all()


def test_a_model_that_takes_long_is_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.inference.LONG", 1.0)
    assert not opened(DEMO, model="digits-int8.tflite").blocking
    monkeypatch.setattr("nodes.inference.LONG", 1e-9)
    assert opened(DEMO, model="digits-int8.tflite").blocking


NUMBERS = st.one_of(st.floats(width=64), st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300, 3.4e38, 0.0]))


@pytest.mark.parametrize(
    "model", ["logits.tflite", "logits-int8.tflite", "logits-uint8.tflite", "fixed.tflite", "chance.tflite"]
)
@pytest.mark.parametrize("decoder", ["classification", "raw"])
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_whatever_comes_is_answered_or_rejected(model: str, decoder: str, data: st.DataObject) -> None:
    operator = opened(model=model, decoder=decoder, fields=["a", "b", "c", "d"])
    shapes = st.sampled_from([(4,), (1, 4), (4, 1), (3,), (), (0,), (2, 2)])
    kinds = st.sampled_from(["f8", "f4", "f2", "i1", "u1", "i8", "?"])
    messages: list[Message] = []
    for i in range(data.draw(st.integers(0, 5))):
        values = data.draw(st.lists(NUMBERS, min_size=4, max_size=4))
        with np.errstate(all="ignore"):
            if data.draw(st.booleans()):
                array = np.resize(np.array(values), data.draw(shapes)).astype(data.draw(kinds))
                body: Body = Tensors(tensors={"x": array})
            else:
                columns: dict[str, Any] = {k: np.array([v, 0.0]) for k, v in zip("abcd", values, strict=True)}
                body = Readings(n=2, columns=columns)
        messages.append(message(body, f"m{i}"))
    emit = run(operator, messages)
    assert sum(m.rows for m in messages) == len(emit.sent) + sum(m.rows for m, _, _ in emit.dead)
    for _, sent in emit.sent:
        assert isinstance(sent.body, Predictions)
        assert np.isfinite(sent.body.scores).all()
        decode(encode(sent))


def test_nothing_in_nothing_out() -> None:
    assert run(opened(model="logits.tflite"), []).sent == []


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_bytes_are_scaled_at_the_model_as_by_a_step(kind: str) -> None:
    images, _ = digits()
    model = {"model": str(DEMO / f"digits-{kind}.tflite"), "batch": {"max": 8, "wait": "1ms"}}
    as_bytes = [message(Frame(data=image[..., 0], layout="HW"), f"cam:1:{i}") for i, image in enumerate(images[:30])]
    as_reals = [
        message(Frame(data=image[..., 0] * np.float32(1 / 255), layout="HW"), f"cam:1:{i}")
        for i, image in enumerate(images[:30])
    ]
    scaled = opened(DEMO, scale="1/255", **model)
    wanted = predicted(run(opened(DEMO, **model), as_reals))
    for frames in (as_bytes, as_reals, [*as_bytes[:7], *as_reals[7:20], *as_bytes[20:]]):
        found = predicted(run(scaled, frames))
        assert [p.labels for p in found] == [p.labels for p in wanted]
        np.testing.assert_allclose([p.scores for p in found], [p.scores for p in wanted], atol=1e-6)
    refused = run(opened(DEMO, **model), as_bytes[:2])
    assert [reason for _, reason, _ in refused.dead] == ["bad-dtype"] * 2
    # signed whole numbers are what a quantised model stores, and nothing to scale
    signed = run(scaled, [message(Frame(data=np.zeros((8, 8), np.int16), layout="HW"))])
    assert [reason for _, reason, _ in signed.dead] == ["bad-dtype"]


def test_every_byte_has_its_place_in_a_quantised_input() -> None:
    """By a table of 256, whatever the scale: the same as real numbers, quantised one by one."""
    spec = Spec("x", (256,), "int8", Quantisation(0.02, 7))
    values = np.arange(256, dtype=np.uint8)
    for scaling in (Scaling(1 / 255), Scaling(1 / 50, -1), Scaling(0.02, 7)):
        table, bad = Gatherer(Signature((spec,), (), None), (), (), scaling).fit(values[None], spec)
        assert not bad.any()
        np.testing.assert_array_equal(table[0], quantise(scaling.real(values), spec))
    camera = Spec("x", (256,), "int8", Quantisation(1 / 255, -128))
    table, _ = Gatherer(Signature((camera,), (), None), (), (), Scaling(1 / 255)).fit(values[None], camera)
    np.testing.assert_array_equal(table[0], np.arange(-128, 128))


def test_copies_of_a_model_answer_alike_from_several_threads() -> None:
    images, _ = digits()
    model = str(DEMO / "digits-int8.tflite")
    batches = [
        [message(Frame(data=images[i] * np.float32(1 / 255)), f"cam:1:{i}") for i in range(at, at + 16)]
        for at in range(0, 320, 16)
    ]
    wanted = [predicted(run(opened(DEMO, model=model), batch)) for batch in batches]
    several = opened(DEMO, model=model, parallel=3)
    assert (several.calls, several.blocking) == (3, True)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda batch: predicted(run(several, batch)), batches))
    assert [[p.labels for p in some] for some in found] == [[p.labels for p in some] for some in wanted]
    assert [[p.seen for p in some] for some in found] == [[p.seen for p in some] for some in wanted]
    several.close()


def test_a_model_is_exchanged_between_batches() -> None:
    """Calls in three threads while the model changes again and again: every answer is of one model, whole, and none is lost."""
    with np.load(DEMO / "digits.npz") as digits:
        images = digits["images"][:64].reshape(64, 8, 8, 1)
    frames = [message(Frame(data=image), f"cam:1:{i}") for i, image in enumerate(images)]
    paths = [DEMO / "digits-float.tflite", DEMO / "digits-int8.tflite"]
    config = {"scale": "1/255", "decoder": {"classification": {"activation": "none"}}, "top": 10, "batch": {"max": 16}}
    alone = [opened(DEMO, model=path.name, **config) for path in paths]
    scores = {one.model.digest: [body.scores for body in predicted(run(one, frames))] for one in alone}
    assert any(not np.array_equal(a, b) for a, b in zip(*scores.values(), strict=True))
    operator = opened(DEMO, model=paths[0].name, parallel=3, **config)
    models = {path: one.model for path, one in zip(paths, alone, strict=True)}
    over = threading.Event()

    def infer() -> list[Predictions]:
        seen: list[Predictions] = []
        while not over.is_set():
            seen += predicted(run(operator, frames))
        return seen

    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(infer) for _ in range(3)]
        try:
            for i in range(1, 21):
                operator.exchange(paths[i % 2], models[paths[i % 2]])
                assert operator.model == models[paths[i % 2]]
        finally:
            over.set()
        seen = [body for answer in answers for body in answer.result()]
    assert len(seen) % len(frames) == 0
    assert {body.model.digest for body in seen} == set(scores)
    for body in seen:
        assert np.array_equal(body.scores, scores[body.model.digest][int(body.seen.rsplit(":", 1)[1])])
    operator.close()


def test_a_model_that_does_not_load_leaves_the_old_one(tmp_path: Path) -> None:
    operator = opened(DEMO, model="digits-float.tflite", scale="1/255")
    before = operator.model
    broken = tmp_path / "broken.tflite"
    broken.write_bytes((DEMO / "digits-float.tflite").read_bytes()[:5000])
    with pytest.raises(PenstockError):
        operator.exchange(broken, Model(name="broken", version="1", digest="0" * 64))
    with pytest.raises(PenstockError):  # its answers are not classes of a digit: four numbers come in
        operator.exchange(MODELS / "ssd.tflite", Model(name="ssd", version="1", digest="0" * 64))
    assert operator.model == before
    assert len(predicted(run(operator, [message(Frame(data=np.zeros((8, 8, 1), np.uint8)))]))) == 1
    operator.close()
