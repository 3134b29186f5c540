"""Checks `litellm`: answers, streams with usage, errors."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from common import BASE, KEY, MODEL, QUESTION, check, main

litellm.telemetry = False
litellm.suppress_debug_info = True
FIELDS = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY, "messages": QUESTION, "temperature": 0, "max_tokens": 40}


@check
def answers_and_streams():
    plain = litellm.completion(**FIELDS)
    assert plain.usage.completion_tokens == 40 and plain.choices[0].finish_reason == "length"
    chunks = list(litellm.completion(**FIELDS, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert whole.choices[0].message.content == plain.choices[0].message.content
    assert whole.usage.completion_tokens == 40 and whole.choices[0].finish_reason == "length"


@check
def errors_are_typed():
    for kind, fields in [
        (litellm.NotFoundError, {"model": "openai/gpt-9"}),
        (litellm.BadRequestError, {"temperature": 3}),
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "word " * 20000}]}),
    ]:
        try:
            litellm.completion(**{**FIELDS, **fields}, num_retries=0)
        except kind:
            continue
        raise AssertionError(f"no error for {list(fields)}")


main()
