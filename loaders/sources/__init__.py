"""Where samples come from; each file reads one format and gives ``RawSample``s by number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RawSample:
    """One sample's undecoded bytes, under ``key`` (``shard/key``); the caption is in ``text`` or in ``json``."""

    key: str
    image: bytes
    text: bytes | None
    json: bytes | None
