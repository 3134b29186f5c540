"""Measures a running server under load: tokens per second, time to first text (TTFT) and inter-text latency (ITL).

    python3 dev/load.py http://127.0.0.1:8080 [--requests 200] [--concurrency 32] [--tokens 64] [--models a,b]
        [--drop 0.0] [--prompt-tokens 20] [--long-prompts WORDS] [--swap NAME=FOLDER]

Each of `--concurrency` clients sends the next request when its previous one has ended. Prompts differ, and answers have exactly
`--tokens` tokens (`ignore_eos`). `--drop` is the share of requests that are closed after a random time. Works with any server that
has `/v1/completions` (such as llama-server). Once per second, `--long-prompts` sends another request with a prompt of this number of
words, whose answer is not counted, and `--swap` reloads an adapter. Uses only the standard library.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from urllib.parse import urlsplit

WORDS = "fn let impl struct match return self value index number list map string error result option".split()


class Client:
    def __init__(self, flags):
        self.flags = flags
        url = urlsplit(flags.url)
        self.host, self.port = url.hostname, url.port or 80
        self.ttft, self.itl, self.tokens, self.failed, self.dropped, self.refused = [], [], 0, [], 0, 0
        self.beside = 0

    async def request(self, number):
        flags, rng = self.flags, random.Random(number)
        prompt = " ".join(rng.choice(WORDS) for _ in range(flags.prompt_tokens))
        body = {"prompt": f"{number} {prompt}", "max_tokens": flags.tokens, "n_predict": flags.tokens, "stream": True,
                "temperature": 0, "ignore_eos": True}
        models = [name for name in flags.models.split(",") if name]
        if models:
            body["model"] = models[number % len(models)]
        data = json.dumps(body).encode()
        head = (f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(data)}\r\nconnection: close\r\n\r\n")
        drop_after = rng.uniform(0, 1) if rng.random() < flags.drop else None
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        try:
            writer.write(head.encode() + data)
            status = await reader.readline()
            if b" 200 " not in status:
                self.refused += 1
                return
            last, ended = None, False
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    self.failed.append(event["error"])
                    return
                if not (event.get("choices") and event["choices"][0].get("text")):
                    continue
                now = time.perf_counter()
                if last is None:
                    self.ttft.append(now - sent)
                else:
                    self.itl.append(now - last)
                last = now
                if drop_after is not None and now - sent > drop_after:
                    self.dropped += 1
                    return
            if ended:
                self.tokens += flags.tokens
            else:
                self.failed.append("the stream ended without [DONE]")
        except OSError as error:
            self.failed.append(str(error))
        finally:
            writer.close()

    async def send(self, path, body):
        """The status of a request, without waiting for its body."""
        data = json.dumps(body).encode()
        head = (f"POST {path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(data)}\r\nconnection: close\r\n\r\n")
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(head.encode() + data)
        try:
            status = (await reader.readline()).split()[1].decode()
            await reader.read()
        finally:
            writer.close()
        if not status.startswith("2"):
            self.failed.append(f"{path}: status {status}")

    async def each_second(self, path, body):
        """Sends `body(0)`, `body(1)`, ... once per second, without waiting for the previous answer."""
        number, running = 0, set()
        try:
            while True:
                running.add(asyncio.create_task(self.send(path, body(number))))
                self.beside += 1
                number += 1
                await asyncio.sleep(1)
        finally:
            for task in running:
                task.cancel()

    def load_beside(self):
        flags = self.flags
        if flags.long_prompts:
            def prompt(number):
                rng = random.Random(-1 - number)
                return {"prompt": " ".join(rng.choice(WORDS) for _ in range(flags.long_prompts)), "max_tokens": 4,
                        "temperature": 0}
            yield self.each_second("/v1/completions", prompt)
        if flags.swap:
            name, path = flags.swap.split("=", 1)
            yield self.each_second("/v1/adapters", lambda _: {"name": name, "path": path, "replace": True})

    async def run(self):
        numbers = iter(range(self.flags.requests))
        beside = [asyncio.create_task(load) for load in self.load_beside()]

        async def one():
            for number in numbers:
                await self.request(number)

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(self.flags.concurrency)))
        seconds = time.perf_counter() - started
        for task in beside:
            task.cancel()
        return seconds


def milliseconds(values):
    if not values:
        return "none"
    values = sorted(values)
    at = lambda share: 1000 * values[min(len(values) - 1, int(share * len(values)))]
    return f"median {1000 * statistics.median(values):.1f} ms, p95 {at(0.95):.1f} ms, p99 {at(0.99):.1f} ms, largest {at(1):.1f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--models", default="")
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--long-prompts", type=int, default=0)
    parser.add_argument("--swap", default="")
    client = Client(parser.parse_args())
    seconds = asyncio.run(client.run())
    print(f"{client.flags.requests} requests, {client.flags.concurrency} at the same time: {seconds:.1f} s")
    print(f"{client.tokens / seconds:.0f} tokens/s of complete answers")
    print("TTFT:", milliseconds(client.ttft))
    print("ITL:", milliseconds(client.itl))
    if client.beside:
        print(f"{client.beside} additional requests, one per second")
    print(f"refused {client.refused}, dropped by the client {client.dropped}, failed {len(client.failed)}")
    for error in client.failed[:3]:
        print("  ", error)
    raise SystemExit(1 if client.failed else 0)


main()
