"""Each step on frames, by plain pixels."""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from steps_kit import books, frame, only, operator, reading, refused

from schemas.errors import MissingError
from schemas.messages import Array, Frame, Message

RNG = np.random.default_rng(7)
PHOTO = RNG.integers(0, 256, (12, 16, 3), np.uint8)
GREY = PHOTO[:, :, 0]


def pixels(message: Message) -> Array:
    body = message.body
    assert isinstance(body, Frame)
    assert isinstance(body.data, np.ndarray)
    assert body.data.ndim == len(body.layout)
    assert body.data.flags.c_contiguous
    return body.data


def body(message: Message) -> Frame:
    assert isinstance(message.body, Frame)
    return message.body


def test_resize_area_is_the_mean_of_blocks() -> None:
    out = pixels(only(operator({"resize": [8, 6]}), frame(PHOTO)))
    blocks = PHOTO.reshape(6, 2, 8, 2, 3).mean(axis=(1, 3))
    assert out.dtype == np.uint8
    assert np.abs(out - blocks).max() <= 0.5
    floats = pixels(only(operator({"resize": [8, 6]}), frame(GREY / 255, "HW")))
    assert np.allclose(floats, (GREY / 255).reshape(6, 2, 8, 2).mean(axis=(1, 3)))
    assert floats.dtype == np.float64


def test_resize_nearest() -> None:
    node = operator({"resize": {"size": [4, 3], "method": "nearest"}})
    assert np.array_equal(pixels(only(node, frame(PHOTO))), PHOTO[2::4, 2::4])
    up = pixels(only(operator({"resize": {"size": [32, 24], "method": "nearest"}}), frame(PHOTO)))
    assert np.array_equal(up, PHOTO.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("method", ["area", "bilinear"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int8])
def test_resize_by_pillow_keeps_dtype_and_mean(method: str, dtype: type[Any]) -> None:
    ramp = np.linspace(0, 100, 30)[None, :, None].repeat(20, axis=0).repeat(2, axis=2).astype(dtype)
    out = pixels(only(operator({"resize": {"size": [7, 9], "method": method}}), frame(ramp)))
    assert (out.shape, out.dtype) == ((9, 7, 2), np.dtype(dtype))
    assert abs(float(out.mean()) - float(ramp.mean())) < 2
    assert bool((np.diff(out[0, :, 0].astype(float)) > 0).all())


def test_resize_one_side_and_nothing_to_do() -> None:
    assert pixels(only(operator({"resize": 4}), frame(PHOTO))).shape == (4, 4, 3)
    assert only(operator({"resize": [16, 12]}), frame(PHOTO)).body == frame(PHOTO).body


@pytest.mark.parametrize("wrong", [[96], [0, 4], "big", [1, 2, 3], {"size": [4, 4], "methd": "area"}, [1e9, 1], {}])
def test_resize_refuses_options(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        operator({"resize": wrong})


def test_crop() -> None:
    assert np.array_equal(pixels(only(operator({"crop": [2, 1, 5, 4]}), frame(PHOTO))), PHOTO[1:5, 2:7])
    assert np.array_equal(pixels(only(operator({"crop": {"middle": [4, 4]}}), frame(GREY, "HW"))), GREY[4:8, 6:10])
    assert refused(operator({"crop": [10, 0, 7, 1]}), frame(PHOTO)) == "wrong-shape"
    assert refused(operator({"crop": {"middle": [99, 1]}}), frame(PHOTO)) == "wrong-shape"
    with pytest.raises(ValidationError, match="either a box"):
        operator({"crop": {}})


def test_colour() -> None:
    grey = only(operator({"colour": "grey"}), frame(PHOTO))
    expected = 0.299 * PHOTO[:, :, 0] + 0.587 * PHOTO[:, :, 1] + 0.114 * PHOTO[:, :, 2]
    assert body(grey).layout == "HW"
    assert np.abs(pixels(grey) - expected).max() <= 0.51
    assert np.array_equal(pixels(only(operator({"colour": "bgr"}), frame(PHOTO))), PHOTO[:, :, ::-1])
    assert np.array_equal(
        pixels(
            only(operator({"colour": {"from": "bgr", "to": "grey"}}), frame(np.ascontiguousarray(PHOTO[:, :, ::-1])))
        ),
        pixels(grey),
    )
    assert pixels(only(operator({"colour": {"to": "grey", "channel": True}}), frame(PHOTO))).shape == (12, 16, 1)
    assert np.array_equal(pixels(only(operator({"colour": "rgb"}), frame(GREY, "HW"))), GREY[:, :, None].repeat(3, 2))
    assert pixels(only(operator({"colour": "rgb"}), frame(np.zeros((2, 2, 4), np.uint8)))).shape == (2, 2, 3)
    assert refused(operator({"colour": "grey"}), frame(np.zeros((2, 2, 5), np.uint8))) == "wrong-shape"


def test_normalise_and_scale() -> None:
    node = operator({"normalise": {"mean": [1, 2, 3], "std": ["1/2", 4, 5]}})
    out = pixels(only(node, frame(PHOTO)))
    assert out.dtype == np.float32
    assert np.allclose(out, (PHOTO - np.array([1, 2, 3])) / np.array([0.5, 4, 5]))
    planes = np.ascontiguousarray(PHOTO.transpose(2, 0, 1))
    assert np.allclose(pixels(only(node, frame(planes, "CHW"))), out.transpose(2, 0, 1))
    assert refused(node, frame(GREY, "HW")) == "wrong-shape"
    one = operator({"normalise": {"mean": 127.5, "std": 127.5}})
    assert np.allclose(pixels(only(one, frame(GREY, "HW"))), GREY / 127.5 - 1, atol=1e-6)
    scaled = pixels(only(operator({"scale": "1/255"}), frame(PHOTO)))
    assert scaled.dtype == np.float32
    assert np.allclose(scaled, PHOTO / 255)
    both = operator({"scale": {"factor": "2/255", "offset": -1}})
    assert np.allclose(pixels(only(both, frame(PHOTO))), PHOTO / 127.5 - 1, atol=1e-6)
    assert np.array_equal(PHOTO, np.random.default_rng(7).integers(0, 256, (12, 16, 3), np.uint8)), "input unchanged"
    with pytest.raises(ValidationError):
        operator({"scale": "1/zero"})


def test_quantise() -> None:
    node = operator({"quantise": {"scale": "1/255", "zero_point": -128}})
    out = pixels(only(node, frame(np.array([[0.0, 1.0, 0.5, 2.0, -1.0]], np.float32), "HW")))
    assert (out.dtype, out.tolist()) == (np.dtype(np.int8), [[-128, 127, 0, 127, -128]])
    assert refused(node, frame(np.array([[np.nan]]), "HW")) == "missing-value"
    with pytest.raises(ValidationError, match="zero_point"):
        operator({"quantise": {"scale": 1, "zero_point": 200}})


def test_layout_flip_rotate() -> None:
    chw = only(operator({"layout": "CHW"}), frame(PHOTO))
    assert np.array_equal(pixels(chw), PHOTO.transpose(2, 0, 1))
    assert np.array_equal(pixels(only(operator({"layout": "HWC"}), chw)), PHOTO)
    assert pixels(only(operator({"layout": "CHW"}), frame(GREY, "HW"))).shape == (1, 12, 16)
    assert pixels(only(operator({"layout": "HW"}), frame(PHOTO[:, :, :1].copy()))).shape == (12, 16)
    assert refused(operator({"layout": "HW"}), frame(PHOTO)) == "wrong-shape"
    assert refused(operator({"layout": "HWC"}), frame(np.zeros(4), "T")) == "wrong-layout"
    assert np.array_equal(pixels(only(operator({"flip": "horizontal"}), frame(PHOTO))), PHOTO[:, ::-1])
    assert np.array_equal(pixels(only(operator({"flip": "vertical"}), frame(GREY, "HW"))), GREY[::-1])
    assert np.array_equal(pixels(only(operator({"flip": "both"}), frame(PHOTO))), PHOTO[::-1, ::-1])
    turned = pixels(only(operator({"rotate": 90}), frame(PHOTO)))
    assert np.array_equal(turned[0, -1], PHOTO[0, 0]), "the upper left corner goes to the upper right"
    assert np.array_equal(pixels(only(operator({"rotate": 270}, {"rotate": 90}), frame(PHOTO))), PHOTO)
    assert np.array_equal(pixels(only(operator({"rotate": 180}), frame(PHOTO))), PHOTO[::-1, ::-1])


def test_encode_and_decode() -> None:
    png = only(operator({"encode": "png"}), frame(PHOTO, rate=5.0, attributes={"label": "7"}))
    made = body(png)
    assert (made.encoding, made.rate, made.attributes) == ("png", 5.0, {"label": "7"})
    back = only(operator("decode"), png)
    assert np.array_equal(pixels(back), PHOTO)
    assert body(back).attributes == {"label": "7"}
    deep = (GREY.astype(np.uint16) * 200, "HW")
    assert np.array_equal(pixels(only(operator({"encode": "png"}, "decode"), frame(*deep))), deep[0])
    smooth = np.linspace(0, 255, 64, dtype=np.uint8)[None, :].repeat(64, axis=0)
    jpeg = only(operator({"encode": {"format": "jpeg", "quality": 95}}), frame(smooth, "HW"))
    assert np.abs(pixels(only(operator("decode"), jpeg)).astype(int) - smooth).max() < 8
    assert only(operator({"encode": "jpeg"}), jpeg).body == jpeg.body, "no second loss"
    assert pixels(only(operator({"resize": [8, 8]}), jpeg)).shape == (8, 8), "other steps decode by themselves"
    assert only(operator("decode"), frame(PHOTO)).body == frame(PHOTO).body


def test_encode_refuses_what_a_file_cannot_hold() -> None:
    assert refused(operator({"encode": "jpeg"}), frame(PHOTO / 255)) == "wrong-dtype"
    assert refused(operator({"encode": "jpeg"}), frame(np.zeros((2, 2, 2), np.uint8))) == "wrong-dtype"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_bad_and_monstrous_images_are_refused() -> None:
    node = operator({"resize": [4, 4]})
    whole = bytes(body(only(operator({"encode": "png"}), frame(PHOTO))).data)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")
    for data in (b"", b"garbage", whole[: len(whole) // 2], b"\xff\xd8\xff\xe0" + bytes(50), b"GIF89a" + bytes(50)):
        assert refused(node, frame(data, encoding="jpeg")) == "bad-image"
    assert refused(node, frame(bomb, encoding="png")) in {"too-big", "bad-image"}
    flipped = bytearray(whole)
    for i in range(8, len(flipped), 7):
        flipped[i] ^= 0x55
        _, emit = books(node, [frame(bytes(flipped), encoding="png")])
        assert all(reason in {"bad-image", "too-big"} for _, reason, _ in emit.dead)


def test_shapes_that_are_no_image() -> None:
    for step in ({"resize": [2, 2]}, {"crop": [0, 0, 1, 1]}, {"colour": "grey"}, {"flip": "both"}, {"rotate": 90}):
        assert refused(operator(step), frame(np.zeros(4), "T")) == "wrong-layout"
        assert refused(operator(step), frame(np.zeros((0, 4)), "HW")) == "wrong-shape"
    assert refused(operator({"scale": 2}), reading(1, {"x": [1]})) == "wrong-type"


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for step in ("decode", {"encode": "png"}, {"resize": {"size": [4, 4], "method": "bilinear"}}):
        with pytest.raises(MissingError, match=r"penstock\[image\]"):
            operator(step)
    node = operator({"resize": [8, 6]})
    assert pixels(only(node, frame(PHOTO))).shape == (6, 8, 3)
    assert refused(operator({"resize": [7, 6]}), frame(PHOTO)) == "missing-library"
