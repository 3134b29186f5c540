"""Checks the `anthropic` package: messages, streams, token counts and errors."""

import anthropic
from anthropic import Anthropic

from common import KEY, MODEL, QUESTION, ROOT, TOOL, check, main, needs_route, needs_tools, request, wait_idle

client = Anthropic(base_url=ROOT, api_key=KEY, max_retries=0, timeout=60)
# the package no longer has an argument for it
GREEDY = {"temperature": 0}
FIELDS = {"model": MODEL, "messages": QUESTION, "max_tokens": 40, "extra_body": GREEDY}
FUNCTION = TOOL["function"]
TOOLS = [{"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}]


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def strict(value):
    type(value).model_validate(value.model_dump(), strict=True)
    return value


@check
def messages():
    needs_route("/v1/messages")
    answer = strict(client.messages.create(**FIELDS))
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    assert text_of(answer) == request("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert answer.id.startswith("msg_") and answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 40
    blocks = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    with_system = client.messages.create(**{**FIELDS, "messages": blocks, "system": system})
    assert text_of(with_system) == text_of(client.messages.create(**FIELDS, system="Be short."))


@check
def counts():
    needs_route("/v1/messages/count_tokens")
    usage = client.messages.create(**FIELDS).usage
    prompt = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens == prompt


@check
def stop_sequences():
    needs_route("/v1/messages")
    text = text_of(client.messages.create(**FIELDS))
    stop = text[10:14]
    answer = client.messages.create(**FIELDS, stop_sequences=["never there", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text_of(answer) == text[: text.index(stop)]


@check
def stream_helper():
    needs_route("/v1/messages")
    plain = client.messages.create(**FIELDS)
    with client.messages.stream(**FIELDS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(plain)
    assert (final.stop_reason, final.usage.output_tokens) == (plain.stop_reason, plain.usage.output_tokens)
    kinds = [strict(event).type for event in client.messages.create(stream=True, **FIELDS)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@check
def errors_are_typed():
    needs_route("/v1/messages")

    def fails(kind, name, **fields):
        try:
            client.messages.create(**{**FIELDS, **fields})
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["type"] == name, error.body
            assert isinstance(error.body["error"]["message"], str)
            return
        raise AssertionError(f"no error for {fields}")

    bad = anthropic.BadRequestError
    fails(anthropic.NotFoundError, "not_found_error", model="claude-9")
    fails(bad, "invalid_request_error", max_tokens=0)
    fails(bad, "invalid_request_error", messages=[])
    image = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
    fails(bad, "invalid_request_error", messages=[{"role": "user", "content": [image]}])
    fails(bad, "invalid_request_error", messages=[{"role": "user", "content": "word " * 20000}])
    fails(bad, "invalid_request_error", extra_body={"mcp_servers": [{"type": "url"}]})
    fails(bad, "invalid_request_error", tools=[{"type": "web_search_20250305", "name": "web_search"}])
    try:
        Anthropic(base_url=ROOT, api_key="wrong", max_retries=0).messages.create(**FIELDS)
        raise AssertionError("no error for a wrong key")
    except anthropic.AuthenticationError as error:
        assert error.body["type"] == "error", error.body


@check
def closing_a_stream_frees_its_slot():
    needs_route("/v1/messages")
    wait_idle()
    with client.messages.stream(**{**FIELDS, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}) as stream:
        next(iter(stream.text_stream))
    wait_idle()


@check
def tool_calls():
    needs_route("/v1/messages")
    needs_tools()
    fields = {**FIELDS, "max_tokens": 200, "tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    plain = strict(client.messages.create(**fields))
    call = next(block for block in plain.content if block.type == "tool_use")
    assert plain.stop_reason == "tool_use" and call.name == "add" and set(call.input) == {"a", "b"}
    with client.messages.stream(**fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    found = next(block for block in final.content if block.type == "tool_use")
    assert (found.name, found.input, final.stop_reason) == (call.name, call.input, "tool_use")
    talk = QUESTION + [
        {"role": "assistant", "content": [block.model_dump() for block in plain.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "3"}]},
    ]
    assert client.messages.create(**{**FIELDS, "messages": talk, "tools": TOOLS}).usage.output_tokens > 0


main()
