"""Hooks of `check_schemathesis.py`: requests stay short, do not train, and follow the rules that a schema cannot express."""

import json
import os

import schemathesis

MODEL = os.environ["SERVER_MODEL"]
VOCABULARY = int(os.environ["CHECK_VOCABULARY"])
FILE, JOB, ADAPTER, CHECKPOINT_FOLDER = (
    os.environ[f"CHECK_{name}"] for name in ("FILE", "JOB", "ADAPTER", "CHECKPOINT_FOLDER")
)
LIMITS = {"max_tokens": 6, "max_completion_tokens": 6, "max_output_tokens": 16, "n_predict": 6}
# larger numbers must be refused
MAXIMUM = {"n_predict": 2**32 - 1}
# the field that limits the length of each route's answers, for requests without it
LIMIT = {"chat": "max_tokens", "complet": "n_predict", "infill": "n_predict", "responses": "max_output_tokens"}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
GRAMMARS = {
    "guided_json": SCHEMA, "json_schema": SCHEMA, "guided_regex": "[a-c]{1,4}", "guided_choice": ["a", "b"],
    "guided_grammar": 'root ::= "a" | "b"', "grammar": 'start: "a" | "b"',
}
FORMATS = ("response_format", "text", "output_config")


with open("openapi.json") as source:
    DOCUMENT = json.load(source)
REFUSED = {*DOCUMENT["info"]["x-refused-of-prompts"], *DOCUMENT["info"]["x-refused-of-answers"]}


def resolved(value):
    while "$ref" in value:
        found = DOCUMENT
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def properties(schema):
    """The names of the fields of a schema."""
    schema = resolved(schema)
    parts = [part for kind in ("allOf", "anyOf", "oneOf") for part in schema.get(kind, [])]
    return {*schema.get("properties", {})}.union(*map(properties, parts))


def without_foreign_fields(path, body):
    """Removes fields of other routes, which are refused: their names are drawn as names of further fields."""
    content = resolved(DOCUMENT["paths"][path]["post"]["requestBody"])["content"]
    known = properties(content["application/json"]["schema"])
    return {name: value for name, value in body.items() if name in known or name not in REFUSED}


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def shorten(path, body):
    for name, limit in LIMITS.items():
        if is_count(body.get(name)) and (body[name] == -1 or limit < body[name] <= MAXIMUM.get(name, 2**63 - 1)):
            body[name] = limit
    if path.endswith("/fine_tuning/jobs") and body.get("dry_run") in (None, False):
        body["dry_run"] = True
    limit = next((limit for part, limit in LIMIT.items() if part in path), None)
    if path.endswith("/v1/completions") or path == "/completions":
        limit = "max_tokens"
    if limit and body.get(limit) is None and body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
        body[limit] = LIMITS[limit]


def known_tokens(value):
    """Replaces token ids with ids of the model, because the document does not contain the size of the vocabulary."""
    if isinstance(value, list):
        return [known_tokens(item) for item in value]
    return value % VOCABULARY if is_count(value) else value


def with_whole_numbers(value):
    """Replaces `1.0`, which JSON Schema accepts as an integer and the server refuses, with `1`."""
    if isinstance(value, list):
        return [with_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: with_whole_numbers(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


# longer lists must be refused
MAX_TOOLS = 128


def shorten_tools(tools):
    if isinstance(tools, list) and len(tools) <= MAX_TOOLS:
        del tools[8:]


def shorten_prompt(body):
    """Retains one item of a list that may not fit in the context: a token has at least one byte."""
    shorten_tools(body.get("tools"))
    for message in body["messages"] if isinstance(body.get("messages"), list) else []:
        if isinstance(message, dict):
            shorten_tools(message.get("tool_calls"))
    for name in ("messages", "input", "prompt"):
        if isinstance(body.get(name), list) and len(json.dumps(body[name], ensure_ascii=False).encode("utf-8", "replace")) > 1200:
            del body[name][1:]


def meet_rules(path, body):
    shorten_prompt(body)
    if "model" in body:
        body["model"] = MODEL if path.endswith("jobs") or len(body) % 2 else ADAPTER
    if "adapter" in body:
        body["adapter"] = ADAPTER
    for name in ("tokens", "stop_token_ids", "prompt", "input"):
        if isinstance(body.get(name), list):
            body[name] = known_tokens(body[name])
    if isinstance(body.get("prompt"), list) and any(not isinstance(prompt, str) for prompt in body["prompt"]):
        body["suffix"] = None
    biases = body.get("logit_bias")
    if isinstance(biases, dict):
        body["logit_bias"] = {str(int(token) % VOCABULARY): bias for token, bias in biases.items()}
    elif isinstance(biases, list):
        body["logit_bias"] = [[pair[0] % VOCABULARY, pair[1]] for pair in biases]
    if is_count(body.get("best_of")):
        body["best_of"] = min(body["best_of"], body.get("n") or 1)
    if body.get("max_completion_tokens") is not None and body.get("max_tokens") is not None:
        body["max_tokens"] = body["max_completion_tokens"]
    if body.get("top_logprobs") and "messages" in body:
        body["logprobs"] = True
    if is_count(body.get("min_tokens")):
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict") if is_count(body.get(name))]
        body["min_tokens"] = min([body["min_tokens"], 1, *limits])
    if body.get("max_tokens") == 0 and path.endswith("/v1/completions"):
        body.update(echo=True, stream=False)
    for entry in body.get("lora") or []:
        # the document does not contain the ids of adapters
        entry["scale"] = 0
    meet_rules_of_grammars(body)
    if path.endswith("/fine_tuning/jobs"):
        meet_rules_of_jobs(body)
    elif path.endswith("/unload_lora_adapter"):
        body["lora_name"] = ADAPTER
    elif path.endswith(("/v1/adapters", "/load_lora_adapter")):
        body["path" if path.endswith("adapters") else "lora_path"] = CHECKPOINT_FOLDER


def meet_rules_of_grammars(body):
    """Sends at most one grammar, which compiles; makes tools distinct and chooses one of them."""
    tools = body.get("tools") or []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        function["name"] = f"tool_{index}"
        if "parameters" in function or "input_schema" in function:
            function["input_schema" if "input_schema" in function else "parameters"] = SCHEMA
    choice = body.get("tool_choice")
    if not tools and choice not in ("none", "auto", None):
        body["tool_choice"] = None
    elif isinstance(choice, dict):
        choose_tool(choice)
    found = [name for name in (*GRAMMARS, "structured_outputs", *FORMATS) if body.get(name) is not None]
    for name in found[1:]:
        body[name] = None
    if body.get("logit_bias") and (tools or found):
        # it may exclude all tokens that the grammar allows
        body["logit_bias"] = None
    for name in found[:1]:
        if name in GRAMMARS:
            body[name] = GRAMMARS[name]
        elif name == "structured_outputs":
            body[name] = {"json": SCHEMA}
        elif isinstance(body[name], dict):
            put_schema(body[name])


def choose_tool(choice):
    """Names the first tool."""
    chosen = choice.get("allowed_tools", choice).get("tools")
    for tool in [choice] if chosen is None else chosen:
        if "function" in tool:
            tool["function"]["name"] = "tool_0"
        elif "name" in tool:
            tool["name"] = "tool_0"


def put_schema(value):
    """Replaces each `schema` with a valid schema."""
    for name, inner in value.items():
        if name == "schema" and inner is not None:
            value[name] = SCHEMA
        elif isinstance(inner, dict):
            put_schema(inner)


def meet_rules_of_jobs(body):
    body["training_file"] = FILE
    if body.get("validation_file") is not None:
        body["validation_file"] = FILE
    extras = body.get("metal_candle") or {}
    for name in ("max_steps", "learning_rate", "batch_tokens"):
        if extras.get(name) is not None:
            body["hyperparameters"] = body["method"] = None


@schemathesis.hook
def filter_case(context, case):
    """Whether the names of a form's parts are valid in a header."""
    if case.media_type != "multipart/form-data" or not isinstance(case.body, dict):
        return True
    return all(name.isascii() and name.isprintable() for name in case.body)


@schemathesis.hook
def before_call(context, case, kwargs):
    path = case.operation.path
    is_positive = case.meta is None or case.meta.generation.mode.is_positive
    if isinstance(case.body, dict) and case.media_type == "application/json":
        if is_positive:
            case.body = with_whole_numbers(case.body)
            if case.method == "POST":
                case.body = without_foreign_fields(path, case.body)
        shorten(path, case.body)
        if is_positive:
            meet_rules(path, case.body)
    ids = case.path_parameters
    if is_positive and ids and "id" in ids and case.method != "DELETE":
        ids["id"] = JOB if "/jobs/" in path else FILE
    if ids and ids.get("id") == FILE and case.method == "DELETE":
        ids["id"] = "file-of-no-one"
    if is_positive and ids and path.startswith("/v1/models/"):
        ids["name"] = MODEL if len(ids["name"]) % 2 else ADAPTER
    if is_positive and isinstance(case.query, dict) and "/{id}/" in path:
        # an event or a checkpoint of the job
        case.query.pop("after", None)
