"""Checks `instructor`: answers of a pydantic type, with a schema and with a tool."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from common import BASE, KEY, MODEL, QUESTION, check, main, needs_schemas, needs_tools


class Sum(BaseModel):
    model_config = ConfigDict(extra="forbid")

    # a small model would generate digits up to the limit
    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)


def ask(mode):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key=KEY, max_retries=0), mode=mode)
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_model=Sum, temperature=0, max_tokens=200, max_retries=0
    )
    assert isinstance(answer, Sum)


@check
def schemas():
    needs_schemas()
    ask(instructor.Mode.JSON_SCHEMA)


@check
def tools():
    needs_tools()
    ask(instructor.Mode.TOOLS)


main()
