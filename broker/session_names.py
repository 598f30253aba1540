"""Which topic names and filters MQTT allows. Brokers end the connection over a wrong one, so none is sent."""

from __future__ import annotations


def topic_fault(topic: str) -> str:
    """Why ``topic`` cannot be published to (MQTT 5, 4.7), or ``""``."""
    if not topic:
        return "a topic name is not empty"
    if "+" in topic or "#" in topic:
        return "a topic name has no wildcards"
    if "\0" in topic:
        return "a topic name has no NUL"
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "a topic name is valid Unicode"
    return "a topic name has at most 65535 bytes" if size > 65535 else ""


def filter_fault(pattern: str, group: str | None = None) -> str:
    """Why ``pattern`` is no topic filter (MQTT 5, 4.7.1), or ``group`` no group's name (4.8.2), or ``""``."""
    if group is not None and (not group or set(group) & set("/+#\0")):
        return "a group's name is not empty and has none of / + #"
    if not pattern or "\0" in pattern:
        return "a filter is not empty and has no NUL"
    try:
        if len(pattern.encode()) + len((group or "").encode()) > 65000:
            return "a filter has at most 65000 bytes"
    except UnicodeEncodeError:
        return "a filter is valid Unicode"
    levels = pattern.split("/")
    if "#" in "".join(levels[:-1]) or ("#" in levels[-1] and levels[-1] != "#"):
        return "# stands alone as the last level"
    if any("+" in each and each != "+" for each in levels):
        return "+ stands alone in its level"
    return ""
