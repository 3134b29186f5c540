"""Checks `pydantic-ai`: answers, streams with usage, tool loops and output types."""

import asyncio

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from common import BASE, KEY, MODEL, QUESTION, check, main, needs_tools

TEXT = QUESTION[0]["content"]
model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY))
settings = {"temperature": 0, "max_tokens": 40}


class Sum(BaseModel):
    a: int
    b: int


@check
def answers_and_streams():
    async def both():
        agent = Agent(model, model_settings=settings)
        plain = await agent.run(TEXT)
        async with agent.run_stream(TEXT) as stream:
            return plain, await stream.get_output(), stream.usage

    plain, streamed, usage = asyncio.run(both())
    assert plain.output == streamed and plain.output
    assert usage.output_tokens == 40, usage


@check
def output_types():
    needs_tools()
    agent = Agent(model, output_type=Sum, model_settings={**settings, "max_tokens": 200})
    assert isinstance(asyncio.run(agent.run(TEXT)).output, Sum)


main()
