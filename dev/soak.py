"""Soak test of `metal-candle serve`: runs a mixed load for a long time, checks every answer, and fails if memory or files grow.

    python3 dev/soak.py BINARY [--minutes 60] [--model nano] [--seed 1] [--max-growth 5] [--serve-flag=--speculate]

Starts the server with keys, adapters and jobs. Each round runs clients in parallel, then waits until the server is idle and
samples its memory, threads, files and metrics. The seed determines round R, client C, request I.

Sources of expected answers, before the load:
- `metal-candle generate --json`: texts, finish reasons, token counts, log-probabilities and prompt ids of completions, chats,
  responses, messages and infills, with and without adapters, greedy and seeded; after a job, also with its checkpoint.
- The idle server, once: choices after the first, JSON schemas, tools, grammars, top log-probabilities, scores, embeddings.

The allocator of the server returns freed memory at once (`MIMALLOC_PURGE_DELAY=0`, `MIMALLOC_ALLOW_THP=0`, unless the environment
has other values); with the defaults, the memory of an idle server varies by tens of megabytes.

Prints a summary. Exits with 1 on any fault and prints the request that shows it. Uses only the standard library.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

from soak_checks import Fault, Reply, chat_view, fold, read_head, read_pieces
from soak_hostile import hostile_requests
from soak_server import ADAPTERS, CONTEXT, DEADLINE, SLOTS, Server, source_text

CLIENTS = 10
REST = 11  # seconds: threads that wait for work end after 10, and their memory is free then
MAX_FAULTS = 5
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["a", "bc"]}, "size": {"type": "integer"}},
          "required": ["kind", "size"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
    "additionalProperties": False}, "strict": True}}


class Soak(Server):
    # Clients: each method sends one or a few requests and checks the answers

    async def answer_case(self, rng):
        """Requests an answer of the library, by a suitable route and format."""
        case = rng.choice(self.cases)
        key = rng.choices(list(self.keys), [5, 2, 2, 1])[0]
        body, streams = dict(case["body"]) | {"model": case["model"]}, rng.random() < 0.5
        path = {"chat": rng.choice(["/v1/chat/completions", "/v1/responses", "/v1/messages"]), "infill": "/infill",
                "completion": rng.choice(["/v1/completions", "/v1/completions", "/completion"])}[case["kind"]]
        if case["kind"] == "infill" and rng.random() < 0.4:
            path, body["prompt"], body["suffix"] = "/v1/completions", body.pop("input_prefix"), body.pop("input_suffix")
        is_openai = path in ("/v1/chat/completions", "/v1/completions")
        if path in ("/v1/chat/completions", "/v1/messages"):
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        if path == "/v1/messages":
            body["stop_sequences"] = body.pop("stop", [])
        if path == "/v1/responses":
            if "stop" in body:
                return
            body["input"], body["max_output_tokens"] = body.pop("prompt"), body.pop("max_tokens")
        num_top = rng.choice([None, None, 0, 2]) if is_openai else None
        if num_top is not None:
            body |= {"logprobs": True, "top_logprobs": num_top} if "messages" in body else {"logprobs": num_top}
        if streams:
            body["stream"] = True
            if is_openai and rng.random() < 0.5:
                body["stream_options"] = {"include_usage": True}
        reply = await self.ask(path + (" stream" if streams else ""), path, body, key)
        if not reply:
            return
        answer = fold(reply, path, streams, "stream_options" in body)
        if not answer:
            self.counts["refused: timeout"] += 1
            return
        [choice], usage = answer["choices"], answer["usage"]
        reply.equal("text", choice["text"], case["text"])
        reply.equal("finish", choice["finish"], case["finish"])
        if usage:
            reply.equal("usage", usage, case["usage"])
        if num_top is not None and case["finish"] == "length":
            reply.equal("log-probabilities", choice["logprobs"], case["logprobs"])

    async def several_prompts(self, rng):
        same = collections.defaultdict(list)
        for case in self.cases:
            if case["kind"] == "completion" and case["body"]["temperature"] == 0 and "stop" not in case["body"]:
                same[case["model"]].append(case)
        model, cases = rng.choice(list(same.items()))
        cases = rng.sample(cases, min(3, len(cases)))
        length = min(case["body"]["max_tokens"] for case in cases)
        body = {"model": model, "prompt": [case["body"]["prompt"] for case in cases], "temperature": 0, "max_tokens": length}
        reply = await self.ask("several prompts", "/v1/completions", body, rng.choice(["main", "second"]))
        choices = chat_view(reply, "/v1/completions", False) if reply else []
        for case, choice in zip(cases, choices):
            if not case["text"].startswith(choice["text"].rstrip("\ufffd")):
                reply.equal("text", choice["text"], case["text"])

    async def tokens(self, rng):
        case = rng.choice([case for case in self.cases if case["kind"] == "completion"])
        reply = (await self.call("/tokenize", "/tokenize", {"content": case["body"]["prompt"]}, "second")).expect(200)
        reply.equal("tokens", reply.json()["tokens"], case["ids"])
        reply = (await self.call("/detokenize", "/detokenize", {"tokens": case["ids"]}, "second")).expect(200)
        reply.equal("content", reply.json()["content"], case["body"]["prompt"])

    def references(self):
        """Requests whose expected answers come from the idle server."""
        rng = random.Random(self.flags.seed + 1)
        chat = {"messages": [{"role": "user", "content": source_text(rng, 2)}], "temperature": 0.9, "seed": 3, "max_tokens": 48}
        prompt = {"prompt": source_text(rng, 2), "temperature": 0.9, "seed": 4, "max_tokens": 32}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
        chats = [{"n": 3}, {"n": 4, "logprobs": True, "top_logprobs": 20, "max_tokens": 400, "ignore_eos": True},
                 {"response_format": form}, {"response_format": {"type": "json_object"}}, {"tools": [TOOL]},
                 {"tools": [TOOL], "tool_choice": "required", "max_tokens": 96}, {"guided_regex": "(ab|c){3,9}"},
                 {"grammar": 'root ::= "x" [0-9]+ ";" root | "."'}]
        chats += [dict(more, model=name) for more, name in zip(chats, ADAPTERS * 4)]
        completions = [{"n": 4}, {"echo": True, "logprobs": 3, "max_tokens": 0}, {"echo": True, "logprobs": 1, "n": 2}]
        embeddings = [{"input": [source_text(rng, 2), "x"], "model": name} for name in (self.flags.model_name, *ADAPTERS)]
        return ([("/v1/chat/completions", chat | more) for more in chats] + [("/v1/completions", prompt | more) for more in completions]
                + [("/v1/embeddings", body) for body in embeddings] + [("/apply-template", {"messages": chat["messages"]})])

    async def learn_references(self):
        self.known = []
        for path, body in self.references():
            view = chat_view((await self.call("reference", path, body)).expect(200), path, False)
            self.known.append((path, body, view))

    async def answer_reference(self, rng, pace=None, known=None):
        path, body, view = known or rng.choice(self.known)
        streams = bool(pace) or (path == "/v1/chat/completions" and rng.random() < 0.5)
        kind = "slow reader" if pace else next((name for name in ("tools", "response_format", "guided_regex", "grammar", "n", "echo")
                                                if name in body), path.rsplit("/", 1)[1])
        reply = await self.ask(kind, path, body | ({"stream": True} if streams else {}), rng.choice(["main", "second"]), pace=pace)
        if reply and (found := chat_view(reply, path, streams)) is not None:
            reply.equal("answer", found, view)
            if "response_format" in body and (choice := found[0])["finish"] == "stop":
                json.loads(choice["text"])

    async def slow_reader(self, rng):
        known = next(known for known in self.known if known[1].get("top_logprobs") == 20)
        stalls = iter([rng.uniform(0.5, 2.5) for _ in range(3)])

        async def pace(length):
            await asyncio.sleep(next(stalls, 0) if length % 7 == 0 else 0)

        await self.answer_reference(rng, pace, known)

    async def leave(self, rng):
        """Clients that disconnect: while they wait, during prefill or during the answer."""
        async def one():
            body = {"prompt": source_text(rng, rng.choice([1, 30, 45])), "max_tokens": 400, "ignore_eos": True, "seed": 1,
                    "stream": rng.random() < 0.5, "n": rng.choice([1, 1, 3]), "model": rng.choice([self.flags.model_name, *ADAPTERS])}
            path = rng.choice(["/v1/completions", "/completion", "/v1/embeddings"])
            if path == "/v1/embeddings":
                body["input"] = body["prompt"]
            reply = await self.call("leave", path, body, rng.choice(["main", "second"]), drop=rng.choice([0.002, 0.05, 0.3, 0.8]))
            if reply and reply.status not in (0, 200) and not reply.refusal():
                reply.fail("status")

        await asyncio.gather(*(one() for _ in range(rng.randrange(1, 7))))

    async def flood(self, rng):
        """More requests at the same time than the queue accepts."""
        async def one(index):
            case = self.cases[index % len(self.cases)]
            if case["kind"] == "completion":
                reply = await self.ask("flood", "/v1/completions", case["body"] | {"model": case["model"]}, "second")
                if reply:
                    reply.first_text(case["text"])

        await asyncio.gather(*(one(rng.randrange(1000)) for _ in range(100)))

    async def one_connection(self, rng):
        """Several pipelined requests on one connection."""
        cases = [case for case in self.cases if case["kind"] == "completion"]
        cases = rng.sample(cases, 3)
        raw = b""
        for case in cases:
            data = json.dumps(case["body"] | {"model": case["model"]}).encode()
            raw += self.head("POST", "/v1/completions", "main", len(data)).replace(b"connection: close\r\n", b"") + data
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            writer.write(raw)
            for case in cases:
                reply = Reply(raw, "one connection")
                self.counts["one connection"] += 1
                await asyncio.wait_for(read_head(reader, reply), DEADLINE)
                async for piece in read_pieces(reader, reply):
                    reply.body += piece
                if not reply.refusal():
                    reply.first_text(case["text"])
        finally:
            writer.close()

    async def hostile(self, rng, item=None):
        name, raw, statuses, options = item or rng.choice(self.hostile_list)
        # large bodies one at a time: memory that the allocator retains after their peak is not growth
        async with self.large if len(raw) > 1 << 19 else contextlib.nullcontext():
            reply = await self.send("hostile", raw, **options)
        reply.kind = f"hostile: {name}"
        if 0 in statuses and reply.status == 0 or reply.status == 503 and reply.refusal():
            return
        reply.expect(*statuses)
        # invalid HTTP has an empty answer
        if reply.status >= 400 and (reply.body or 0 not in statuses):
            reply.error_object()

    async def swapped(self, rng):
        """Uses an adapter that others load and unload: the answer must come from one generation."""
        body, texts = rng.choice(self.twins)
        reply = await self.call("swapped adapter", "/v1/completions", body | {"model": f"swap{rng.randrange(2)}"}, "second")
        if reply.status == 404 and reply.error_object()["code"] == "model_not_found" or reply.refusal():
            return
        text = chat_view(reply.expect(200), "/v1/completions", False)[0]["text"]
        if text not in texts.values():
            reply.equal("text", text, texts)

    async def swap(self, rng):
        """Loads, replaces and unloads an adapter; answers must come from the requested generation."""
        name, first, second = f"swap{rng.randrange(2)}", *rng.sample(ADAPTERS, 2)
        body, texts = rng.choice(self.twins)
        old = await self.get("/v1/adapters", {"name": name, "path": first, "replace": True}, statuses=(201,))
        pinned = body | {"adapter": {"name": name, "generation": old["generation"]}}
        # a request that runs while its adapter is replaced
        running = asyncio.create_task(self.ask("pinned adapter", "/v1/completions", pinned))
        await asyncio.sleep(rng.uniform(0, 0.1))
        new = await self.get("/v1/adapters", {"name": name, "path": second, "expected_generation": old["generation"]}, statuses=(201,))
        reply = await running
        if reply:
            reply.first_text(texts[first])
        reply = await self.ask("pinned adapter", "/v1/completions", body | {"adapter": {"name": name, "generation": new["generation"]}})
        if reply:
            reply.first_text(texts[second])
        (await self.call("pinned adapter", "/v1/completions", pinned)).expect(409).error_object()
        if rng.random() < 0.5:
            await self.get(f"/v1/adapters/{name}", method="DELETE")
            await self.get(f"/v1/adapters/{name}", method="DELETE", statuses=(404,))

    async def job(self, rng):
        """Runs a fine-tuning job that ends or is cancelled; its checkpoints are served."""
        data = (self.work / "rows.jsonl").read_bytes()
        form = (b'--xx\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--xx\r\ncontent-disposition: form-data; '
                b'name="file"; filename="../rows.jsonl"\r\n\r\n' + data + b"\r\n--xx--\r\n")
        headers = {"content-type": "multipart/form-data; boundary=xx"}
        file = (await self.send("files", self.head("POST", "/v1/files", "main", len(form), headers) + form)).expect(200).json()["id"]
        is_cancelled, seed = rng.random() < 0.4, rng.randrange(1000)
        steps = {"max_steps": 5000 if is_cancelled else 4, "save_interval": 2, "batch_tokens": 256, "rank": 4, "learning_rate": 0.01}
        body = {"model": self.flags.model_name, "training_file": file, "seed": seed, "suffix": "soak", "metal_candle": steps}
        job = (await self.get("/v1/fine_tuning/jobs", body, kind="job"))["id"]
        path, end = f"/v1/fine_tuning/jobs/{job}", time.monotonic() + DEADLINE
        if is_cancelled:
            await asyncio.sleep(rng.choice([0, 0.2, 1]))
            await self.get(f"{path}/cancel", {}, kind="job")
        while (found := await self.get(path, kind="job"))["status"] not in ("succeeded", "failed", "cancelled"):
            if time.monotonic() > end:
                raise Fault(f"job {body} has not ended after {DEADLINE} s: {found}")
            await asyncio.sleep(0.1)
        if found["status"] != ("cancelled" if is_cancelled else "succeeded"):
            raise Fault(f"job {body} ended as {found}")
        await self.get(f"{path}/events", kind="job")
        for point in (await self.get(f"{path}/checkpoints", kind="job"))["data"] if not is_cancelled else ():
            folder = self.work / "jobs" / "jobs" / job / "run" / "checkpoints" / f"step-{point['step_number']:06}"
            body = {"prompt": "fn value3(a: i32)", "temperature": 0, "seed": 1, "max_tokens": 24}
            name = point["fine_tuned_model_checkpoint"]
            expected = await asyncio.to_thread(self.expected, "completion", None, body, folder)
            reply = await self.ask("checkpoint", "/v1/completions", body | {"model": name})
            if reply:
                reply.first_text(expected["text"])
        for adapter in (await self.get("/v1/adapters"))["data"]:
            if job.removeprefix("ftjob-") in adapter["id"]:
                await self.get(f"/v1/adapters/{adapter['id']}", method="DELETE")
        await self.get(f"/v1/files/{file}", method="DELETE", kind="files")

    # Rounds

    async def guard(self, work, name):
        try:
            await work
        except Fault as fault:
            self.faults.append(f"{name}: {fault}")
        except Exception as error:  # an answer of a shape that no check expects
            self.faults.append(f"{name}: {error!r} at line {error.__traceback__.tb_next and error.__traceback__.tb_next.tb_lineno}")

    async def client(self, number, end):
        plan = [(self.answer_case, 50), (self.answer_reference, 18), (self.several_prompts, 4), (self.tokens, 6), (self.leave, 8),
                (self.hostile, 18), (self.slow_reader, 0.8), (self.flood, 0.4), (self.one_connection, 3), (self.swapped, 6)]
        if number < 2:
            plan = [(self.swap, 1), (self.answer_case, 2)] if number == 0 else [(self.job, 1), (self.answer_case, 8)]
        index = 0
        while time.monotonic() < end and len(self.faults) < MAX_FAULTS and self.server.poll() is None:
            rng = random.Random(f"{self.flags.seed}/{self.round}/{number}/{index}")
            work = rng.choices([work for work, _ in plan], [weight for _, weight in plan])[0]
            await self.guard(work(rng), f"round {self.round}, client {number}, request {index} ({work.__name__})")
            index += 1

    async def watch(self):
        while True:
            for name, value in self.usage().items():
                self.peak[name] = max(self.peak[name], value)
            await asyncio.sleep(0.5)

    async def idle(self):
        """Waits until the server is idle, and samples."""
        end = time.monotonic() + 5
        while True:
            text = (await self.call("metrics", "/metrics")).expect(200).body.decode()
            values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
            adapters = (await self.get("/v1/adapters"))["data"]
            found = [values[f"metal_candle_{name}"] for name in ("requests_running", "requests_waiting", 'kv_slots{state="free"}')]
            found.append(sum(adapter["in_flight"] for adapter in adapters))
            if found == [0, 0, SLOTS, 0]:
                break
            if time.monotonic() > end:
                raise Fault(f"5 s after the last request of round {self.round} running, waiting, free slots, adapters in use: {found}")
            await asyncio.sleep(0.05)
        await asyncio.sleep(REST)
        bytes_of_adapters = sum(adapter["bytes"] for adapter in adapters)
        self.samples.append({"time": time.monotonic(), "adapters": bytes_of_adapters, "metrics": values} | self.usage())

    async def run(self):
        self.large = asyncio.Lock()
        await self.learn_references()
        self.hostile_list = hostile_requests(self)
        # fill every slot once up to the context, so that all pages of the cache are allocated
        full = {"prompt": [source_text(random.Random(i), 50) for i in range(SLOTS)], "max_tokens": CONTEXT, "ignore_eos": True, "seed": 1}
        (await self.call("warm-up", "/v1/completions", full)).expect(200)
        # and compile all grammars, which are cached
        for item in self.hostile_list:
            await self.guard(self.hostile(None, item), "before the load")
        await self.guard(self.idle(), "before the load")
        self.samples.clear()
        watching = asyncio.create_task(self.watch())
        started, seconds = time.monotonic(), self.flags.minutes * 60
        while (now := time.monotonic()) < started + seconds and not self.has_failed():
            self.round += 1
            end = min(now + max(min(60, seconds / 15), 10), started + seconds)
            clients = [self.client(number, end) for number in range(CLIENTS)]
            if self.round % 6 == 2:  # they take up to half a minute
                clients += [self.guard(self.lasting(item), f"round {self.round}, lasting") for item in hostile_requests(self, lasting=True)]
            await asyncio.gather(*clients)
            await self.guard(self.idle(), f"after round {self.round}")
            last = self.samples[-1] if self.samples else self.usage()
            print(f"{(time.monotonic() - started) / 60:.1f} min: {sum(self.counts.values())} requests, {last['memory'] / 1e6:.1f} MB, "
                  f"{last['threads']} threads, {last['files']} files, {len(self.faults)} faults", flush=True)
        watching.cancel()
        self.minutes = (time.monotonic() - started) / 60
        if not self.has_failed():
            self.judge(started)
            await self.guard(self.drain(), "drain")

    def has_failed(self):
        return len(self.faults) >= MAX_FAULTS or self.server.poll() is not None

    async def lasting(self, item):
        name, raw, statuses, options = item
        reply = await self.send("hostile", raw, **options)
        reply.kind = f"hostile: {name}"
        if not (0 in statuses and reply.status == 0):
            reply.expect(*statuses)

    def judge(self, started):
        """After the first third nothing may grow. Compares the second and the last third by their medians, and memory by the lowest
        samples, because the allocator may retain free memory."""
        length = (time.monotonic() - started) / 3
        thirds = [[sample for sample in self.samples if int((sample["time"] - started) / length) == third] for third in (1, 2)]
        if min(map(len, thirds)) < 3:
            print("growth: NOT JUDGED, there are too few samples; run it for longer")
            return
        for name, limit in (("memory", 1e6 * self.flags.max_growth), ("threads", 2), ("files", 1)):
            of = lambda sample: sample[name] - (sample["adapters"] if name == "memory" else 0)
            self.growth = getattr(self, "growth", {})
            level = min if name == "memory" else statistics.median
            first, last = (level(map(of, third)) for third in thirds)
            self.growth[name] = last - first
            if last - first > limit:
                self.faults.append(f"{name} grew from {first:.0f} to {last:.0f}, more than {limit:.0f}; samples: {[of(s) for s in self.samples]}")

    async def drain(self):
        """Sends SIGTERM during answers and a job."""
        body = {"prompt": "fn", "max_tokens": 600, "ignore_eos": True, "stream": True, "seed": 1}
        running = [asyncio.create_task(self.call("drained", "/v1/completions", body | {"seed": i})) for i in range(SLOTS + 4)]
        await asyncio.sleep(0.5)
        children = pathlib.Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split()
        started = time.monotonic()
        self.server.send_signal(signal.SIGTERM)
        for reply in await asyncio.gather(*running):
            if reply.status != 503:
                fold(reply.expect(200), "/v1/completions", True, False, may_fail=True)
        try:
            code = await asyncio.to_thread(self.server.wait, 30 - (time.monotonic() - started))
        except subprocess.TimeoutExpired:
            raise Fault("the server did not exit within 30 s after SIGTERM") from None
        self.drained = time.monotonic() - started
        if code != 0:
            raise Fault(f"exit code {code} after SIGTERM")
        if left := [child for child in children if os.path.exists(f"/proc/{child}")]:
            raise Fault(f"processes {left} of the server are still running")

    def finish(self):
        if self.server.poll() is None:
            self.server.kill()
            self.server.wait()
        elif self.server.returncode != 0:
            self.faults.append(f"the server ended with {self.server.returncode}")
        bad = [line for line in (self.work / "log").read_text().splitlines() if "panicked" in line or "ERROR" in line]
        self.faults += [f"log of the server: {line}" for line in bad[:5]]
        print(f"\nsoak of {getattr(self, 'minutes', 0):.1f} minutes, seed {self.flags.seed}: {self.round} rounds, "
              f"{sum(len(times) for times in self.times.values())} requests\n{'kind':34}{'count':>8}{'p50 ms':>10}{'p99 ms':>10}")
        for kind, times in sorted(self.times.items()):
            times.sort()
            at = lambda share: 1000 * times[min(len(times) - 1, int(share * len(times)))]
            print(f"{kind:34}{len(times):8}{at(0.5):10.1f}{at(0.99):10.1f}")
        for kind in sorted(kind for kind in self.counts if kind.startswith("refused")):
            print(f"{kind:34}{self.counts[kind]:8}")
        if self.samples:
            first, last = self.samples[0], self.samples[-1]
            for name, unit in (("memory", 1e6), ("threads", 1), ("files", 1)):
                growth = getattr(self, "growth", {}).get(name)
                growth = "not judged: too few samples" if growth is None else f"last third - second third {growth / unit:+.1f}"
                print(f"{name + (' MB' if unit > 1 else ''):12} first {first[name] / unit:.1f}, last {last[name] / unit:.1f}, "
                      f"peak {self.peak[name] / unit:.1f}; {growth}")
            metric = lambda name: int(last["metrics"][f"metal_candle_{name}"])
            print(f"slow reader pauses {metric('slow_reader_pauses_total')}, adapters loaded by clients {metric('adapter_swaps_total')}, "
                  f"cancelled answers", metric('requests_total{finish_reason="cancelled"}'))
        if hasattr(self, "drained"):
            print(f"ended {self.drained:.1f} s after SIGTERM with exit code 0")
        for fault in self.faults:
            print(f"FAULT {fault}")
        print(f"FAILED: {len(self.faults)} faults; files are in {self.work}" if self.faults else "passed")
        if not self.faults:
            shutil.rmtree(self.work)
        return 1 if self.faults else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=os.path.abspath)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-growth", type=float, default=5, help="allowed growth of memory in MB, from the second third to the last")
    parser.add_argument("--serve-flag", action="append", default=[])
    flags = parser.parse_args()
    flags.model_name = "base"
    soak = Soak(flags)
    soak.prepare()
    soak.start()
    try:
        asyncio.run(soak.run())
    finally:
        code = soak.finish()
    sys.exit(code)


main()
