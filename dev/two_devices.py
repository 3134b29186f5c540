#!/usr/bin/env python3
"""Trains the same run on one device and on several, and compares losses and speed.

python3 dev/two_devices.py target/release/metal-candle [--num-devices 2] -- --model MODEL --data DATA --steps 100 --batch-tokens 16384

The flags after `--` are passed to `metal-candle train`; the script sets `--output` and `--num-devices`. Prints one JSON object: the
largest difference of a loss (of steps and of evaluations), tokens/s of each run, and their ratio. On CUDA, both runs must use one
build with the feature `nccl`; if its library is not on the default path, add its folder to LD_LIBRARY_PATH.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--num-devices", type=int, default=2)
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    rows, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, arguments.num_devices):
            run = pathlib.Path(folder) / str(count)
            words = [arguments.program, "train", *arguments.flags, "--output", str(run), "--num-devices", str(count), "--test-samples", "0"]
            subprocess.run(words, check=True)
            rows.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
            speeds.append(json.loads((run / "run.json").read_text())["tokens_per_second"])
    assert [(row["event"], row["step"]) for row in rows[0]] == [(row["event"], row["step"]) for row in rows[1]]

    def largest(event):
        differences = [abs(one["loss"] - other["loss"]) for one, other in zip(*rows) if one["event"] == event]
        return max(differences, default=None)

    first = [abs(one["loss"] - other["loss"]) for one, other in zip(*rows) if one["event"] == "step"][:1]
    print(json.dumps({
        "steps": sum(row["event"] == "step" for row in rows[0]),
        "first_step_difference": first[0] if first else None,
        "largest_step_difference": largest("step"),
        "largest_evaluation_difference": largest("evaluation"),
        "tokens_per_second": speeds,
        "ratio": speeds[1] / speeds[0],
    }, indent=1))


if __name__ == "__main__":
    main()
