"""Reads HTTP answers for `soak.py` and converts those of all routes, plain and streamed, to one format."""

import functools
import json

REFUSALS = {503: ("queue_full", "timeout"), 429: ("rate_limit_exceeded",)}
SHOWN = 3000


class Fault(Exception):
    """A fault of the server, with the request that shows it."""


class Reply:
    """An answer, with the bytes of its request."""

    def __init__(self, request, kind):
        self.request, self.kind = request, kind
        self.status, self.headers, self.body = 0, {}, b""

    def fail(self, why):
        # keys are for this run only
        lines = [line for line in self.request.split(b"\r\n") if not line.startswith(b"authorization")]
        request = b"\r\n".join(lines)
        cut = f" ... ({len(request)} bytes)" if len(request) > SHOWN else ""
        raise Fault(f"{self.kind}: {why}\n--- request\n{request[:SHOWN].decode(errors='backslashreplace')}{cut}\n--- answer {self.status} "
                    f"{self.headers}\n{self.body[:SHOWN].decode(errors='backslashreplace')}\n---")

    def expect(self, *statuses):
        if self.status not in statuses:
            self.fail(f"status {self.status}, expected {' or '.join(map(str, statuses))}")
        return self

    def equal(self, what, found, expected):
        if found != expected:
            self.fail(f"{what}: expected {expected!r}, found {found!r}")

    def json(self):
        try:
            return json.loads(self.body)
        except ValueError as error:
            self.fail(f"the body is not JSON: {error}")

    def first_text(self, expected):
        """Checks the text of the first choice of a completion."""
        self.equal("text", fold(self, "/v1/completions", False, False)["choices"][0]["text"], expected)

    def error_object(self):
        """The error of an unsuccessful answer, in the format of OpenAI or Anthropic."""
        error = self.json().get("error")
        if b"/v1/messages" in self.request.split(b"\r\n", 1)[0]:
            if self.json().get("type") != "error" or not isinstance(error.get("type"), str):
                self.fail("the error has not the form of Anthropic")
        elif not (isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error)
                  and isinstance(error["code"], (str, type(None))) and isinstance(error["param"], (str, type(None)))):
            self.fail("the error has not the form of OpenAI")
        if not error["message"] or "/tmp" in error["message"]:
            self.fail("the message of the error is empty or has a path")
        return error

    def refusal(self, is_metered=False):
        """Why the server or a limit of the key refused the request, if the refusal is as documented."""
        if self.status != 503 and not (self.status == 429 and is_metered):
            return None
        error = self.error_object()
        if b" /v1/messages" not in self.request[:40] and error["code"] not in REFUSALS[self.status]:
            self.fail("code of the refusal")
        if not self.headers.get("retry-after", "").isdigit():
            self.fail("a refusal without `retry-after`")
        return f"{self.status}"


def of_reply(check):
    """A check whose exceptions are faults, because the answer has an unexpected shape."""
    @functools.wraps(check)
    def checked(reply, *arguments, **options):
        try:
            return check(reply, *arguments, **options)
        except Fault:
            raise
        except Exception as error:
            reply.fail(f"an answer with an unexpected shape: {error!r}")
    return checked


async def read_head(reader, reply):
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("closed without an answer")
    reply.status = int(line.split()[1])
    while (line := (await reader.readline()).strip()):
        name, _, value = line.decode().partition(":")
        reply.headers[name.lower()] = value.strip()


async def read_pieces(reader, reply):
    if "chunked" in reply.headers.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    else:
        left = int(reply.headers.get("content-length", 0))
        while left:
            piece = await reader.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionResetError("the body was truncated")
            left -= len(piece)
            yield piece


def events_of(reply):
    """The events of a stream, as pairs of name and data."""
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        reply.fail("expected a stream")
    text = reply.body.decode()
    if not text.endswith("\n\n"):
        reply.fail("the stream ends within an event")
    events = []
    for block in text[:-2].split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.split("\n"))
        if "data" not in fields or not set(fields) <= {"data", "event"}:
            reply.fail(f"malformed event {block!r}")
        events.append((fields.get("event"), fields["data"]))
    return events


def failure(reply, data):
    """Whether an event is the error of a request that waited too long; any other error is a fault."""
    error = data.get("error")
    if error and error.get("code") != "timeout":
        reply.fail("the stream has an error")
    return bool(error)


def chat_of(message, logprobs, finish):
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    tops = [[(top["token"], top["logprob"]) for top in token["top_logprobs"]] for token in (logprobs or {}).get("content", [])]
    return {"text": message["content"] or "", "calls": calls, "finish": finish, "tops": tops,
            "logprobs": [token["logprob"] for token in (logprobs or {}).get("content", [])]}


def openai_events(reply, wants_usage, may_fail):
    """Checks the common properties of chat and completion streams; returns the choices of all chunks, and the usage."""
    events = [data for name, data in events_of(reply)]
    if events[-1] != "[DONE]":
        if failure(reply, json.loads(events[-1])) or may_fail and "error" in events[-1]:
            return None, None
        reply.fail("the stream does not end with [DONE]")
    chunks = [json.loads(data) for data in events[:-1]]
    if len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) != 1:
        reply.fail("chunks differ in `id`, `created`, `model` or `object`")
    usage = None
    if wants_usage:
        last = chunks.pop()
        if last["choices"] or not last.get("usage"):
            reply.fail("the last chunk has no usage")
        usage = last["usage"]
    if any(not chunk["choices"] or chunk.get("usage") for chunk in chunks):
        reply.fail("usage in a chunk that is not the last, or unasked")
    ended = set()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for choice in choices:
        if choice["index"] in ended:
            reply.fail("a choice continues after its end")
        if choice["finish_reason"]:
            ended.add(choice["index"])
    if ended != {choice["index"] for choice in choices}:
        reply.fail("a choice does not end")
    return choices, usage


def chat_stream(reply, wants_usage=False, may_fail=False):
    choices, usage = openai_events(reply, wants_usage, may_fail)
    if choices is None:
        return None, None
    found = {}
    for choice in choices:
        index, delta = choice["index"], choice["delta"]
        if index not in found and "role" not in delta and delta:
            reply.fail("the first delta has no role")
        if index in found and "role" in delta:
            reply.fail("a second role")
        if not delta and not choice["finish_reason"]:
            continue  # keeps the connection alive
        one = found.setdefault(index, {"message": {"content": "", "tool_calls": []}, "logprobs": [], "finish": None})
        one["message"]["content"] += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            calls = one["message"]["tool_calls"]
            if "id" in part:
                if part["index"] != len(calls) or part["type"] != "function":
                    reply.fail("a call out of order")
                calls.append({"function": {"name": part["function"]["name"], "arguments": ""}})
            calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments", "")
        one["logprobs"] += (choice["logprobs"] or {}).get("content", [])
        one["finish"] = choice["finish_reason"] or one["finish"]
    if list(found) != sorted(found):
        reply.fail("choices start out of order")
    return [chat_of(one["message"], {"content": one["logprobs"]}, one["finish"]) for one in found.values()], usage


def completion_stream(reply, wants_usage, may_fail):
    choices, usage = openai_events(reply, wants_usage, may_fail)
    found = {}
    for choice in choices or ():
        one = found.setdefault(choice["index"], {"text": "", "logprobs": [], "finish": None})
        one["text"] += choice["text"]
        one["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
        one["finish"] = choice["finish_reason"] or one["finish"]
    return (None if choices is None else list(found.values())), usage


def response_form(response):
    texts = [part["text"] for item in response["output"] for part in item["content"]]
    usage = response["usage"] and (response["usage"]["input_tokens"], response["usage"]["output_tokens"])
    return "".join(texts), {"completed": "stop", "incomplete": "length"}[response["status"]], usage


def message_form(message, text):
    usage = message["usage"]
    prompt = sum(usage[name] for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
    finish = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}[message["stop_reason"]]
    return {"choices": [{"text": text, "finish": finish}], "usage": (prompt, usage["output_tokens"])}


@of_reply
def fold(reply, path, streams, wants_usage, may_fail=False):
    """The choices (text, finish, logprobs) and the usage (prompt, completion) of an answer; none if the request waited too long."""
    if path == "/v1/responses":
        response = reply.json() if not streams else None
        if streams:
            events = [(name, json.loads(data)) for name, data in events_of(reply)]
            if events[-1][0] == "error" or events[-1][0] is None:
                return None if failure(reply, events[-1][1]) else reply.fail("the stream has an error")
            if [data["sequence_number"] for _, data in events] != list(range(len(events))) or events[0][0] != "response.created":
                reply.fail("events out of order")
            if any(name != data["type"] for name, data in events):
                reply.fail("the name of an event is not its type")
            response = events[-1][1]["response"]
            deltas = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
            reply.equal("deltas", deltas, response_form(response)[0])
        text, finish, usage = response_form(response)
        return {"choices": [{"text": text, "finish": finish}], "usage": usage}
    if path == "/v1/messages":
        if not streams:
            message = reply.json()
            return message_form(message, "".join(part["text"] for part in message["content"]))
        events = [(name, json.loads(data)) for name, data in events_of(reply)]
        if events[-1][1].get("error"):
            if events[-1][1]["error"]["type"] not in ("overloaded_error", "timeout_error"):
                reply.fail("the stream has an error")
            return None
        names = [name for name, _ in events if name not in ("ping", "content_block_delta")]
        blocks = (len(names) - 3) // 2
        blocks = ["content_block_start", "content_block_stop"] * blocks
        reply.equal("events", names, ["message_start", *blocks, "message_delta", "message_stop"])
        text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
        last = next(data for name, data in events if name == "message_delta")
        return message_form(last["delta"] | {"usage": last["usage"]}, text)
    if path in ("/completion", "/infill"):
        last = reply.json() if not streams else None
        text = last["content"] if last else ""
        if streams:
            events = [json.loads(data) for _, data in events_of(reply)]
            last = events[-1]
            if failure(reply, last):
                return None
            if [event["stop"] for event in events] != [False] * (len(events) - 1) + [True]:
                reply.fail("the stream does not end with `stop`")
            text = "".join(event["content"] for event in events)
        finish = {"limit": "length", "eos": "stop", "word": "stop"}[last["stop_type"]]
        return {"choices": [{"text": text, "finish": finish}], "usage": (last["tokens_evaluated"], last["tokens_predicted"])}
    if streams:
        read = chat_stream if path == "/v1/chat/completions" else completion_stream
        choices, usage = read(reply, wants_usage, may_fail)
        if choices is None:
            return None
    else:
        answer = reply.json()
        choices, usage = chat_view(reply, path, False), answer["usage"]
    return {"choices": choices, "usage": usage and (usage["prompt_tokens"], usage["completion_tokens"])}


@of_reply
def chat_view(reply, path, streams):
    """The reproducible part of an answer: everything except ids, times and cache counts."""
    if path == "/v1/chat/completions":
        if streams:
            return chat_stream(reply)[0]
        choices = reply.json()["choices"]
        return [chat_of(choice["message"], choice["logprobs"], choice["finish_reason"]) for choice in choices]
    answer = reply.json()
    if path == "/v1/completions":
        return [{"text": choice["text"], "finish": choice["finish_reason"], "all": choice["logprobs"],
                 "logprobs": (choice["logprobs"] or {}).get("token_logprobs", [])} for choice in answer["choices"]]
    return answer.get("data", answer)
