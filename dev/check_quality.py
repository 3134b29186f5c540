"""Compares the greedy text and the logits of a GGUF model in a built `metal-candle` and in llama.cpp with those of its dequantized weights in
transformers.

    python dev/check_quality.py BINARY MODEL.gguf [COUNT]

Needs llama-cpp-python. Answers the first COUNT of 20 prompts with up to 64 tokens. Reports where each text first differs from the most likely
token of the dequantized model and by how many logits, and the divergence and rounding noise of both programs on the texts of `metal-candle`.
Exits with 1 if a difference is larger than the noise of llama.cpp.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from llama_cpp import Llama
from safetensors.torch import load_file

PROMPTS = [
    "What is the capital of France?", "Write a haiku about the sea.", "Explain photosynthesis in two sentences.",
    "Give me three tips for learning to play the piano.", "Translate to Spanish: Where is the library?", "What is 17 times 23?",
    "Write a Python function that reverses a string.", "Who wrote Pride and Prejudice?", "List five fruits that are red.",
    "Summarize the plot of Romeo and Juliet.", "Why is the sky blue?", "Name the planets of the solar system.", "How do I boil an egg?",
    "What does HTTP stand for?", "Write a short story about a dog that finds a key.",
    "What is the difference between a list and a tuple in Python?", "Suggest a name for a coffee shop.", "Describe the water cycle.",
    "What is the boiling point of water in Fahrenheit?", "Write an email that asks for a day off.",
]
NUM_TOKENS = 64


def llama_cpp_logits(model, ids):
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def llama_cpp_greedy(model, prompt, ends):
    tokens = []
    model.reset()
    model.eval(prompt)
    while len(tokens) < NUM_TOKENS and not (tokens and tokens[-1] in ends):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(tokens[-1:])
    return tokens


def divergence(found, expected):
    """KL divergence and whether the best token is the same, by position."""
    found, expected = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1), (found.argmax(-1) == expected.argmax(-1)).double()


def gap(logits, two):
    """The difference of the logits of two tokens, by position."""
    first, second = logits.gather(1, two).unbind(-1)
    return first - second


def main():
    binary, model, *count = sys.argv[1:]
    prompts = PROMPTS[: int(count[0])] if count else PROMPTS
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def run(*command):
            return subprocess.run([binary, *map(str, command)], capture_output=True, text=True, check=True).stdout

        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        answers = run("generate", "--model", model, "--prompts", folder / "prompts.jsonl", "--json", "--temperature", "0", "--max-tokens", NUM_TOKENS)
        answers = [json.loads(line) for line in answers.splitlines()]
        run("convert", "--model", model, "--format", "safetensors", "--output", folder / "dense")
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        ends = dense.config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        theirs = Llama(model, n_ctx=1024, logits_all=True, type_k=0, type_v=0, verbose=False)

        def expected(prompt, tokens):
            with torch.no_grad():
                return dense(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]

        texts = {"metal-candle": [answer["tokens"] for answer in answers]}
        texts["llama.cpp"] = [llama_cpp_greedy(theirs, answer["prompt_ids"], ends) for answer in answers]
        margins = {}
        for program, tokens in texts.items():
            margins[program] = []
            for answer, text in zip(answers, tokens):
                logits, chosen = expected(answer["prompt_ids"], text), torch.tensor(text)
                differs = (logits.argmax(-1) != chosen).nonzero()
                if len(differs):
                    first = differs[0].item()
                    margins[program].append((logits[first].max() - logits[first, chosen[first]]).item())
            largest = max(margins[program], default=0.0)
            print(f"{program:12} {len(prompts) - len(margins[program])} of {len(prompts)} texts equal, largest margin {largest:.3f}")
        print(f"equal in both {sum(a == b for a, b in zip(*texts.values()))}")

        noise = {program: [] for program in texts}
        figures = {program: [] for program in texts}
        for answer in answers:
            prompt, tokens = answer["prompt_ids"], answer["tokens"]
            exact, ids = expected(prompt, tokens), prompt + tokens[:-1]
            run("logits", "--model", model, "--ids", ",".join(map(str, ids)), "--out", folder / "logits.safetensors")
            found = {"metal-candle": load_file(folder / "logits.safetensors")["logits"], "llama.cpp": llama_cpp_logits(theirs, ids)}
            two = exact.topk(2).indices
            for program, logits in found.items():
                logits = logits[len(prompt) - 1 :]
                noise[program].append((gap(logits, two) - gap(exact, two)).abs())
                figures[program].append(torch.stack(divergence(logits, exact)))
        for program in texts:
            shift, (kl, same) = torch.cat(noise[program]), torch.cat(figures[program], 1)
            print(
                f"{program:12} gap of the two best logits moves by {shift.mean():.3f} (largest {shift.max():.3f}), KL {kl.mean():.2e} (largest "
                f"{kl.max():.2e}), same best token {same.mean():.1%}, {len(shift)} positions"
            )
        return max(margins["metal-candle"], default=0.0) > torch.cat(noise["llama.cpp"]).max().item()


if __name__ == "__main__":
    sys.exit(main())
