"""What ``penstock check`` says of secure sums in a topology, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nodes.federate import Config
from nodes.federated import keyring
from nodes.plan import prepare
from nodes.privacy.keys import Signer
from schemas.errors import ConfigError
from schemas.problems import validated

TRAINER = "trainer: {mlp: {layers: [4, 2]}}"


def write(folder: Path, lead: str, learn: str = "") -> Path:
    np.savez(folder / "a.npz", images=np.zeros((3, 4), np.float32), labels=np.zeros(3, np.int64))
    path = folder / "plant.yaml"
    path.write_text(
        f"""\
topology: plant
brokers: {{local: {{run: embedded}}}}
nodes:
  camera: {{ingest: {{source: arrays, path: a.npz}}}}
  learn:
    train:
      job: j
      {TRAINER}
      {learn}
    from: camera
  lead:
    federate:
      job: j
      {TRAINER}
      {lead}
  store: {{uplink: {{sink: sqlite, path: rounds.sqlite}}, from: lead}}
"""
    )
    return path


@pytest.mark.parametrize(
    ("lead", "line", "said"),
    [
        ("secure: true\n      strategy: median", 16, "median has to see each update"),
        ("secure: true\n      strategy: {krum: {faulty: 1}}", 16, "krum has to see each update"),
        ("secure: true\n      strategy: scaffold", 16, "scaffold has to see each update"),
        ("secure: true\n      strategy: fednova", 16, "fednova has to see each update"),
        ("secure: true\n      compress: top-k", 16, "cannot be compressed"),
        ("secure: true\n      compress: int8", 16, "cannot be compressed"),
        ("secure: true\n      buffer: 4", 16, "there are no rounds"),
        ("secure: true\n      report: true", 16, "would be seen"),
        ("secure: true\n      limits: {norm: 3}", 16, "none can be measured"),
        ("secure: true\n      clients: {least: 2}", 16, "2 is less than the 3 clients"),
        ("secure: {least: 5}\n      clients: {least: 5, quorum: 4}", 16, "4 is less than the 5 clients"),
        ("secure: {least: 5}\n      clients: {most: 4}", 16, "4 is less than the 5 clients"),
        ("secure: {agreed: true}", 15, "keys of their own"),
        ("secure: true\n      of: above", 15, "a site does not lead secure sums"),
        ("secure: true\n      pool: {plain: true}", 16, "one client would be the coordinator's own"),
        ("secure: {threshold: 0.4}", 15, "at least 0.5"),
        ("secure: {threshold: 1}", 15, "less than 1"),
        ("secure: {least: 2}", 15, "at least 3"),
        ("secure: {degree: 7}", 15, "even"),
        ("secure: {clip: 0}", 15, "more than 0"),
        ("secure: please", 15, "expected a map"),
    ],
)
def test_what_cannot_be_had_of_sums_is_refused_with_its_place(tmp_path: Path, lead: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(write(tmp_path, lead))
    found = [str(problem) for problem in caught.value.problems]
    assert any(said in one for one in found), found
    assert any(f":{line}:" in one for one in str(caught.value).splitlines() + found), (str(caught.value), found)


@pytest.mark.parametrize(
    "lead", ["secure: true", "secure: false", "secure: {least: 4, degree: 8}\n      strategy: fedadam"]
)
def test_what_can_be_had_is_taken(tmp_path: Path, lead: str) -> None:
    prepare(write(tmp_path, lead))


@pytest.mark.parametrize(
    ("lead", "learn", "said"),
    [
        ("rounds: 3", "secure: true", "'lead', which leads the job, asks for updates that it can see"),
        ("secure: true", "secure: 5", "it wants sums of 5 clients at least, and 'lead' is content with 3"),
        ("secure: {least: 5}", "secure: 5", ""),
        ("secure: true", "secure: true", ""),
        ("secure: true", "secure: 2", "at least 3"),
        ("rounds: 3", "secure: true\n      alone: {}", "with 'alone' nothing is sent to anybody"),
    ],
)
def test_a_client_that_would_never_take_part_is_told_of(tmp_path: Path, lead: str, learn: str, said: str) -> None:
    path = write(tmp_path, lead, learn)
    if not said:
        prepare(path)
        return
    with pytest.raises(ConfigError, match=said):
        prepare(path)


def test_those_that_agree_on_who_is_in_a_sum_need_keys_of_each_other(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed: no keys")
    keyring.write_private(tmp_path / "a.key", bytes(range(32)))
    keyring.write_private(tmp_path / "lead.key", bytes(32))
    public = keyring.text_of(Signer(bytes(range(32))).public)
    known = f"devices: {{learn: '{public}'}}"
    lead = f"secure: {{agreed: true}}\n      key: lead.key\n      {known}"
    with pytest.raises(ConfigError, match="needs 'devices': 'lead' has clients sign who is in a sum"):
        prepare(write(tmp_path, lead, "key: a.key"))
    with pytest.raises(ConfigError, match="needs 'key' too: each device signs its part"):
        prepare(write(tmp_path, "secure: true", known))
    prepare(write(tmp_path, lead, f"key: a.key\n      {known}"))


def test_a_site_is_told_at_check_that_the_sums_above_are_not_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "secure: true")
    site = f"  site: {{federate: {{job: below, of: j, {TRAINER}}}}}\n"
    path.write_text(path.read_text() + site + "  rows: {uplink: {sink: jsonl, path: r.jsonl}, from: site}\n")
    with pytest.raises(ConfigError, match="'lead' leads the job above by secure sums, in which a site takes no part"):
        prepare(path)


def test_true_alone_is_a_whole_configuration() -> None:
    rules = config(secure=True).rules()
    assert rules.least == 3
    assert rules.secure is not None
    assert (rules.secure.clip, rules.secure.threshold, rules.secure.least) == (8.0, 2 / 3, 3)
    assert not rules.secure.equal
    assert config(secure=False).rules().secure is None
    assert config().rules().secure is None


def test_each_counts_the_same_where_the_strategy_or_privacy_says_so() -> None:
    assert config(secure=True, strategy={"fedavg": {"weigh": "clients"}}).rules().secure.equal  # type: ignore[union-attr]
    private = config(secure=True, privacy={"clip": 0.5, "noise": 2}).rules().secure
    assert private is not None
    assert (private.equal, private.clip) == (True, 0.5)


def test_a_clients_own_noise_is_hardly_ever_cut() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    local = config(secure=True, privacy={"where": "local", "clip": 0.5, "noise": 2}).rules().secure
    assert local is not None
    assert local.clip == pytest.approx(0.5 * 17)


def config(**options: object) -> Config:
    return validated(Config, {"job": "j", "trainer": {"mlp": {"layers": [4, 2]}}, **options})
