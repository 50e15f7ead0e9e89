"""The codecs that producers and brokers compress record batches with.

A batch is unpacked up to a limit: a megabyte of some of them can be ten gigabytes of zeros.
"""

from __future__ import annotations

import gzip
import io

from kafka import codec as library

from moorline.stream.client import StreamInvalid

MAX_UNPACKED_BYTES = 64 * 2**20
"""Largest decompressed batch; producers fill batches with a megabyte or less."""
_NAMES = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}
"""By their numbers in a batch's attributes."""
_PACKAGES = {"snappy": "python-snappy", "lz4": "lz4", "zstd": "zstandard"}


def unpack(codec: int, data: bytes) -> bytes:
    """What a batch of this codec held; 0 is none.

    Raises:
        StreamInvalid: the package of this codec is not installed.
        ValueError: there is no such codec, or it is more than ``MAX_UNPACKED_BYTES``.
        Exception: whatever the codec's package says of bytes that are not its own.
    """
    if codec == 0:
        return data
    name = _NAMES.get(codec)
    if name is None:
        raise ValueError(f"unknown codec {codec}")
    if not getattr(library, f"has_{name}")():
        raise StreamInvalid(
            f"records on the broker are compressed with {name}, which this installation cannot "
            f"read: run `pip install {_PACKAGES[name]}` in its environment; `moorline doctor` "
            "checks every codec"
        )
    unpacked = _unpack(name, data)
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise ValueError(f"a batch of more than {MAX_UNPACKED_BYTES} bytes when unpacked")
    return unpacked


def broken_codecs() -> dict[str, str]:
    """Codec -> why records compressed with it cannot be read here; empty when all can."""
    sample = b"moorline" * 1000
    found = {}
    for number, name in _NAMES.items():
        try:
            if unpack(number, getattr(library, f"{name}_encode")(sample)) != sample:
                found[name] = "it does not give back what was packed"
        except Exception as error:  # a package may fail in any way
            missing = not getattr(library, f"has_{name}")()
            found[name] = f"{_PACKAGES[name]} is not installed" if missing else repr(error)
    return found


def _unpack(name: str, data: bytes) -> bytes:
    """At most one byte more than the limit, but for snappy, which cannot make much of little."""
    if name == "snappy":
        return bytes(library.snappy_decode(data))
    source = io.BytesIO(data)
    if name == "gzip":
        return gzip.GzipFile(fileobj=source).read(MAX_UNPACKED_BYTES + 1)
    if name == "lz4":
        return bytes(library.lz4.open(source).read(MAX_UNPACKED_BYTES + 1))
    reader = library.zstd.ZstdDecompressor().stream_reader(source, read_across_frames=True)
    return bytes(reader.read(MAX_UNPACKED_BYTES + 1))
