"""The Kafka stream; the only package that imports kafka.

The server's way out is ``Publisher`` (it never blocks), the updater's way in is ``Reader``, and
what cannot be read goes to ``DeadLetters``. Releases go out by ``publish_release`` and are followed
by ``ReleaseFollower``; erasures go out by ``publish_erasure`` and come in with the ``Reader``.
"""

from daemon.stream.client import StreamRefused, StreamUnavailable
from daemon.stream.compacted import publish_erasure
from daemon.stream.dead_letters import DeadLetters
from daemon.stream.publisher import Publisher, PublisherStats
from daemon.stream.reader import Reader
from daemon.stream.records import Gap, GapCause, Position, Record
from daemon.stream.releases import ReleaseFollower, publish_release
from daemon.stream.spool import SpoolInUse
from daemon.stream.topics import Topic, dlq_name, ensure_topics, topic_name

__all__ = [
    "DeadLetters",
    "Gap",
    "GapCause",
    "Position",
    "Publisher",
    "PublisherStats",
    "Reader",
    "Record",
    "ReleaseFollower",
    "SpoolInUse",
    "StreamRefused",
    "StreamUnavailable",
    "Topic",
    "dlq_name",
    "ensure_topics",
    "publish_erasure",
    "publish_release",
    "topic_name",
]
