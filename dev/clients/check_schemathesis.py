"""Checks `/openapi.json` with `schemathesis`: valid requests get the documented responses, and other requests are refused.

CHECK_EXAMPLES is the number of random requests of a route, and CHECK_SEED a number that makes other ones.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request

from common import BASE, HAS_ALL, KEY, MODEL, ROOT, Skip, check, main, request

ROWS = "".join(json.dumps({"text": f"fn f{number}() {{}}\n" * 4}) + "\n" for number in range(8))

# aliases of routes, which are tested less often
ALIASES = (
    "chat/completions|completions|responses|embeddings|models|v1/health|v1/infill|v1/tokenize|v1/detokenize|v1/apply-template"
)
SETTINGS = f"""
suppress-health-check = ["all"]

[[operations]]
include-path-regex = "^/({ALIASES})$"
phases.coverage.enabled = false
"""


def upload():
    """The id of a training file."""
    parts = {'name="purpose"': "fine-tune", 'name="file"; filename="rows.jsonl"': ROWS}
    body = "".join(f"--x\r\ncontent-disposition: form-data; {head}\r\n\r\n{text}\r\n" for head, text in parts.items())
    headers = {"authorization": f"Bearer {KEY}", "content-type": "multipart/form-data; boundary=x"}
    call = urllib.request.Request(f"{BASE}/files", data=f"{body}--x--\r\n".encode(), headers=headers)
    with urllib.request.urlopen(call, timeout=60) as answer:
        file = json.load(answer)
    assert file["status"] == "processed", file
    return file["id"]


def train(file):
    """A job that has ended, so that there are events, a checkpoint and an adapter."""
    settings = {"model": MODEL, "training_file": file, "metal_candle": {"max_steps": 2, "save_interval": 1, "rank": 2}}
    job = request("/v1/fine_tuning/jobs", settings)[1]
    end = time.monotonic() + 60
    while job["status"] not in ("succeeded", "failed") and time.monotonic() < end:
        time.sleep(0.2)
        job = request(f"/v1/fine_tuning/jobs/{job['id']}")[1]
    assert job["status"] == "succeeded", job
    return job


def close(schema):
    """Allows only documented properties in an object of a response."""
    if isinstance(schema, list):
        for item in schema:
            close(item)
    elif isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for item in schema.values():
            close(item)


def without_large_limits(value):
    """Removes large limits of lists, which would take minutes to reach."""
    if isinstance(value, list):
        for item in value:
            without_large_limits(item)
    elif isinstance(value, dict):
        if value.get("maxItems", 0) > 256:
            del value["maxItems"]
        for item in value.values():
            without_large_limits(item)


def answers(document):
    """The component schemas that responses use."""
    schemas, found = document["components"]["schemas"], {}

    def add(value):
        if isinstance(value, list):
            for item in value:
                add(item)
        elif isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/components/schemas/")
            if name in schemas and name not in found:
                found[name] = schemas[name]
                add(schemas[name])
            for item in value.values():
                add(item)

    add(document["components"]["responses"])
    add([operation["responses"] for path in document["paths"].values() for operation in path.values()])
    return found


@check
def requests_and_responses_match_the_document():
    if not HAS_ALL:
        raise Skip("thousands of requests take too long with models other than the built-in one")
    document = request("/openapi.json")[1]
    close([*answers(document).values(), document["components"]["responses"]])
    close([operation["responses"] for path in document["paths"].values() for operation in path.values()])
    without_large_limits(document)
    file = upload()
    job = train(file)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "openapi.json")
        with open(path, "w") as out:
            json.dump(document, out)
        with open(os.path.join(folder, "schemathesis.toml"), "w") as out:
            out.write(SETTINGS)
        environment = {
            "SERVER_MODEL": MODEL,
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
            "CHECK_VOCABULARY": str(request("/props")[1]["vocab_size"]),
            "CHECK_FILE": file,
            "CHECK_JOB": job["id"],
            "CHECK_ADAPTER": job["fine_tuned_model"],
            "CHECK_CHECKPOINT_FOLDER": f"jobs/{job['id']}/run",
        }
        command = [
            os.path.join(os.path.dirname(sys.executable), "st"), "--config-file", "schemathesis.toml", "run", path, "--url", ROOT,
            "--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--max-examples",
            os.environ.get("CHECK_EXAMPLES", "20"), "--continue-on-failure", "--no-color", "--output-sanitize", "false",
            "--request-timeout", "30",
        ]
        seed = os.environ.get("CHECK_SEED")
        command += ["--seed", seed] if seed else ["--generation-deterministic"]
        ended = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False)
        assert ended.returncode == 0, f"`st run` ended with {ended.returncode}"


main()
