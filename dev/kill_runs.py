"""Kills training runs at random moments, resumes them, and compares all their files with those of an uninterrupted run.

`python dev/kill_runs.py --binary target/release/metal-candle --kills 300`. A third of the kills are at any moment, a third shortly after a
start, and a third as soon as a temporary file appears. After each kill, `--resume` continues the run; if there is no run yet, the first
command is repeated. In the end, every file must contain the same bytes, and no other file may exist.
"""

import argparse
import json
import pathlib
import random
import shutil
import subprocess
import tempfile
import time

NANO = pathlib.Path(__file__).parent.parent / "assets" / "nano"
# these files contain times
TIMED = ("run.json", "tfevents", "loss.svg")


def tiny_model(binary, folder):
    """A model of one block with random weights and nano's tokenizer."""
    source = folder / "source"
    source.mkdir()
    for path in NANO.glob("tokenizer*.json"):
        shutil.copy(path, source)
    config = json.loads((NANO / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config.pop("head_dim", None)
    (source / "config.json").write_text(json.dumps(config))
    command = [binary, "train", "--model", source, "--data", folder / "data.jsonl", "--full", "--from-scratch", "--steps", "1",
               "--test-samples", "0", "--output", folder / "first"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "first" / "model"


def files(folder):
    """All files of a run, by name; files with times by name only."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
        elif any(part in name for part in TIMED):
            found["tfevents" if "tfevents" in name else name] = "file"
        else:
            found[name] = path.read_bytes()
    return found


def has_temporary(folder):
    return any("tmp" in path.name for path in folder.rglob("*")) if folder.exists() else False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True, type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFF)
    flags = parser.parse_args()
    binary, draw = flags.binary.resolve(), random.Random(flags.seed)
    print(f"seed {flags.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rows = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(12) for b in range(12)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = tiny_model(binary, folder)
        words = ["train", "--model", model, "--data", folder / "data.jsonl", "--steps", "24", "--batch-tokens", "64", "--save-interval", "2",
                 "--eval-interval", "5", "--dropout", "0.1", "--test-samples", "0", "--output"]
        run = lambda output: [binary, *words, output]
        began = time.time()
        subprocess.run(run(folder / "whole"), check=True, capture_output=True)
        whole_time = time.time() - began
        whole = files(folder / "whole")
        kills = {"any moment": 0, "first moments": 0, "temporary file": 0}
        num_runs = num_again = 0
        while sum(kills.values()) < flags.kills:
            cut = folder / "cut"
            num_runs += 1
            command, is_done = run(cut), False
            while not is_done:
                kind = draw.choice(list(kills)) if sum(kills.values()) < flags.kills and draw.random() < 0.85 else None
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                limit = {"any moment": whole_time * draw.random(), "first moments": 0.15 * draw.random()}.get(kind, 60)
                end = time.time() + limit
                while process.poll() is None and time.time() < end and not (kind == "temporary file" and has_temporary(cut)):
                    time.sleep(0.0005)
                if process.poll() is None:
                    process.kill()
                    kills[kind] += 1
                    process.wait()
                    command = [binary, "train", "--resume", cut]
                elif process.returncode == 0:
                    is_done = True
                elif command[2] == "--resume":
                    # killed before there was a run
                    num_again += 1
                    command = run(cut)
                else:
                    raise SystemExit(f"after {kills}: {process.stderr.read().decode()}")
            found = files(cut)
            if found != whole:
                names = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
                shutil.copytree(cut, "killed-run", dirs_exist_ok=True)
                raise SystemExit(f"after {kills}: the files differ from those of the uninterrupted run: {names}; see killed-run/")
            shutil.rmtree(cut)
        print(f"{sum(kills.values())} kills in {num_runs} runs ({kills}); {num_again} starts were repeated; all files are equal, none are left behind")


if __name__ == "__main__":
    main()
