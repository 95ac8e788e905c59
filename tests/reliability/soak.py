"""A long run through a real ComfyUI server, to see that nothing piles up.

    INFDIT_COMFYUI=folder python -m tests.reliability.soak --jobs 200

A batch of 64 pictures first; then jobs of changing sizes, factors and models from one client, some
of them cancelled or failing; then two clients at once. After every tenth job the same probe must
give the same picture, and says what the server's process holds (`debug_nodes`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import mean

import torch

from tests.reliability.workflows import debug_server, node, pixels, workflow
from tools.comfy_server import ComfyError, ComfyServer

PROBE_EVERY = 10
WARM_UP_PROBES = 4
BATCH = 64
MODELS = ("tiny", "other", "infdit_small")
MAX_FILES, MAX_TENSORS, MAX_RSS_MIB = 2, 10, 40
"""What the mean of the last third of probes may lie above that of the first after warm-up."""
_LIMIT_SECONDS = 600


@dataclass
class Soak:
    """The server and what has happened so far."""

    server: ComfyServer
    outcomes: Counter = field(default_factory=Counter)
    probes: list[dict] = field(default_factory=list)
    picture: torch.Tensor | None = None
    seed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_seed(self) -> int:
        with self.lock:
            self.seed += 1
            return self.seed

    def job(self, random: Random, kinds: tuple[str, ...], client: str = "first") -> None:
        """One job by chance; an outcome that is not that of its kind raises."""
        kind = random.choice(kinds)
        size = (200, 160) if kind == "cancelled" else (random.randint(8, 40), random.randint(8, 40))
        graph = workflow(self.next_seed(), random.choice(MODELS), *size)
        factor = 4.0 if kind == "cancelled" else random.choice((1.0, 2.0, 3.3, 4.0, 5.0))
        graph["upscale"]["inputs"]["upscale_by"] = factor
        if kind == "failed":
            graph["image"] = node("DebugImage", kind="nan")
        try:
            cancel = (lambda _: self.server.interrupt()) if kind == "cancelled" else None
            outputs = self.server.wait(self.server.queue(graph, client), _LIMIT_SECONDS, cancel)
        except ComfyError as error:
            expected = {"cancelled": "was interrupted", "failed": "NaN"}.get(kind, "nothing")
            if expected not in str(error):
                raise
            self.count(kind)
            return
        (made,) = self.server.output_files(outputs)
        expected = tuple(max(1, round(side * factor)) for side in reversed(size))
        if pixels(made).shape[:2] != expected:
            raise ComfyError(f"Expected {expected} px; got {tuple(pixels(made).shape)}.")
        made.unlink()
        self.count("done")

    def count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1

    def batch(self) -> None:
        """Many pictures in one job."""
        graph = workflow(self.next_seed(), width=12, height=9, batch=BATCH)
        made = self.server.output_files(self.server.submit(graph, _LIMIT_SECONDS))
        if len(made) != BATCH:
            raise ComfyError(f"Expected {BATCH} pictures; got {len(made)}.")
        for path in made:
            path.unlink()
        self.count("batches of 64")

    def probe(self) -> None:
        """The same job as ever, whose picture and footprint must be the same."""
        graph = workflow(seed=0)
        graph["counts"] = node("DebugCounts", image=["upscale", 0], tag=self.next_seed())
        outputs = self.server.submit(graph, _LIMIT_SECONDS)
        picture = pixels(self.server.output_files(outputs)[0])
        if self.picture is not None and not torch.equal(picture, self.picture):
            raise ComfyError("Expected the probe's picture to stay the same; it changed.")
        self.picture = picture
        counts = outputs["counts"]["counts"][0]
        self.probes.append(counts)
        print(f"{sum(self.outcomes.values()):5} jobs: {json.dumps(counts)}", flush=True)


def run(soak: Soak, jobs: int) -> None:
    """All phases; the last third of the jobs comes from two clients."""
    random = Random(0)
    kinds = ("done",) * 15 + ("cancelled",) * 4 + ("failed",)
    together = jobs // 3
    soak.batch()
    for i in range(jobs - together):
        if i % PROBE_EVERY == 0:
            soak.probe()
        soak.job(random, kinds)
    soak.probe()
    while together > 0:
        share = min(PROBE_EVERY, together)
        clients = [
            threading.Thread(
                target=_client, args=(soak, Random(f"{together} {name}"), share // 2, name)
            )
            for name in ("first", "second")
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        together -= share
        soak.probe()


def _client(soak: Soak, random: Random, jobs: int, name: str) -> None:
    for _ in range(jobs):
        try:
            soak.job(random, ("done",) * 9 + ("failed",), name)
        except ComfyError as error:
            soak.count(f"WRONG: {error}")


def faults(soak: Soak) -> Iterator[str]:
    """What is not flat, and what went wrong."""
    flat = soak.probes[WARM_UP_PROBES:]
    third = max(1, len(flat) // 3)
    limits = {"tensors": MAX_TENSORS, "files": MAX_FILES, "rss_mib": MAX_RSS_MIB}
    for name, limit in limits.items():
        first, last = (mean(p[name] for p in part) for part in (flat[:third], flat[-third:]))
        print(f"{name}: {first:.1f} after warm-up, {last:.1f} at the end")
        if last - first > limit:
            yield f"{name} grew by {last - first:.1f}, expected at most {limit}"
    yield from (outcome for outcome in soak.outcomes if outcome.startswith("WRONG"))


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run through a real ComfyUI.")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("INFDIT_COMFYUI"))
    options = parser.parse_args()
    if options.jobs < PROBE_EVERY * (WARM_UP_PROBES + 3):
        parser.error(f"expected at least {PROBE_EVERY * (WARM_UP_PROBES + 3)} jobs")
    if options.comfyui is None:
        parser.error("expected --comfyui or INFDIT_COMFYUI: the source folder of a ComfyUI")
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="infdit-soak-", ignore_cleanup_errors=True) as base,
        debug_server(Path(options.comfyui), Path(base)) as server,
    ):
        soak = Soak(server)
        run(soak, options.jobs)
    print(f"{dict(soak.outcomes)} and {len(soak.probes)} probes, {time.monotonic() - start:.0f} s")
    found = list(faults(soak))
    for fault in found:
        print(f"soak: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
