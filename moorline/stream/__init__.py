"""The Kafka stream; the only package that imports kafka.

The server's way out is ``Publisher`` (it never blocks), the updater's way in is ``Reader``, and
what cannot be read goes to ``DeadLetters``. Releases go out by ``publish_release``, erasures by
``publish_erasure``; erasures come in with the ``Reader``.
"""

from moorline.stream.client import StreamInvalid, StreamUnavailable
from moorline.stream.compacted import publish_erasure, publish_release
from moorline.stream.dead_letters import DeadLetters
from moorline.stream.publisher import Publisher, PublisherStats
from moorline.stream.reader import Reader
from moorline.stream.records import Gap, GapCause, Record
from moorline.stream.spool import SpoolLocked
from moorline.stream.topics import Topic, dlq_name, ensure_topics, topic_name

__all__ = [
    "DeadLetters",
    "Gap",
    "GapCause",
    "Publisher",
    "PublisherStats",
    "Reader",
    "Record",
    "SpoolLocked",
    "StreamInvalid",
    "StreamUnavailable",
    "Topic",
    "dlq_name",
    "ensure_topics",
    "publish_erasure",
    "publish_release",
    "topic_name",
]
