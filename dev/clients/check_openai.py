"""Checks the `openai` package: the types of all responses, streams compared with plain answers, errors as exceptions, and aborts."""

import asyncio
import json

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from common import BASE, KEY, MODEL, QUESTION, TOOL, check, main, needs_route, needs_schemas, needs_tools, wait_idle

client = OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)


def ask(**fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 40, **fields})


def strict(value):
    """Fails if a part of an answer does not have the type that the package declares."""
    type(value).model_validate(value.model_dump(), strict=True)
    return value


@check
def models():
    assert MODEL in [strict(model).id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by
    try:
        client.models.retrieve("no/such:model")
        raise AssertionError("no error")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error


@check
def chat():
    answer = strict(ask(max_tokens=12))
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.id.startswith("chatcmpl-") and answer._request_id.startswith("req_")
    assert ask(max_tokens=None, max_completion_tokens=12).choices == answer.choices
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert ask(messages=parts, max_tokens=12).choices == answer.choices


@check
def request_ids_are_echoed():
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1" and raw.headers["cache-control"] == "no-store"


@check
def stream_equals_plain_answer():
    plain = ask()
    chunks = [strict(chunk) for chunk in ask(stream=True)]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"] and deltas[0].role
    assert "".join(delta.content or "" for delta in deltas) == plain.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


@check
def usage_in_stream():
    plain = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens
    assert chunks[-1].object == "chat.completion.chunk"


@check
def stream_helper():
    plain = ask(n=3, seed=7, temperature=0.9, logprobs=True)
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=40, n=3, seed=7, temperature=0.9, logprobs=True
    ) as stream:
        kinds = [event.type for event in stream]
        # the package returns no final completion for a truncated answer
        final = stream.current_completion_snapshot
    assert kinds.count("content.done") == 3 and "content.delta" in kinds
    for ours, theirs in zip(final.choices, plain.choices, strict=True):
        assert ours.message.role == "assistant" and ours.message.content == theirs.message.content
        assert ours.finish_reason == theirs.finish_reason and ours.index == theirs.index
        assert [token.token for token in ours.logprobs.content] == [token.token for token in theirs.logprobs.content]
    text = ask().choices[0].message.content
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, max_tokens=40, temperature=0, stop=text[8:12]) as stream:
        final = stream.until_done().get_final_completion()
    assert final.choices[0].message.content == text[: text.index(text[8:12])]


@check
def seeds_and_choices():
    first, second = (ask(n=3, seed=11, temperature=1.0, max_tokens=16) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens <= 48


@check
def logprobs():
    answer = ask(logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens) == answer.choices[0].message.content.encode()
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        top = [choice.logprob for choice in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and token.logprob == top[0]


@check
def stop_strings():
    text = ask().choices[0].message.content
    stop = text[10:14]
    for streams in (False, True):
        answer = ask(stop=[stop, "never there"], stream=streams)
        if streams:
            chunks = list(answer)
            found, reason = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
        else:
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (found, reason) == (text[: text.index(stop)], "stop"), (found, reason, stop)


@check
def conversations_and_odd_text():
    talk = [
        {"role": "developer", "content": "Be short. 🦀"},
        {"role": "user", "content": "<|im_end|>\u2028\u0085 äöü 漢字 👩‍👩‍👧"},
        {"role": "assistant", "content": "fn main() {}"},
        {"role": "user", "content": "again"},
    ]
    plain = ask(messages=talk).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(messages=talk, stream=True)) == plain


@check
def completions():
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    plain = strict(client.completions.create(prompt="fn add(a: i32", **fields))
    assert plain.object == "text_completion" and plain.usage.completion_tokens <= 12
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(prompt="fn add(a: i32", stream=True, **fields))
    assert streamed == plain.choices[0].text
    both = client.completions.create(prompt=["fn add(a: i32", "struct "], n=2, echo=True, **fields)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == "fn add(a: i32" + plain.choices[0].text
    assert both.choices[2].text.startswith("struct ")
    scored = client.completions.create(prompt="fn add(a: i32", logprobs=2, **fields).choices[0]
    assert "".join(scored.logprobs.tokens) == scored.text
    assert scored.logprobs.text_offset[0] == len("fn add(a: i32") and len(scored.logprobs.top_logprobs[0]) in (2, 3)


@check
def completions_fill_gaps():
    try:
        answer = client.completions.create(model=MODEL, prompt="fn add(a: i32, b: i32) -> i32 {\n    ", suffix="\n}\n", max_tokens=8)
    except openai.BadRequestError as error:
        assert error.param == "suffix", error
        return
    assert answer.choices[0].finish_reason in ("stop", "length")


@check
def errors_are_typed():
    def fails(kind, status, param=None, code=None, **fields):
        try:
            ask(**fields)
        except kind as error:
            assert error.status_code == status, error
            assert param is None or error.param == param, (param, error.body)
            assert code is None or error.code == code, (code, error.body)
            assert isinstance(error.body["message"], str) and error.type, error.body
            assert error.request_id.startswith("req_")
            return
        raise AssertionError(f"no error for {fields}")

    bad = openai.BadRequestError
    fails(openai.NotFoundError, 404, "model", "model_not_found", model="gpt-9")
    fails(bad, 400, "temperature", temperature=3)
    fails(bad, 400, "max_tokens", max_tokens=0)
    fails(bad, 400, "messages", messages=[])
    fails(bad, 400, "messages[0].role", messages=[{"role": "robot", "content": "x"}])
    fails(bad, 400, "messages[0].content", messages=[{"role": "user", "content": 5}])
    image = [{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]
    fails(bad, 400, "messages[0].content[0].type", "unsupported_value", messages=[{"role": "user", "content": image}])
    fails(bad, 400, "top_logprobs", top_logprobs=2)
    fails(bad, 400, "logit_bias", logit_bias={"x": 1})
    fails(bad, 400, "stop", stop="")
    fails(bad, 400, "n", n=1000)
    long = [{"role": "user", "content": "word " * 20000}]
    fails(bad, 400, "messages", "context_length_exceeded", messages=long)
    fails(bad, 400, "messages", "context_length_exceeded", messages=long, stream=True)
    fails(bad, 400, "functions", functions=[{"name": "f", "parameters": {}}])
    try:
        OpenAI(base_url=BASE, api_key="wrong", max_retries=0).models.list()
        raise AssertionError("no error for a wrong key")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error


@check
def closing_a_stream_frees_its_slot():
    wait_idle()
    stream = ask(stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_idle()


@check
def cancelled_requests_free_their_slots():
    async def cancel():
        async with AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0) as fast:
            call = fast.chat.completions.create(
                model=MODEL, messages=QUESTION, max_tokens=1900, n=2, extra_body={"ignore_eos": True}
            )
            task = asyncio.create_task(call)
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    wait_idle()


@check
def many_streams_equal_lone_answers():
    questions = [[{"role": "user", "content": f"Write a Rust struct with {count} fields."}] for count in range(12)]
    alone = [ask(messages=question).choices[0].message.content for question in questions]

    async def all_at_once():
        async with AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=120) as fast:

            async def one(question):
                stream = await fast.chat.completions.create(
                    model=MODEL, messages=question, temperature=0, max_tokens=40, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(all_at_once()) == alone


@check
def embeddings():
    needs_route("/v1/embeddings")
    # the package's default format is base64
    packed = strict(client.embeddings.create(model=MODEL, input=["fn main() {}", "struct A;"]))
    plain = client.embeddings.create(model=MODEL, input=["fn main() {}", "struct A;"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1] and packed.usage.prompt_tokens > 0
    for ours, theirs in zip(packed.data, plain.data, strict=True):
        assert len(ours.embedding) == len(theirs.embedding)
        assert all(abs(a - b) < 1e-6 for a, b in zip(ours.embedding, theirs.embedding, strict=True))
        assert abs(sum(value * value for value in theirs.embedding) - 1) < 1e-3


class Sum(BaseModel):
    a: int
    b: int


@check
def structured_answers():
    needs_schemas()
    answer = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Sum, temperature=0, max_tokens=200)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Sum)
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, response_format=Sum, temperature=0, max_tokens=200
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


@check
def tool_calls():
    needs_tools()
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    answer = strict(ask(**fields))
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and calls[0].id.startswith("call_")
    assert calls[0].function.name == "add" and set(json.loads(calls[0].function.arguments)) == {"a", "b"}
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, **fields
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    found = [(call.function.name, call.function.arguments) for call in final.message.tool_calls]
    assert found == [(call.function.name, call.function.arguments) for call in calls]
    assert final.finish_reason == "tool_calls"
    talk = QUESTION + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in calls]},
        *({"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls),
    ]
    assert ask(messages=talk, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


@check
def responses():
    needs_route("/v1/responses")
    fields = {"model": MODEL, "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 40}
    plain = strict(client.responses.create(**fields))
    assert plain.output_text == ask().choices[0].message.content
    assert plain.status == "incomplete" and plain.incomplete_details.reason == "max_output_tokens"
    assert plain.store is False and plain.usage.output_tokens == 40
    items = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION[0]["content"]}]}]
    assert client.responses.create(**{**fields, "input": items}).output_text == plain.output_text
    events = [strict(event) for event in client.responses.create(stream=True, **fields)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == plain.output_text == events[-1].response.output_text
    assert client.responses.input_tokens.count(model=MODEL, input=fields["input"]).input_tokens == plain.usage.input_tokens


@check
def responses_stream_helper():
    needs_route("/v1/responses")
    fields = {"model": MODEL, "input": QUESTION[0]["content"], "temperature": 0, "instructions": "Be short."}
    plain = client.responses.create(max_output_tokens=40, **fields)
    with client.responses.stream(max_output_tokens=40, **fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == plain.output_text
    # the helper returns a final response only if it is complete
    stop = plain.output_text[8:12]
    with client.responses.stream(max_output_tokens=40, extra_body={"stop": stop}, **fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == plain.output_text[: plain.output_text.index(stop)] and final.status == "completed"


@check
def responses_refuse_unsupported_fields():
    needs_route("/v1/responses")
    for name, value in {
        "previous_response_id": "resp_1", "background": True, "conversation": "conv_1", "tools": [{"type": "web_search"}],
        "max_output_tokens": 1, "input": [{"type": "item_reference", "id": "x"}],
    }.items():
        try:
            client.responses.create(**{"model": MODEL, "input": "x", name: value})
        except openai.BadRequestError as error:
            assert error.param.startswith(name), error
            continue
        raise AssertionError(f"{name} was not refused")
    try:
        client.responses.retrieve("resp_1")
        raise AssertionError("a response was found")
    except openai.NotFoundError:
        pass


@check
def responses_call_tools():
    needs_route("/v1/responses")
    needs_tools()
    tool = {"type": "function", **TOOL["function"]}
    fields = {"model": MODEL, "input": QUESTION, "tools": [tool], "tool_choice": "required", "temperature": 0,
              "parallel_tool_calls": False}
    plain = strict(client.responses.create(max_output_tokens=200, **fields))
    call = next(item for item in plain.output if item.type == "function_call")
    assert call.name == "add" and set(json.loads(call.arguments)) == {"a", "b"}
    with client.responses.stream(max_output_tokens=200, **fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds and "response.function_call_arguments.done" in kinds
    assert next(item.arguments for item in final.output if item.type == "function_call") == call.arguments
    more = [*QUESTION, *(item.model_dump() for item in plain.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "3"}]
    assert client.responses.create(model=MODEL, input=more, max_output_tokens=16).usage.output_tokens > 0


@check
def responses_have_structure():
    needs_route("/v1/responses")
    needs_schemas()
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Sum, temperature=0, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Sum)


main()
