"""Make co2.csv: the weekly CO2 of the air at Mauna Loa, 1958 to 2001, as statsmodels ships it.

    pip install statsmodels
    python examples/anomaly/make_co2.py

The values are left as they are, gaps and all; only the dates are written out.
"""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

OUT = Path(__file__).parent / "co2.csv"


def main() -> None:
    """Write the file."""
    source = Path(import_module("statsmodels.datasets.co2").__file__ or "").parent / "co2.csv"
    with source.open(newline="") as file, OUT.open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["week", "co2_ppm"])
        rows = 0
        for row in csv.DictReader(file):
            day = row["date"]
            table.writerow([f"{day[:4]}-{day[4:6]}-{day[6:8]}T00:00:00Z", row["co2"]])
            rows += 1
    print(f"{OUT}: {rows:,} weeks, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
