"""The server under test of `soak.py`, the requests to it, and the expected answers of the library."""

import asyncio
import collections
import json
import os
import pathlib
import random
import socket
import subprocess
import tempfile
import time

from soak_checks import Reply, read_head, read_pieces

SLOTS, CONTEXT, MAX_WAITING = 8, 1024, 24
DEADLINE = 60  # seconds for any request
ADAPTERS = ("one", "two")
WORDS = "value index count list map text error result option state node key buffer length total offset".split()


def source_text(rng, num_lines):
    lines = [f"let {rng.choice(WORDS)} = {rng.choice(WORDS)}.{rng.choice(WORDS)}({rng.randrange(100)});" for _ in range(num_lines)]
    return "\n    ".join([f"fn {rng.choice(WORDS)}(a: i32) -> i32 {{", *lines, f"let {rng.choice(WORDS)}"])


class Server:
    """The server under test, the requests to it, and the expected answers of the library."""

    def __init__(self, flags):
        self.flags = flags
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
        self.keys = {name: f"{name}-{os.urandom(12).hex()}" for name in ("main", "second", "few", "metered")}
        self.counts, self.times = collections.Counter(), collections.defaultdict(list)
        self.faults, self.samples, self.peak, self.log = [], [], collections.Counter(), open(self.work / "log", "w")
        self.round = 0

    # The server and the library

    def cli(self, *arguments):
        done = subprocess.run([self.flags.binary, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            raise SystemExit(f"`{' '.join(map(str, arguments))}` failed:\n{done.stderr}")
        return done.stdout

    def prepare(self):
        rng = random.Random(self.flags.seed)
        rows = [{"prompt": f"fn value{i}(a: i32) -> i32 {{\n", "completion": f"    a + {rng.randrange(99)}\n}}\n"} for i in range(40)]
        (self.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for index, name in enumerate(ADAPTERS):
            self.cli("train", "--model", self.flags.model, "--data", self.work / "rows.jsonl", "--output", self.work / "root" / name,
                     "--steps", 4 + index, "--batch-tokens", 256, "--rank", 4 + 4 * index, "--seed", index,
                     "--learning-rate", 0.01, "--test-samples", 0, "--quiet")
        self.cases = [self.case(rng, index) for index in range(60)]
        # the same requests with both adapters, for the swapped adapter
        self.twins = []
        for index in range(6):
            body = {"prompt": source_text(rng, 3), "temperature": 0.8 * (index % 2), "seed": index, "max_tokens": 24}
            self.twins.append((body, {name: self.expected("completion", name, body)["text"] for name in ADAPTERS}))

    def case(self, rng, index):
        kind = ("completion", "chat", "completion", "chat", "infill")[index % 5]
        body = {"temperature": rng.choice([0, 0, 0.7, 1.1]), "seed": rng.randrange(1 << 31), "max_tokens": rng.randrange(16, 49)}
        if kind == "infill":
            body |= {"input_prefix": source_text(rng, 2), "input_suffix": ";\n}\n"}
        else:
            body["prompt"] = source_text(rng, rng.choice([1, 2, 4, 20, 30]))
            if rng.random() < 0.3:
                body["stop"] = [rng.choice([";", "\n}", "("])]
        model = (self.flags.model_name, *ADAPTERS)[index % 3]
        return {"kind": kind, "model": model, "body": body} | self.expected(kind, model, body)

    def expected(self, kind, model, body, adapter=None):
        """The answer of the library."""
        prompt = body.get("prompt")
        if kind == "infill":
            prompt = f"<|fim_prefix|>{body['input_prefix']}<|fim_suffix|>{body['input_suffix']}<|fim_middle|>"
        flags = [] if kind == "chat" else ["--raw"]
        adapter = adapter or (self.work / "root" / model if model in ADAPTERS else None)
        flags += ["--adapter", adapter] if adapter else []
        flags += [f"--stop={stop}" for stop in body.get("stop", [])]
        found = json.loads(self.cli("generate", "--json", "--model", self.flags.model, f"--prompt={prompt}", *flags, "--temperature",
                                    body["temperature"], "--seed", body["seed"], "--max-tokens", body["max_tokens"]))
        finish = "length" if found["finish_reason"] in ("max_tokens", "length") else "stop"
        return {"text": found["text"], "finish": finish, "logprobs": found["log_probabilities"], "ids": found["prompt_ids"],
                "usage": (found["prompt_tokens"], found["generated_tokens"])}

    def start(self):
        limits = {"few": "max_running = 2", "metered": "tokens_per_minute = 6000", "main": "admin = true"}
        text = "".join(f'[[keys]]\nname = "{name}"\nkey = "{key}"\n{limits.get(name, "")}\n' for name, key in self.keys.items())
        file = self.work / "keys.toml"
        file.touch(0o600)
        file.write_text(text)
        command = [self.flags.binary, "serve", "--model", self.flags.model, "--served-name", self.flags.model_name, "--port", 0,
                   "--metrics", "--api-key-file", file, "--adapter-root", self.work / "root", "--jobs", self.work / "jobs", "--slots",
                   SLOTS, "--context", CONTEXT, "--max-waiting", MAX_WAITING, *self.flags.serve_flag]
        for name in ADAPTERS:
            command += ["--adapter", f"{name}={self.work / 'root' / name}"]
        # the allocator returns freed memory at once and in small pages, so that the memory of the process equals its allocations
        environment = {"MIMALLOC_PURGE_DELAY": "0", "MIMALLOC_ALLOW_THP": "0"} | os.environ
        self.server = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=self.log, env=environment)
        end = time.monotonic() + 60
        while "http://127.0.0.1:" not in (text := (self.work / "log").read_text()):
            if self.server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.05)
        self.port = int(text.split("http://127.0.0.1:")[1].split()[0].split(":")[0].split("/")[0])

    # Requests

    def head(self, method, path, key, length, headers=()):
        lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", "connection: close", f"content-length: {length}"]
        if key:
            lines.append(f"authorization: Bearer {self.keys.get(key, key)}")
        headers = dict(headers)
        headers.setdefault("content-type", "application/json")
        return ("\r\n".join(lines + [f"{name}: {value}" for name, value in headers.items()]) + "\r\n\r\n").encode()

    async def send(self, kind, raw, pace=None, drop=None, half_close=False):
        """Sends bytes and reads the answer. `pace(count)` waits after a chunk; with `drop` the client disconnects after that time."""
        self.counts[kind] += 1
        started = time.monotonic()
        request = Reply(raw, kind)
        writer = None

        async def exchange():
            nonlocal writer
            connection = socket.socket()
            if pace:  # little is on its way, so that the server notices
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=4096 if pace else 1 << 20)
            try:
                writer.write(raw)
                await writer.drain()
                if half_close:
                    writer.write_eof()
            except ConnectionError:
                pass  # it may answer and close before it has read everything
            await read_head(reader, request)
            async for piece in read_pieces(reader, request):
                request.body += piece
                if pace:
                    await pace(len(request.body))
            return request

        try:
            return await asyncio.wait_for(exchange(), drop if drop is not None else DEADLINE)
        except asyncio.TimeoutError:
            if drop is None:
                request.fail(f"no whole answer within {DEADLINE} s")
            return None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if drop is None and kind != "hostile":
                request.fail(f"the connection broke: {error!r}")
            return request
        finally:
            if writer:
                writer.close()
            self.times[kind].append(time.monotonic() - started)

    async def call(self, kind, path, body=None, key="main", method=None, **more):
        data = b"" if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        return await self.send(kind, self.head(method, path, key, len(data)) + data, **more)

    async def get(self, path, body=None, method=None, statuses=(200,), kind="admin"):
        reply = await self.call(kind, path, body, method=method)
        return reply.expect(*statuses).json()

    async def ask(self, kind, path, body, key="main", **more):
        """Requests an answer; none if the server or the key's limit refuses it as documented."""
        reply = await self.call(kind, path, body, key, **more)
        reason = reply.refusal(is_metered=key == "metered")
        if reason:
            self.counts[f"refused: {reason}"] += 1
            return None
        return reply.expect(200)

    def usage(self):
        process = pathlib.Path(f"/proc/{self.server.pid}")
        lines = dict(line.split(":", 1) for line in (process / "smaps_rollup").read_text().splitlines()[1:])
        threads = (process / "status").read_text().split("Threads:")[1].split()[0]
        return {"memory": int(lines["Pss"].split()[0]) * 1024, "threads": int(threads), "files": len(os.listdir(process / "fd"))}
