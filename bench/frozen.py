"""What a fine-tune writes: bytes of each commit of a real run beside the full size of its state.

    python bench/frozen.py --mebibytes 256 --commits 6

The run is one rank under `ftrain launch`; 18 of 20 layers are frozen. Bytes are those of the packs' files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "scripts" / "frozen.py"
STEPS_PER_COMMIT = 10
TIMEOUT_SECONDS = 1800


def measure(run_dir: Path, mebibytes: int, commits: int, trained: int = 2) -> list[dict[str, Any]]:
    """One row for each commit, in order: `step`, `full_bytes` (of all tensors), `written_bytes`, `refers`."""
    steps = STEPS_PER_COMMIT * commits
    command = [
        *(sys.executable, "-m", "ftrain.cli.main", "launch", "--run-dir", run_dir, "--keep", commits + 1),
        *("--checkpoint-every", STEPS_PER_COMMIT, "--snapshot-every", "off", SCRIPT),
        *("--mebibytes", mebibytes, "--trained", trained, "--steps", steps, "--pause", 0.02 + mebibytes / 2000),
    ]
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    if done.returncode != 0:
        raise SystemExit(f"the run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    rows = []
    for path in sorted(run_dir.glob("checkpoints/step-*/g*/manifest.json")):
        manifest = json.loads(path.read_bytes())["manifest"]
        packs = manifest["packs"]
        rows.append(
            {
                "step": manifest["attempt"]["step"],
                "full_bytes": sum(pack["payload_bytes"] for pack in packs),
                "written_bytes": sum(pack["file_bytes"] for pack in packs),
                "refers": sorted({one["step"] for pack in packs for one in pack.get("refers", ())}),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="of weights")
    parser.add_argument("--commits", type=int, default=6)
    parser.add_argument("--trained", type=int, default=2, help="of 20 layers")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftrain-frozen-") as directory:
        rows = measure(Path(directory) / "run", args.mebibytes, args.commits, args.trained)
    if args.json:
        print(json.dumps(rows))
        return
    print("| step | full, MB | written, MB | share | refers to steps |\n|---|---|---|---|---|")
    for row in rows:
        share = row["written_bytes"] / row["full_bytes"]
        sizes = f"{row['full_bytes'] / 1e6:.1f} | {row['written_bytes'] / 1e6:.1f} | {share:.1%}"
        print(f"| {row['step']} | {sizes} | {', '.join(map(str, row['refers'])) or '-'} |")


if __name__ == "__main__":
    main()
