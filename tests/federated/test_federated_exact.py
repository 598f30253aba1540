"""The rounds on the bus are those of the plain loop."""

from __future__ import annotations

import numpy as np
from job_site import PLAN, Site, parts, plain_loop

from nodes.federated.rules import Rules
from nodes.federated.virtual import Link
from nodes.federated.weights import norm


def rules(**more: object) -> Rules:
    return Rules(**{"job": "j", "rounds": 3, "least": 4, "quorum": 4, "fit": PLAN, **more})  # type: ignore[arg-type]


def test_one_round_is_that_of_the_loop() -> None:
    data = parts(4)
    site = Site(rules(rounds=1), data)
    assert site.run()
    wanted = plain_loop(data, 1)[-1]
    got = site.weights()
    assert norm({n: got[n] - wanted[n] for n in wanted}) < 1e-6
    assert norm(got) > 0.1
    [row] = site.rows
    assert (row["status"], row["clients"], row["samples"]) == ("committed", 4, sum(len(part) for part in data))


def test_twenty_rounds_are_those_of_the_loop_whatever_the_order_of_arrival() -> None:
    data = parts(10, seed=3)
    wanted = plain_loop(data, 20)[-1]
    models = set()
    for seed in range(3):
        site = Site(rules(rounds=20, least=10, quorum=10), data, seed=seed, link=Link(0.01, jitter=0.5))
        assert site.run()
        assert [row["status"] for row in site.rows] == ["committed"] * 20
        models.add(site.model)
        for n, array in site.weights().items():
            assert np.linalg.norm(array - wanted[n]) <= 1e-4
    assert len(models) == 1  # to the byte
