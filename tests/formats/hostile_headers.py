"""Files that are wrong in their header, and files that are something else under the name of a safetensors file; all tiny."""

import json
import struct
from collections.abc import Mapping


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
F = {"dtype": "F32", "shape": [1]}
DEEP = b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001
HOSTILE: Mapping[str, bytes] = {
    "empty": b"",
    "one byte": b"x",
    "nine bytes": b"\x02" + b"\0" * 7 + b"{",
    "header length 0": raw(b"", length=0) + b"{}",
    "header length 1": raw(b"{}", length=1),
    "header length 2^31": raw(b"{}", length=2**31),
    "header length 2^63": raw(b"{}", length=2**63),
    "header length 2^64-1": raw(b"{}", length=2**64 - 1),
    "header length over 100 MB": raw(b"{}", length=100_000_001),
    "header longer than the file": raw(one(), length=10_000),
    "header is a list": raw([1]),
    "header begins with space": raw(b" " + json.dumps(one()).encode(), b"\0" * 4),
    "header is not JSON": raw(b"{'a': 1}"),
    "header is not UTF-8": raw(b'{"\xff": 1}'),
    "header is cut": raw(b'{"a": {"dtype": "F32", '),
    "header nested deep": raw(DEEP),
    "NaN in the header": raw(b'{"a": NaN}'),
    "huge number in the header": raw(b'{"a": ' + b"9" * 10_000 + b"}"),
    "name twice": raw(b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), b"\0" * 4),
    "key twice in a tensor": raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "metadata number": raw({"__metadata__": {"a": 1}}),
    "metadata list": raw({"__metadata__": ["a"]}),
    "metadata nested": raw({"__metadata__": {"a": {"b": "c"}}}),
    "tensor is a list": raw({"a": [1, 2]}),
    "tensor without shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "tensor with more": raw(one(extra=1), b"\0" * 4),
    "unknown dtype": raw(one("F33"), b"\0" * 4),
    "dtype is a number": raw(one(32), b"\0" * 4),
    "negative shape": raw(one(shape=[-1]), b"\0" * 4),
    "fractional shape": raw(one(shape=[1.0]), b"\0" * 4),
    "shape of a truth value": raw(one(shape=[True]), b"\0" * 4),
    "shape is a text": raw(one(shape="1"), b"\0" * 4),
    "rank 10,000": raw(one(shape=[1] * 10_000), b"\0" * 4),
    "shape [0, 2^62]": raw(one(shape=[0, 2**62], offsets=[0, 0])),
    "shape product overflows": raw(one(shape=[2**33, 2**33], offsets=[0, 4]), b"\0" * 4),
    "wrong size for dtype": raw(one("F16"), b"\0" * 4),
    "negative offsets": raw(one(offsets=[-4, 0]), b"\0" * 4),
    "offsets reversed": raw(one(offsets=[4, 0]), b"\0" * 4),
    "one offset": raw(one(offsets=[4]), b"\0" * 4),
    "offsets beyond the file": raw(one(offsets=[0, 4])),
    "starts late": raw(one(offsets=[4, 8]), b"\0" * 8),
    "hole": raw({"a": {**F, "data_offsets": [0, 4]}, "b": {**F, "data_offsets": [8, 12]}}, b"\0" * 12),
    "overlap": raw({"a": {**F, "data_offsets": [0, 4]}, "b": {**F, "data_offsets": [2, 6]}}, b"\0" * 6),
    "same place": raw({"a": {**F, "data_offsets": [0, 4]}, "b": {**F, "data_offsets": [0, 4]}}, b"\0" * 4),
    "trailing bytes": raw(one(), b"\0" * 5),
    "cut data": raw(one(shape=[100], offsets=[0, 400]), b"\0" * 399),
    "name of 10 KB": raw({"n" * 10_000: {**F, "data_offsets": [0, 4]}}, b"\0" * 4),
    "200,000 empty tensors": raw({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}),
}  # fmt: skip

FOREIGN: Mapping[str, tuple[bytes, str]] = {
    "zip": (b"PK\x03\x04" + b"\0" * 100, "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "pickle"),
    "newer pickle": (b"\x80\x04\x95" + b"\0" * 100, "pickle"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git-LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html><head><title>404</title>", "HTML"),
    "HTML after blanks": (b"\n  <html lang=en>", "HTML"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML"),
    "JSON": (b'{"error": "Invalid username or password."}', "JSON"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 100, "GGUF"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "gzip"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0" + b"\0" * 100, "JPEG"),
}
