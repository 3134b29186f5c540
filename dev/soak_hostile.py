"""Hostile requests of `soak.py`, with the allowed status codes of the server; 0 is a closed connection without an
answer."""

import json


def hostile_requests(soak, lasting=False):
    """Lists of name, bytes, statuses and options of `Server.send`. `lasting` requests take up to half a minute."""
    found = []

    def add(name, statuses, raw, **options):
        found.append((name, raw, statuses if isinstance(statuses, tuple) else (statuses,), options))

    def post(name, statuses, path, body, key="main", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {header.replace("_", "-"): value for header, value in headers.items()}
        add(name, statuses, soak.head("POST", path, key, len(data), headers) + data)

    def head(method, path, key="main", length=0, **headers):
        return soak.head(method, path, key, length, {header.replace("_", "-"): value for header, value in headers.items()})

    chat, text = "/v1/chat/completions", "/v1/completions"
    if lasting:
        add("half of the headers", (0, 408), b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-")
        add("no request", (0, 408), b"")
        add("half of a body", (0, 408), head("POST", text, length=1000) + b'{"prompt": "')
        chunked = head("POST", text).replace(b"content-length: 0", b"transfer-encoding: chunked")
        add("half of a chunked body", (0, 408), chunked + b'5\r\n{"a"')
        return found

    hello = [{"role": "user", "content": "x"}]
    for index, body in enumerate([b"", b"{", b'{"a": [1,', b'{"a": 1} x', b"[]", b'"x"', b"null", b"\xff\xfe{}", b'{"prompt": "\xff"}',
                                  b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b'{"prompt": "a\nb"}', b'{"prompt": "x"' + b"," * 9000,
                                  b'{"prompt": ' + b"[" * 100_000, b'{"prompt": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"]):
        for path in (chat, text, "/v1/responses", "/v1/messages", "/v1/embeddings", "/infill", "/tokenize"):
            if index % 3 == len(path) % 3:
                post(f"malformed body {index}", 400, path, body)
    big = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    post("too large", (0, 413), text, big)  # the client may still write when the server closes
    post("long prompt", 400, text, {"prompt": "word " * 400_000, "max_tokens": 1})
    post("long list", 400, text, {"prompt": [0] * 1_000_000, "max_tokens": 1})
    post("many prompts", 400, text, {"prompt": ["x"] * 100_000, "max_tokens": 1})
    post("many messages", 400, chat, {"messages": hello * 5000})
    post("many fields", 200, text, {f"x{i}": i for i in range(50_000)} | {"prompt": "x", "max_tokens": 1})
    post("NUL", 200, text, {"prompt": "a\0b", "max_tokens": 1, "seed": 1})
    post("NUL in a name", 404, text, {"model": "base\0", "prompt": "x"})
    post("NUL in a name", 400, "/v1/adapters", {"name": "a\0", "path": "one"})
    wrong = [{"max_tokens": -2}, {"max_tokens": 1.5}, {"max_tokens": "5"}, {"max_tokens": 10**30}, {"n": 10**9}, {"n": 2**70},
             {"n": 0}, {"n": "x"}, {"temperature": "hot"}, {"temperature": 3},
             {"temperature": -1}, {"top_p": 2}, {"seed": 1.5}, {"seed": True}, {"stop": [""]},
             {"stop": ["x"] * 99}, {"stop": 5}, {"logit_bias": {"x": 1}}, {"logit_bias": {"99999999": 1}}, {"logit_bias": {"1": 1e9}},
             {"frequency_penalty": 9}, {"stream": "yes"}, {"model": 5}, {"model": ["base"]}, {"grammar": "root ::= ("},
             {"guided_regex": "("},
             {"grammar": 5}, {"guided_json": 5}, {"cache_salt": 5}, {"best_of": 99}, {"adapter": 5}]
    for fields in wrong:
        post(f"wrong field {fields}", 400, text, {"prompt": "x"} | fields)
        post(f"wrong field {fields}", 400, chat, {"messages": hello} | fields | ({"stream": True} if "stream" not in fields else {}))
    for raw in (b"1e400", b"-1e400", b"1e999999999"):
        post("infinite number", 400, text, b'{"prompt": "x", "temperature": ' + raw + b"}")
    for prompt in (5, {}, [[]], [1, "x"], [-1], [10**9], [None], []):
        post(f"wrong prompt {prompt}", 400, text, {"prompt": prompt, "max_tokens": 1})
    for messages in (5, [], [5], [{}], [{"role": "x", "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user"}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}],
                     [{"role": "user", "content": [{"type": "text", "text": 5}]}]):
        post(f"wrong messages {messages}", 400, chat, {"messages": messages})
        post(f"wrong messages {messages}", 400, "/v1/messages", {"messages": messages, "max_tokens": 4, "model": "base"})
    deep = {"type": "object"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    schemas = [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}, {"type": "strange"}, {"enum": []}, {"allOf": [False]}, deep,
               {"type": "string", "pattern": "(a{1000}){1000}"}, {"type": "string", "pattern": "(?<=a)b"}, {"$ref": "http://127.0.0.1:1/x"},
               {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
               {"enum": [f"v{i}" for i in range(5000)]}]
    for index, schema in enumerate(schemas):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        post(f"schema {index}", (200, 400), chat, {"messages": hello, "max_tokens": 4, "response_format": form, "seed": 1})
    for index, regex in enumerate(["(a+)+$", "(a{1000}){1000}", "(((a{99}){99}){99}){99}", "\\1(a)", "[^\\x00-\\x7f]{500}", "x{0}"]):
        post(f"regex {index}", (200, 400), text, {"prompt": "x", "max_tokens": 4, "guided_regex": regex, "seed": 1})
    for grammar in ("root ::= root", "root ::= a\na ::= b\nb ::= a", "root ::= " + "(" * 5000, "root ::= [", "start: start", "x" * 100_000):
        post(f"grammar {grammar[:30]}", (200, 400), text, {"prompt": "x", "max_tokens": 4, "grammar": grammar, "seed": 1})
    tool = {"type": "function", "function": {"name": "x", "parameters": {}}}
    for index, fields in enumerate([{"tools": [tool] * 200}, {"tools": 5}, {"tools": [{}]}, {"tool_choice": "required"}, {"functions": [5]},
                                    {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "y"}}}]):
        post(f"tools {index}", 400, chat, {"messages": hello, "max_tokens": 4} | fields)

    for method, path, status in (("GET", "/nothing", 404), ("GET", text, 405), ("DELETE", chat, 405), ("PATCH", "/v1/models", 405),
                                 ("GET", "/v1/models/none", 404),
                                 ("GET", "/v1/files/..%2f..%2fkeys.toml", 404), ("GET", "/v1/files/%00", 404),
                                 ("GET", "/../../keys.toml", 404), ("GET", "/v1/fine_tuning/jobs/ftjob-x", 404),
                                 ("GET", "/v1/files?limit=x", 400),
                                 ("DELETE", "/v1/adapters/%2e%2e", 404), ("GET", "/v1/files/file-x/content", 404),
                                 ("BREW", "/health", 405)):
        add(f"{method} {path}", status, head(method, path))
    for name in ("../one", "", ".x", "a/b", "x" * 300, "base", "default"):
        post(f"adapter named {name[:9]}", (400, 409), "/v1/adapters", {"name": name, "path": "one"})
    for path in ("../keys.toml", "/etc/passwd", "", "none", ".", "one/../../keys.toml", "x" * 5000):
        post(f"adapter of {path[:20]}", (400, 404), "/v1/adapters", {"name": "bad", "path": path})
    for fields in ({"training_file": "file-x"}, {"training_file": "../rows.jsonl"}, {"model": "none"}, {"metal_candle": {"output": "/x"}},
                   {"method": {"type": "dpo"}}, {"suffix": "../x"}, {"seed": -1}):
        post(f"job with {fields}", (400, 404), "/v1/fine_tuning/jobs", {"model": "base", "training_file": "file-x"} | fields)
    post("upload without a form", 400, "/v1/files", b"--xx\r\nnonsense", content_type="multipart/form-data; boundary=xx")
    form = b'--xx\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nvision\r\n--xx--\r\n'
    post("upload of another purpose", 400, "/v1/files", form, content_type="multipart/form-data; boundary=xx")

    valid = {"prompt": "x", "max_tokens": 1, "seed": 1}
    post("no key", 401, text, valid, key=None)
    post("wrong key", 401, text, valid, key="x" * 40)
    post("wrong key", 401, "/v1/messages", valid, key="x" * 40)
    post("no right to load", 403, "/v1/adapters", {"name": "y", "path": "one"}, key="second")
    post("no right to train", 403, "/v1/fine_tuning/jobs", {"model": "base", "training_file": "x"}, key="second")
    post("media type", 415, text, valid, content_type="text/plain")
    post("another site", 403, text, valid, origin="http://evil.example")
    data = json.dumps(valid).encode()
    raw = head("POST", text, length=len(data)) + data
    add("another host", 403, raw.replace(b"host: 127.0.0.1", b"host: evil.example", 1))
    add("GET of 100 kB", (0, 400, 414, 431), head("GET", "/" + "x" * 100_000))
    add("header of 1 MB", (0, 400, 431), head("GET", "/health", x="y" * 1_000_000))
    add("5000 headers", (0, 400, 431), head("GET", "/health").replace(b"\r\n\r\n", b"\r\nx: y" * 5000 + b"\r\n\r\n"))
    for line in (b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 1000):
        add(f"request line {line[:10]}", (0, 400, 505), line, half_close=True)
    add("two lengths", (0, 400), raw.replace(b"connection: close", b"content-length: 3"))
    add("length of no number", (0, 400), raw.replace(b"content-length: ", b"content-length: x"))
    add("negative length", (0, 400), raw.replace(b"content-length: ", b"content-length: -"))
    chunked = head("POST", text).replace(b"content-length: 0", b"transfer-encoding: chunked")
    add("chunk of no size", (0, 400), chunked + b"zz\r\n{}\r\n0\r\n\r\n", half_close=True)
    add("chunk of a giant size", (0, 400, 413), chunked + b"ffffffffffffffff\r\n{}", half_close=True)
    add("body cut in the middle", (0, 400), head("POST", text, length=5000) + data[:9], half_close=True)
    add("length of a terabyte", (0, 400, 413), head("POST", text, length=1 << 40) + data, half_close=True)
    return found
