"""Checks `langchain-openai`: answers, streams, tools and structured output."""

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from common import BASE, KEY, MODEL, QUESTION, check, main, needs_schemas, needs_tools

model = ChatOpenAI(base_url=BASE, api_key=KEY, model=MODEL, temperature=0, max_tokens=40, max_retries=0, stream_usage=True)
TEXT = QUESTION[0]["content"]


class Sum(BaseModel):
    """Add two numbers."""

    a: int
    b: int


@check
def answers_and_streams():
    plain = model.invoke(TEXT)
    assert plain.content and plain.usage_metadata["output_tokens"] == 40
    chunks = list(model.stream(TEXT))
    assert "".join(chunk.content for chunk in chunks) == plain.content
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] == 40 and whole.response_metadata["finish_reason"] == "length"


@check
def batches():
    texts = [f"Write {count} lines." for count in range(4)]
    assert [answer.content for answer in model.batch(texts)] == [model.invoke(text).content for text in texts]


@check
def tools():
    needs_tools()
    bound = model.bind_tools([Sum], tool_choice="any")
    calls = bound.invoke(TEXT, max_tokens=200).tool_calls
    assert calls[0]["name"] == "Sum" and set(calls[0]["args"]) == {"a", "b"}
    whole = None
    for chunk in bound.stream(TEXT, max_tokens=200):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [(call["name"], call["args"]) for call in calls]


@check
def structured_output():
    needs_schemas()
    structured = model.bind(max_tokens=200).bound.with_structured_output(Sum, method="json_schema")
    assert isinstance(structured.invoke(TEXT), Sum)


main()
