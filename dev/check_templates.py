"""Compares chat templates with transformers: the text and trained parts of every conversation with every published template.

Templates: the `.jinja` files of the PyPI packages `trl` and `llama-cpp-python` (source, `models/templates`), fetched by pip unless
folders are given. Needs transformers and trl; run `python dev/check_templates.py --binary target/release/metal-candle`.

The text must equal that of `apply_chat_template`, with and without a generation prompt. The trained part of each answer is compared with
two renderings: the conversation before the answer with a generation prompt, and the conversation including the answer. If both are a
prefix of the whole text, the trained part must be the text between them, without white space after the end token. Parts marked with
`{% generation %}` are compared with transformers' marks. Otherwise the trained part must contain the answer's strings and nothing of other
messages. NAMED lists exceptions.
"""

import argparse
import collections
import datetime
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

from transformers.utils import chat_template_utils

# templates whose trained part is correct although the rule below fails
NAMED = {
    "phi": "the last `</s>` ends the conversation, not the answer, which ends by `<|end|>` anywhere",
    "microsoft-Phi": "the last `</s>` ends the conversation, not the answer, which ends by `<|end|>` anywhere",
    "Apertus": "the end of an answer is trained, which is only written if another message follows",
    "CohereForAI-c4ai-command-r7b": "the header of the next answer is always written and not trained",
}
SPECIAL = re.compile(r"<\|[^|<>\s{}]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|\[/?[A-Z_]{3,24}\]|<(?:start|end)_of_turn>|<\|?(?:turn|channel|tool)\|?>|<eos>|<bos>")
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks a word up.\nQuickly.", "parameters": {
    "type": "object", "properties": {
        "word": {"type": "string", "description": "what \"word\" é"},
        "limit": {"type": "integer", "default": 3, "enum": [1, 2, 3]},
        "scale": {"type": ["number", "null"], "minimum": 1e-7, "maximum": 1.5e16},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }, "required": ["word"]}, "return": {"type": "string"}}}
OTHER = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def result(text, **more):
    return {"role": "tool", "content": text, **more}


def call(name, arguments, number=1):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def conversations():
    """Name, messages and tools of each."""
    q, a = user("Quelle heure est-il, SIXTY?"), answer("It is NOON.")
    one = call("look_up", {"word": "PEAR", "limit": 2, "scale": 1e-7, "tags": ["x", "Y1"], "where": {"city": "Ulm"}, "deep": None, "COUNT": 3})
    two = call("now", {}, 2)
    yield "one", [q], None
    yield "pair", [q, a], None
    yield "system", [system("Be BRIEF."), q, a], None
    yield "system only question", [system("Be BRIEF."), q], None
    yield "three pairs", [q, a, user("And WHERE?"), answer("In ROME."), user("And WHY?"), answer("No IDEA.")], None
    yield "two systems", [system("Be BRIEF."), system("Be KIND."), q, a], None
    yield "late system", [q, a, system("Be KIND."), user("And WHERE?"), answer("In ROME.")], None
    yield "spaces", [user("  lead and trail \n"), answer("\n\n  spaced ANSWER  \n")], None
    yield "empty user", [user(""), a], None
    yield "empty answer", [q, answer(""), user("And WHERE?"), answer("In ROME.")], None
    yield "two answers", [q, a, answer("Or ONE.")], None
    yield "two users", [q, user("And WHERE?"), a], None
    yield "answer first", [answer("Hello YOU."), q, a], None
    yield "ends with system", [q, a, system("Be KIND.")], None
    yield "reasoning_content", [q, answer("It is NOON.", reasoning_content="The SUN is high."), user("And WHERE?"), answer("In ROME.", reasoning_content="All ROADS lead there.")], None
    yield "reasoning", [q, answer("It is NOON.", reasoning="The SUN is high.")], None
    yield "thinking", [q, answer("It is NOON.", thinking="The SUN is high.")], None
    yield "think tags", [q, answer("<think>\nThe SUN is high.\n</think>\n\nIt is NOON."), user("And WHERE?"), answer("<think>\nAll ROADS lead there.\n</think>\n\nIn ROME.")], None
    yield "parts", [{"role": "user", "content": [{"type": "text", "text": "Quelle HEURE?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "It is NOON."}]}], None
    yield "two parts", [{"role": "user", "content": [{"type": "text", "text": "Quelle "}, {"type": "text", "text": "HEURE?"}]}, a], None
    yield "image", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, a], None
    yield "tools unused", [q, a], [TOOL]
    yield "tools system", [system("Be BRIEF."), q, a], [TOOL, OTHER]
    yield "tools question", [q], [TOOL]
    yield "call", [q, answer("", tool_calls=[one]), result('{"found": "GREEN"}', name="look_up", tool_call_id="call00001"), answer("It is NOON.")], [TOOL]
    yield "call null", [q, answer(None, tool_calls=[one]), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("It is NOON."), user("And WHERE?"), answer("In ROME.")], [TOOL]
    yield "call with text", [q, answer("I LOOK.", tool_calls=[one]), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("It is NOON.")], [TOOL]
    yield "two calls", [q, answer("", tool_calls=[one, two]), result("GREEN 31", name="look_up", tool_call_id="call00001"), result("12:00", name="now", tool_call_id="call00002"), answer("It is NOON.")], [TOOL, OTHER]
    yield "two rounds", [q, answer("", tool_calls=[one], reasoning_content="First LOOK."), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("", tool_calls=[two], reasoning_content="Then TIME."), result("12:00", name="now", tool_call_id="call00002"), answer("It is NOON.", reasoning_content="So NOON.")], [TOOL, OTHER]
    yield "call, then more", [q, answer("", tool_calls=[one]), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("It is NOON."), user("And WHERE?"), answer("In ROME."), user("And WHY?"), answer("No IDEA.")], [TOOL]
    yield "call last", [q, answer("", tool_calls=[one])], [TOOL]
    yield "call as text", [q, answer("", tool_calls=[call("look_up", '{"word": "PEAR"}')]), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("It is NOON.")], [TOOL]
    yield "call without tools", [q, answer("", tool_calls=[one]), result("GREEN 31", name="look_up", tool_call_id="call00001"), answer("It is NOON.")], None
    yield "unicode", [user("naïve 🦀 <b>&amp; \"quoted\" 'single'"), answer("日本語 ↑ \\n {{ x }} {% y %}")], None


def fetch(folder):
    """The folders with templates, fetched by pip."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        subprocess.run([*pip, "--no-binary", "llama-cpp-python", "llama-cpp-python"], check=True)
    archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if "/models/templates/" in m.name and m.name.endswith(".jinja")]
        tar.extractall(folder / "llama", members=members, filter="data")
    import trl

    return [pathlib.Path(trl.__file__).parent / "chat_templates", folder / "llama"]


def reference(source, messages, tools, prompt, variables):
    """The text, or None if the template raises an exception."""
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **variables)
        return rendered[0]
    except Exception:  # any exception of the template
        return None


def model_folder(folder, nano, sources):
    """A folder with nano's tokenizer and the special tokens of all templates."""
    tokenizer = json.loads((nano / "tokenizer.json").read_text())
    known = {t["content"] for t in tokenizer["added_tokens"]}
    number = 1 + max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])
    for token in sorted({t for s in sources for t in SPECIAL.findall(s)} | {"<s>", "</s>"}):
        if token not in known and "'" not in token:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            tokenizer["added_tokens"].append({"id": number, "content": token, **flags})
            number += 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "x"}))
    config = json.loads((nano / "config.json").read_text()) | {"vocab_size": number}
    (folder / "config.json").write_text(json.dumps(config))
    return {t["content"] for t in tokenizer["added_tokens"]}


def strings(value):
    """Words in capitals, which stand for the message they are in."""
    return set(re.findall(r"[A-Z]{3,}", json.dumps(value)))


def marked(source, messages, tools, variables):
    """The parts in `{% generation %}` blocks; None if the template has none."""
    if "endgeneration" not in source:
        return None
    rendered, indices = chat_template_utils.render_jinja_template(
        conversations=[messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **variables)
    return [rendered[0][start:end] for start, end in indices[0]] or None


def judge(conversation, source, text, trained, special, variables):
    """Describes an error in the trained parts of a text; None if there is none."""
    messages, tools = conversation
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected, is_known, at = [], True, 0
    for turn in turns:
        before = reference(source, messages[:turn], tools, True, variables) if turn else ""
        bare = reference(source, messages[:turn], tools, False, variables) if turn else ""
        upto = reference(source, messages[: turn + 1], tools, False, variables)
        if None in (before, upto) or before == bare or not (text.startswith(before) and text.startswith(upto) and at <= len(before) < len(upto)):
            is_known = False
            break
        part = text[len(before) : len(upto)]
        stripped = part.rstrip()
        if any(stripped.endswith(token) for token in special):
            part = stripped
        expected.append(part)
        at = len(upto)
    if marks := marked(source, messages, tools, variables):
        expected, is_known = marks, True
    # a token may contain white space of the header and of the answer
    squeezed = lambda parts: "".join("".join(parts).split())
    if is_known and squeezed(expected) != squeezed(trained):
        return f"expected {expected!r}, found {trained!r}"
    got = "".join(trained)
    own = set().union(*(strings({k: messages[i].get(k) for k in ("content", "tool_calls")}) for i in turns), set())
    foreign = set().union(*(strings(m) for m in messages if m["role"] != "assistant"), set()) - own
    if len(trained) > len(turns) + 1 and not marked(source, messages, tools, variables):
        return f"more parts than answers: {trained!r}"
    if missing := [word for word in sorted(own) if word in text and word not in got]:
        return f"not trained: {missing}: {trained!r}"
    if wrong := [word for word in sorted(foreign) if word in got]:
        return f"trained: {wrong}: {trained!r}"
    if messages[-1]["role"] == "assistant" and not is_known:
        last = text[text.rfind(trained[-1][-20:]) + len(trained[-1][-20:]) :].strip()
        if any(last.startswith(token) for token in special):
            return f"ends before {last[:40]!r}: {trained!r}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True, type=pathlib.Path)
    parser.add_argument("--nano", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "assets" / "nano")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "check_templates")
    parser.add_argument("--templates", type=pathlib.Path, nargs="*", help="folders with .jinja files, instead of the packages")
    parser.add_argument("--only", default="", help="only templates whose name contains this")
    parser.add_argument("--show", type=int, default=3, help="differences shown for each template")
    flags = parser.parse_args()
    folders = flags.templates or fetch(flags.folder)
    paths = sorted(path for folder in folders for path in folder.rglob("*.jinja") if flags.only in path.name)
    sources = [path.read_text() for path in paths]
    special = model_folder(flags.folder / "model", flags.nano, sources)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = []
    for path, source in zip(paths, sources):
        for name, messages, tools in conversations():
            for prompt in (False, True):
                for kwargs in ({}, {"enable_thinking": False}):
                    if kwargs and ("enable_thinking" not in source or prompt):
                        continue
                    cases.append((path, source, name, messages, tools, prompt, kwargs))
    rows = flags.folder / "rows.jsonl"
    with rows.open("w") as out:
        for _, source, _, messages, tools, prompt, kwargs in cases:
            row = {"messages": messages, "chat_template": source, "add_generation_prompt": prompt, "chat_template_kwargs": kwargs}
            out.write(json.dumps({**row, **({"tools": tools} if tools else {})}) + "\n")
    command = [flags.binary, "template", rows, "--model", flags.folder / "model", "--json"]
    today = datetime.date.today()
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    if len(answers) != len(cases) or today != datetime.date.today():
        sys.exit(f"expected {len(cases)} answers, found {len(answers)}")
    counts, shown = collections.Counter(), collections.Counter()
    vocabulary = json.loads((flags.folder / "model" / "tokenizer.json").read_text())
    pieces = decoder(vocabulary)
    for (path, source, name, messages, tools, prompt, kwargs), found in zip(cases, answers):
        expected = reference(source, messages, tools, prompt, {**tokens, **kwargs})
        kind, words = "equal", ""
        if expected is None:
            kind = "both refuse" if "error" in found else "refused there only"
            words = found.get("text", "")[:200]
        elif "error" in found:
            kind, words = "refused here only", found["error"][:300]
        elif found["text"] != expected:
            kind, words = "different", first_difference(expected, found["text"])
        counts[f"text: {kind}"] += 1
        where = f"{path.name}: {name}{' (prompt)' if prompt else ''}{' ' + json.dumps(kwargs) if kwargs else ''}"
        if kind not in ("equal", "both refuse"):
            report(shown, flags.show, where, kind, words)
        if kind != "equal" or prompt or not any(m["role"] == "assistant" for m in messages):
            continue
        if found["trained"] is None:
            counts["mask: refused"] += 1
            report(shown, flags.show, where, "mask refused", found["not_trained_because"])
            continue
        parts = trained_parts(found, pieces)
        wrong = judge((messages, tools), source, found["text"], parts, special, {**tokens, **kwargs})
        is_named = wrong and any(path.name.startswith(name) for name in NAMED)
        counts["mask: named" if is_named else "mask: wrong" if wrong else "mask: right"] += 1
        if wrong and not is_named:
            report(shown, flags.show, where, "mask", wrong)
    for kind, count in sorted(counts.items()):
        print(f"{count:6} {kind}")


def report(shown, limit, where, kind, words):
    key = (where.split(":")[0], kind)
    shown[key] += 1
    if shown[key] <= limit:
        print(f"{where}: {kind}: {words}")


def first_difference(expected, found):
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    return f"at {at}: expected {expected[at - 30 : at + 60]!r}, found {found[at - 30 : at + 60]!r}"


def decoder(tokenizer):
    """Bytes of each token of a byte-level tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of, extra = {chr(b): b for b in printable}, 256
    for byte in range(256):
        if byte not in printable:
            byte_of[chr(extra)] = byte
            extra += 1
    pieces = {number: bytes(byte_of[c] for c in piece) for piece, number in tokenizer["model"]["vocab"].items() if all(c in byte_of for c in piece)}
    return pieces | {token["id"]: token["content"].encode() for token in tokenizer["added_tokens"]}


def trained_parts(found, pieces):
    """The texts of consecutive trained tokens."""
    parts, last = [], False
    for number, is_trained in zip(found["ids"], found["trained"]):
        if is_trained:
            if not last:
                parts.append(b"")
            parts[-1] += pieces[number]
        last = is_trained
    return [part.decode(errors="replace") for part in parts]


if __name__ == "__main__":
    main()
