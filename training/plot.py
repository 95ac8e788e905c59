"""Draw the log of a run: python -m training.plot RUN"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from training.resumable import LOG

SMOOTH_ROWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    plot(parser.parse_args().run)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log by name, NaN where empty; of steps done twice after a kill, the last."""
    with path.open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    chosen = [rows[step] for step in sorted(rows)]
    return {name: np.array([float(row[name] or "nan") for row in chosen]) for name in chosen[0]}


def plot(run: Path) -> Path:
    """Write RUN/log.png: the weighted loss by noise level, a running mean over SMOOTH_ROWS rows."""
    import matplotlib.pyplot as plt

    log = read_log(run / LOG)
    figure, axes = plt.subplots(figsize=(8, 5))
    for name in (name for name in log if name.startswith("loss")):
        bounds = name.split("_")[1:]
        label = f"{bounds[0]} ≤ sigma < {bounds[1]}" if bounds else "all"
        windows = [log[name][max(0, i - SMOOTH_ROWS) : i] for i in range(1, len(log[name]) + 1)]
        axes.plot(log["step"], [np.nanmean(w) for w in windows], label=label)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "log.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return run / "log.png"


if __name__ == "__main__":
    main()
