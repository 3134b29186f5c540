"""Compares the TEMPLATE of a Modelfile, run by Go's `text/template` as Ollama runs it, with transformers' `apply_chat_template`.

    python dev/check_modelfile.py GO MODELFILE FOLDER

GO is the `go` program, FOLDER has the tokenizer of the model. Renders conversations of one to four turns, with and without a system
message; exits with 1 if one differs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var input struct {
		Template string
		Cases    []struct {
			System   string
			Messages []*Message
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
	texts := []string{}
	for _, conversation := range input.Cases {
		var text strings.Builder
		values := map[string]any{"System": conversation.System, "Messages": conversation.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def conversations(has_system):
    for num_turns in range(1, 5):
        for system in [None, 'Be "brief".\nUse {{ braces }}.'] if has_system else [None]:
            messages = [] if system is None else [dict(role="system", content=system)]
            for turn in range(num_turns):
                messages.append(dict(role="user", content=f"question {turn} <b> & 'c'\n\n- \"x\""))
                if turn + 1 < num_turns:
                    messages.append(dict(role="assistant", content=f"answer {turn}\nline {{x}}"))
            yield system or "", messages


def main():
    go, modelfile, folder = sys.argv[1:]
    text = Path(modelfile).read_text()
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    if not found:
        sys.exit(f"{modelfile} has no TEMPLATE")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer("")["input_ids"][:1]
    bos = tokenizer.bos_token if first and first[0] == tokenizer.bos_token_id else ""
    cases = list(conversations("no place for system messages" not in text))
    expected = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).removeprefix(bos or "") for _, messages in cases]
    upper = [dict(System=system, Messages=[dict(Role=m["role"], Content=m["content"]) for m in messages]) for system, messages in cases]
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "main.go"
        program.write_text(PROGRAM)
        environment = os.environ | dict(GO111MODULE="off", GOTOOLCHAIN="local", GOCACHE=str(Path(temporary) / "cache"))
        done = subprocess.run([go, "run", str(program)], input=json.dumps(dict(Template=found[1], Cases=upper)), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(done.stderr)
    differences = [(ours, theirs) for ours, theirs in zip(json.loads(done.stdout), expected, strict=True) if ours != theirs]
    for ours, theirs in differences:
        print(f"FAIL\n  {ours!r}\n  {theirs!r}")
    print(f"{len(cases) - len(differences)} of {len(cases)} conversations are equal")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
