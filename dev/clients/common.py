"""Runs the checks of one client, prints a line per check, and exits with 1 if a check fails."""

import json
import os
import sys
import time
import traceback
import urllib.error
import urllib.request

ROOT = os.environ["SERVER_ROOT"]
BASE = f"{ROOT}/v1"
KEY = os.environ["SERVER_KEY"]
MODEL = os.environ.get("SERVER_MODEL", "nano")
QUESTION = [{"role": "user", "content": "Write a Rust function that adds two numbers."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}

_CHECKS = []


class Skip(Exception):
    """The server does not have the feature."""


def check(function):
    _CHECKS.append(function)
    return function


def request(path, body=None):
    """Sends a request without a client; returns the status and the parsed response."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    call = urllib.request.Request(ROOT + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


# whether the model supports everything that is checked: then a skipped check is a failure
HAS_ALL = os.environ.get("SERVER_MODEL", "nano") == "nano"


def needs_route(path):
    """Skips the check if the server does not have a route."""
    if request(path, {})[0] == 404:
        raise Skip(f"the server has no {path}")


def needs_tools():
    """Skips the check if the server does not call tools."""
    body = {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", "temperature": 0, "max_tokens": 64}
    status, answer = request("/v1/chat/completions", body)
    if status == 400 or not (status == 200 and answer["choices"][0]["message"].get("tool_calls")):
        raise Skip("the server does not call tools")


def needs_schemas():
    """Skips the check if the server does not constrain answers."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    body = {"messages": QUESTION, "response_format": form, "temperature": 0, "max_tokens": 64}
    status, answer = request("/v1/chat/completions", body)
    try:
        assert status == 200 and json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)
    except (ValueError, AssertionError):
        raise Skip("the server does not constrain answers by schemas") from None


def running():
    """The number of answers that the server is generating."""
    status, text = request("/metrics")
    assert status == 200, text
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith("metal_candle_requests_running "))))


def wait_idle(seconds=3.0):
    """Fails unless all slots become free in time."""
    end = time.monotonic() + seconds
    while running() != 0:
        assert time.monotonic() < end, f"{running()} answers are still running"
        time.sleep(0.02)


def main():
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
    failed = skipped = 0
    for function in _CHECKS:
        label = f"{name}: {function.__name__.replace('_', ' ')}"
        try:
            function()
            print(f"ok       {label}", flush=True)
        except Skip as reason:
            skipped += 1
            failed += HAS_ALL
            print(f"{'FAILED' if HAS_ALL else 'skipped'}   {label}: {reason}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED   {label}\n{traceback.format_exc()}", flush=True)
    print(f"{name}: {len(_CHECKS) - failed - (0 if HAS_ALL else skipped)} passed, {failed} failed, {skipped} skipped", flush=True)
    sys.exit(1 if failed else 0)
