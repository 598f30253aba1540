"""200 devices publish JSON readings: °C to °F, a range, alarms at once, one-second means per device.

What every contestant does is said in ``peers/program.c``. A reading above 104 °F is an alarm and is published at once, which
makes two things measurable. At full rate every 64th reading is one: the generator keeps at most 4,000 readings beyond the
last alarm that came back, so that nothing queues up without end, and the rate is that of readings up to the last alarm. For
latency every reading is one, at 1,000 a second: from sending a reading to having its alarm. Nothing lost is counted by the
means, which tell of how many readings they are: their sum must be what was sent less the one in 50 that is out of range; a
contestant that loses one has the rate 0. Means are compared too.

The readings come over one connection, as from a concentrator; what a program has to do is the same. *generator alone* is
the generator's and collector's own rate through the broker, with no program between them and every reading coming back.
"""

from __future__ import annotations

from benchmarks.contestants import PROGRAMS
from benchmarks.figures import OURS, Comparison, Figure, in_turns
from benchmarks.side import ALONE, EMBEDDED, MOSQUITTO, Load, compare, contestants

FULL = Load(window=4000, hot=64)
PACED = Load(window=1 << 19, rate=1000, hot=1, seconds=5)


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    peers = [who for who in PROGRAMS if who != OURS]
    full = contestants("telemetry", 0, FULL, MOSQUITTO, [OURS, *peers, ALONE])
    own = contestants("telemetry", 0, FULL, EMBEDDED, [OURS, "c", ALONE])
    seen = in_turns({**full, **{f"{who} on ours": task for who, task in own.items()}})
    safe = in_turns(contestants("telemetry", 1, FULL, MOSQUITTO, [OURS, "c", "paho"]))
    paced = in_turns(contestants("telemetry", 0, PACED, MOSQUITTO, [OURS, *peers]))
    paced_safe = in_turns(contestants("telemetry", 1, PACED, MOSQUITTO, [OURS, "c", "paho"]))
    at_mosquitto = {who: seen[who] for who in full}
    programs = {who: seen[who] for who in full if who != ALONE}
    at_ours = {OURS: seen[f"{OURS} on ours"]} | ({"c on mosquitto": seen["c"]} if "c" in seen else {})
    at_ours |= {f"{who} on ours": seen[f"{who} on ours"] for who in own if who != OURS}
    ours_twice = {OURS: safe[OURS], "penstock QoS 0": seen[OURS], **{w: o for w, o in safe.items() if w != OURS}}
    return [
        compare(
            "telemetry",
            "readings/s",
            at_mosquitto,
            lambda it: it.rate,
            {"c": 0.95, "aiomqtt": 2.3, "paho": 1.1},
        ),
        compare("telemetry, embedded broker", "readings/s", at_ours, lambda it: it.rate, {"c on mosquitto": 3}),
        compare(
            "telemetry, CPU a reading at full rate",
            "µs",
            programs,
            lambda it: it.cpu * 1e6,
            {"paho": 1 / 3, "c": 1.5},
            at_most=True,
        ),
        compare("telemetry, latency p50 at 1,000/s", "ms", paced, lambda it: it.p50 * 1e3, {}, at_most=True),
        compare("telemetry, latency p99 at 1,000/s", "ms", paced, lambda it: it.p99 * 1e3, {"paho": 1}, at_most=True),
        compare("telemetry, memory", "MB", programs, lambda it: it.memory / 1e6, {}, at_most=True),
        compare("telemetry, safe", "readings/s", ours_twice, lambda it: it.rate, {"penstock QoS 0": 0.6}),
        compare("telemetry, safe, latency p99 at 1,000/s", "ms", paced_safe, lambda it: it.p99 * 1e3, {}, at_most=True),
        Figure(
            "telemetry, safe, latency p99 at 1,000/s, ours", "ms", tuple(it.p99 * 1e3 for it in paced_safe[OURS]), 5
        ),
    ]
