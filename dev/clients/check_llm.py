"""Checks the program `llm`: a model in its configuration file, answers and streams."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import BASE, KEY, MODEL, QUESTION, check, main, request

TEXT = QUESTION[0]["content"]


@check
def answers_and_streams():
    with tempfile.TemporaryDirectory() as folder:
        models = f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {BASE}\n  api_key_name: ours\n"
        Path(folder, "extra-openai-models.yaml").write_text(models)
        Path(folder, "keys.json").write_text(f'{{"ours": "{KEY}"}}')
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 30}
        expected = request("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
        for more in ([], ["--no-stream"]):
            command = [sys.executable, "-m", "llm", "-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "30", *more, TEXT]
            environment = {**os.environ, "LLM_USER_PATH": folder}
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert run.returncode == 0, run.stderr
            assert run.stdout.strip() == expected.strip(), run.stdout


main()
