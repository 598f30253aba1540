"""``penstock demo``: the whole way on this machine, from camera frames to rows in a database, then what came of it.

It copies the demo's topology and data into a folder, runs them there on the embedded broker, and leaves the folder for a look
and for changes. Works from an installed package, outside any checkout and without a network.
"""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError, RunError

if TYPE_CHECKING:
    from nodes.supervisor import Outcome

FILES = Path(__file__).parent.parent / "demo"
RESULTS = "results.sqlite"


@dataclass(frozen=True)
class Verdict:
    """What the results say of the model on the demo's frames.

    :param frames: rows in the table of predictions.
    :param right: those whose label is the known one.
    """

    frames: int
    right: int
    confused: list[tuple[str, str, int]]

    @property
    def accuracy(self) -> float:
        """Share of right ones."""
        return self.right / self.frames if self.frames else 0.0


def command(
    folder: Annotated[Path, typer.Argument(help="Where to put the demo; made if it is not there.")] = Path(
        "penstock-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> int:
    """Run the demo: frames of handwritten digits are read from a video, prepared, classified by a TFLite model, counted and
    stored, each step a process of its own, over MQTT.
    """
    from nodes.cli.run import conclude, execute, plain
    from nodes.plan import prepare

    topology = unpack(folder)
    plan = prepare(topology)
    if not as_json:
        print(
            f"running {topology}: {' → '.join(name for name, node in plan.nodes.items() if node.consumers)} → …",
            flush=True,
        )
    outcome = execute(plan, fresh=True, level="warning", live=not as_json)
    if not outcome.complete:
        return conclude(outcome, as_json=as_json)
    verdict = judge(folder / RESULTS)
    if as_json:
        import msgspec

        found = {"frames": verdict.frames, "right": verdict.right, "accuracy": verdict.accuracy}
        print(msgspec.json.encode({**plain(outcome), "demo": found, "results": str(folder / RESULTS)}).decode())
        return 0 if not outcome.findings else 5
    code = conclude(outcome)
    print("\n".join(told(outcome, verdict, folder)))
    return code


def unpack(folder: Path) -> Path:
    """Copy the demo into ``folder``; results of an earlier one are removed. Gives the topology's path.

    :raises ConfigError: there is something else of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is there and is no folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "topology.yaml").exists():
        raise ConfigError(f"{folder} is there, and not from a demo; name another: penstock demo FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES.iterdir():
            if file.suffix in {".yaml", ".mkv", ".csv", ".tflite", ".txt"} and not _same(file, folder / file.name):
                shutil.copyfile(file, folder / file.name)
        for name in (RESULTS, f"{RESULTS}-wal", f"{RESULTS}-shm"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    return folder / "topology.yaml"


def _same(one: Path, other: Path) -> bool:
    """A topology that the user has changed stays as it is; so does everything that is there already."""
    return other.exists() and (one.suffix == ".yaml" or one.stat().st_size == other.stat().st_size)


def judge(path: Path) -> Verdict:
    """Compare the predictions with the known labels.

    :raises RunError: the run left no table of predictions.
    """
    db = sqlite3.connect(path)
    try:
        frames, right = db.execute("SELECT count(*), coalesce(sum(label = known_label), 0) FROM predictions").fetchone()
        confused = db.execute(
            "SELECT known_label, label, count(*) AS n FROM predictions WHERE label <> known_label"
            " GROUP BY 1, 2 ORDER BY n DESC, 1, 2 LIMIT 3"
        ).fetchall()
    except sqlite3.Error as error:
        raise RunError(f"{path}: {error}") from error
    finally:
        db.close()
    return Verdict(frames, right, confused)


def told(outcome: Outcome, verdict: Verdict, folder: Path) -> list[str]:
    """The last lines: what came of it and where it is."""
    from nodes.cli._books import span

    books = outcome.ledgers
    camera, store = books["camera"], books["store"]
    frames = sum(flow.messages for flow in camera.emitted.values())
    lines = [
        "",
        f"frames in        {frames}",
        f"predictions out  {verdict.frames}",
        f"accuracy         {verdict.accuracy:.1%} ({verdict.right} of {verdict.frames} as labelled)",
    ]
    if verdict.confused:
        mistaken = ", ".join(f"{known} for {said} ({n}×)" for known, said, n in verdict.confused)
        lines.append(f"most mistaken    {mistaken}")
    if (age := store.latency.get("since-source")) is not None:
        lines.append(f"camera to row    {span(age['p50'])} p50, {span(age['p99'])} p99")
    if busy := _busy_seconds(outcome):
        lines.append(f"throughput       {frames / busy:.0f} frames/s")
    lines += [
        f"results          {folder / RESULTS} (tables predictions, rates)",
        "look             open it with sqlite3 or any viewer; the view predictions_iso has readable times",
        f"change it        edit {folder / 'topology.yaml'}, then: penstock run {folder / 'topology.yaml'}",
    ]
    return lines


def _busy_seconds(outcome: Outcome) -> float:
    """Seconds from the first node's being ready to the end of the sink's stream."""
    views: list[Any] = list(outcome.nodes.values())
    began = max((view.ready_at for view in views), default=0.0)
    ended = max((view.left_at for view in views if view.kind == "uplink"), default=0.0)
    return max(0.0, ended - began) if began and ended else 0.0
