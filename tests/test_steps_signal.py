"""Windows of readings, spectra and spectrograms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from steps_kit import SECOND, books, frame, only, operator, plain, reading, refused, run

from nodes.operator import Flow
from nodes.preprocess import Config
from schemas.messages import Array, Frame, Message


def data(message: Message) -> Array:
    body = message.body
    assert isinstance(body, Frame)
    assert isinstance(body.data, np.ndarray)
    return body.data


def samples(start: int, n: int, number: int = 0, **rest: Any) -> Message:
    values = np.arange(start, start + n, dtype=np.float64)
    return reading(number, {"x": values}, time=[v / 100 for v in values], **rest)


def test_window_of_one_field() -> None:
    sent, emit = books(operator({"window": 4}), [samples(0, 10)])
    assert [(m.time, data(m).tolist()) for _, m in sent] == [(0, [0, 1, 2, 3]), (SECOND // 25, [4, 5, 6, 7])]
    first = sent[0][1]
    body = first.body
    assert isinstance(body, Frame)
    assert (body.layout, first.source, data(first).dtype) == ("T", "s1", np.dtype(np.float32))
    assert body.rate == pytest.approx(100)
    assert (emit.absorbed, emit.dropped) == (8, {"incomplete": 2})
    assert len({m.id for _, m in sent}) == 2


def test_window_overlap_and_hop_beyond() -> None:
    overlapping, emit = books(operator({"window": {"size": 4, "hop": 2}}), [samples(0, 5), samples(5, 4)])
    assert [data(m)[0] for _, m in overlapping] == [0, 2, 4]
    assert (emit.absorbed, emit.dropped) == (8, {"incomplete": 1})
    apart, emit = books(operator({"window": {"size": 2, "hop": 5}}), [samples(0, 4), samples(4, 5)], [1])
    assert [data(m).tolist() for _, m in apart] == [[0, 1], [5, 6]]
    assert (emit.absorbed, emit.filtered) == (4, 5)


def test_window_of_several_fields() -> None:
    message = reading(1, {"x": [1, 2], "name": ["a", "b"], "y": [3.0, None]})
    (sent,) = run(operator({"window": 2}), [message])
    assert np.array_equal(data(sent[1]), np.array([[1, 3], [2, np.nan]], np.float32), equal_nan=True)
    (sent,) = run(operator({"window": {"size": 2, "fields": ["y", "x"], "rate": "50/s"}}), [message])
    assert data(sent[1])[0].tolist() == [3, 1]
    assert isinstance(sent[1].body, Frame)
    assert sent[1].body.rate == 50


def test_window_starts_anew_after_a_gap() -> None:
    sent, emit = books(operator({"window": {"size": 4, "gap": "1s"}}), [samples(0, 6), samples(1000, 5)])
    assert [data(m)[0] for _, m in sent] == [0, 1000]
    assert emit.dropped == {"gap": 2, "incomplete": 1}


def test_window_keeps_sources_apart() -> None:
    message = reading(1, {"x": [1, 10, 2, 20]}, per_row=["a", "b", "a", "b"])
    assert [(m.source, data(m).tolist()) for _, m in run(operator({"window": 2}), [message])] == [
        ("a", [1, 2]),
        ("b", [10, 20]),
    ]


def test_window_refuses_one_message() -> None:
    node = operator({"window": {"size": 2, "fields": ["x"]}})
    sent, emit = books(
        node, [reading(1, {"x": [1]}), reading(2, {"y": [1]}), reading(3, {"x": ["a"]}), reading(4, {"x": [2]})]
    )
    assert [data(m).tolist() for _, m in sent] == [[1, 2]]
    assert [reason for _, reason, _ in emit.dead] == ["missing-field", "wrong-type"]
    assert refused(operator({"window": 2}), reading(1, {"t": ["a"]})) == "missing-field"


def test_window_of_too_many_sources_says_what_it_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.steps.window.SOURCES", 3)
    node = operator({"window": 2})
    _, emit = books(node, [reading(i, {"x": [1]}, source=f"s{i}") for i in range(5)])
    assert emit.dropped == {"evicted": 2, "incomplete": 3}


def test_steps_after_a_window_do_not_count_again() -> None:
    node = operator({"window": 2}, {"throttle": "1h"}, "fft")
    sent, emit = books(node, [samples(0, 10)])
    assert (len(sent), emit.absorbed, emit.filtered) == (1, 10, 0)
    bad = operator({"window": 2}, {"spectrogram": 4})
    sent, emit = books(bad, [samples(0, 4)])
    assert (sent, len(emit.dead), emit.absorbed) == ([], 2, 2)


def test_rows_that_leave_before_a_window() -> None:
    node = operator({"split": {"high": "x > 7"}}, {"filter": "x > 0"}, {"window": 3})
    sent, emit = books(node, [samples(0, 10)])
    assert [port for port, _ in sent] == ["high", "out", "out"]
    assert (emit.absorbed, emit.filtered, emit.dropped) == (8, 1, {"incomplete": 1})


def sine(amplitude: float, hertz: float, rate: float, n: int) -> Array:
    return np.asarray(amplitude * np.sin(2 * np.pi * hertz * np.arange(n) / rate) + 5)


@pytest.mark.parametrize("taper", ["hann", "hamming", "blackman", "none"])
def test_fft_of_a_sine(taper: str) -> None:
    message = frame(sine(3, 50, 1000, 1000), "T", rate=1000.0)
    out = only(operator({"fft": {"taper": taper}}), message)
    body = out.body
    assert isinstance(body, Frame)
    assert (body.layout, data(out).shape, body.attributes["resolution"]) == ("F", (501,), 1.0)
    assert data(out)[50] == pytest.approx(3, rel=1e-4)
    assert data(out)[100:].max() < 1e-3
    assert data(only(operator({"fft": {"output": "power", "taper": taper}}), message))[50] == pytest.approx(
        4.5, rel=1e-4
    )
    decibel = data(only(operator({"fft": {"output": "db", "taper": taper, "floor": -60}}), message))
    assert decibel[50] == pytest.approx(10 * np.log10(4.5), abs=1e-3)
    assert decibel.min() == -60


def test_fft_power_is_the_mean_square() -> None:
    """Parseval: the powers add up to the signal's mean square, for even and odd lengths."""
    for n in (256, 255):
        noise = np.random.default_rng(1).normal(size=n)
        out = data(only(operator({"fft": {"output": "power", "taper": "none", "centre": False}}), frame(noise, "T")))
        assert out.sum() == pytest.approx(np.mean(noise**2), rel=1e-5)


def test_fft_of_channels_and_of_nothing() -> None:
    both = np.stack([sine(1, 10, 100, 100), sine(2, 20, 100, 100)], axis=1)
    out = data(only(operator("fft"), frame(both, "TC", rate=100.0)))
    assert out.shape == (51, 2)
    assert (out[10, 0], out[20, 1]) == (pytest.approx(1, rel=1e-4), pytest.approx(2, rel=1e-4))
    assert refused(operator("fft"), frame(np.zeros((2, 2)), "HW")) == "wrong-layout"
    assert refused(operator("fft"), frame(np.zeros(0), "T")) == "wrong-shape"
    assert data(only(operator("fft"), frame(np.ones(1), "T"))).tolist() == [0]


def test_spectrogram() -> None:
    signal = np.concatenate([sine(1, 100, 1000, 1000), sine(1, 300, 1000, 1000)])
    node = operator({"spectrogram": {"size": 100, "hop": 50, "output": "amplitude"}})
    out = only(node, frame(signal, "T", rate=1000.0))
    body = out.body
    assert isinstance(body, Frame)
    assert (body.layout, body.rate, data(out).shape) == ("TF", 20.0, (39, 51))
    assert data(out)[:18].argmax(axis=1).tolist() == [10] * 18
    assert data(out)[21:].argmax(axis=1).tolist() == [30] * 18
    two = data(only(node, frame(np.stack([signal, signal], axis=1), "TC")))
    assert np.allclose(two[:, :, 0], data(out))
    assert refused(node, frame(np.zeros(99), "T")) == "wrong-shape"


def test_from_readings_to_a_spectrum() -> None:
    node = operator({"window": {"size": 64, "fields": ["x"]}}, {"fft": "db"})
    messages = [reading(i, {"x": [float(np.sin(i))]}, time=i / 64) for i in range(200)]
    whole = run(node, messages)
    assert len(whole) == 3
    assert plain(
        run(operator({"window": {"size": 64, "fields": ["x"]}}, {"fft": "db"}), messages, [1, 50, 7])
    ) == plain(whole)


def test_types_flow() -> None:
    config = Config.model_validate({"steps": [{"window": 4}, "fft"]})
    from steps_kit import CONTEXT

    assert config.emits([Flow("readings/1", frozenset("x"))], CONTEXT) == {"out": Flow("frame/1")}
    assert config.accepts() == frozenset({"readings/1"})
    for wrong in (0, "4 s", {"size": 4, "hop": -1}, {"size": 4, "rate": 0}):
        with pytest.raises(ValidationError):
            operator({"window": wrong})
