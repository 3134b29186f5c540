"""Writes tests/golden/tokenizer/folders.json: transformers' ids for tokenizer folders in other formats.

The folders have tokens that only side files name, or `vocab.json` and `merges.txt` instead of `tokenizer.json`.
Usage: python dev/reference_tokenizers.py
"""

import json
import pathlib
import tempfile

import transformers

GOLDEN = pathlib.Path(__file__).parent.parent / "crates/metal-candle/tests/golden/tokenizer"
TOKENIZER = json.loads((GOLDEN / "tokenizer.json").read_text())
KNOWN = {token["id"]: token for token in TOKENIZER["added_tokens"]}
NEXT = max([*KNOWN, *TOKENIZER["model"]["vocab"].values()]) + 1
FLAGS = ["lstrip", "rstrip", "normalized", "single_word", "special"]


def token(content, *flags):
    return {"content": content, **{flag: flag in flags for flag in FLAGS}}


def decoder(*tokens):
    known = {str(id): {k: v for k, v in token.items() if k != "id"} for id, token in KNOWN.items()}
    return known | {str(NEXT + i): token for i, token in enumerate(tokens)}


NEW = [
    token("<|mark|>", "special"), token("<|left|>", "lstrip", "special"), token("<|right|>", "rstrip"),
    token("Caf\u00e9", "normalized"), token("word", "single_word"), token("<|both|>", "lstrip", "rstrip", "normalized"),
    token(" <sp ace> "), token("\u65e5\u672c", "special", "normalized"),
]
NAMES = [new["content"] for new in NEW]
TEXTS = [
    "", " ", "a <|mark|> b", "a<|mark|>b", "a  <|left|>  b", "a  <|right|>  b", " <|both|> \n<|both|>", "Caf\u00e9 Cafe\u0301 caf\u00e9",
    "word words word. a word", "x <sp ace> y", "\u65e5\u672c\u8a9e \u65e5\u672c", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|><|mark|><|endoftext|>",
    "<|extra|><image><tool_call>{}</tool_call>", "isn't IT'S\r\n\r\n  12345 \u00bd \u0661\u0662 na\u00efve \U0001f980\u200d\U0001f4bb\t\t x", "  two  spaces  ",
    "<s>a</s><unk><pad>",
]
QWEN, FAST = {"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
MODEL = {"config.json": {"model_type": "qwen2"}}
ALL = {name: NEXT + i for i, name in enumerate(NAMES)}
MAP = {"eos_token": {**token("<|im_end|>"), "special": True}, "additional_special_tokens": ["<|mark|>", "<|extra|>"]}


def of(config, **files):
    return {"tokenizer_config.json": config, **{name.replace("_json", ".json"): value for name, value in files.items()}}


# name: (whether there is a tokenizer.json, files)
FOLDERS = {
    "decoder": (True, of(FAST | {"added_tokens_decoder": decoder(*NEW)})),
    "decoder_qwen": (True, of(QWEN | {"added_tokens_decoder": decoder(*NEW), "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None})),
    "decoder_flags_changed": (True, of(FAST | {"added_tokens_decoder": decoder() | {str(max(KNOWN)): token(KNOWN[max(KNOWN)]["content"], "special", "lstrip")}})),
    "decoder_named": (True, of(FAST | {"added_tokens_decoder": decoder(token("<|mark|>", "rstrip")), "eos_token": "<|mark|>"})),
    "decoder_hides_map": (True, of(FAST | {"added_tokens_decoder": decoder()}, special_tokens_map_json=MAP, added_tokens_json=ALL)),
    "additional": (True, of(FAST | {"additional_special_tokens": ["<|im_start|>", "<|mark|>", "<|extra|>"]})),
    "extra": (True, of(FAST | {"extra_special_tokens": ["<|extra|>"], "additional_special_tokens": ["<|mark|>"]})),
    "extra_object": (True, of(FAST | {"extra_special_tokens": {"image_token": "<image>", "mark_token": "<|mark|>"}})),
    "own_names": (True, of(FAST | {"image_token": "<image>", "eos_token": "<|mark|>", "pad_token": "<pad>", "bos_token": "<s>"})),
    "typed": (True, of(FAST | {"eos_token": {"__type": "AddedToken", **token("<|mark|>", "lstrip", "normalized")}})),
    "added_tokens": (True, of(FAST, added_tokens_json=ALL)),
    "added_tokens_special": (True, of(FAST | {"eos_token": "<|mark|>"}, added_tokens_json=ALL)),
    "map": (True, of(FAST, special_tokens_map_json=MAP)),
    "map_over_config": (True, of(FAST | {"eos_token": "<|extra|>"}, special_tokens_map_json={"eos_token": "<|mark|>", "extra_special_tokens": ["<image>"]})),
    "map_and_added": (True, of(FAST, special_tokens_map_json=MAP, added_tokens_json={"<|mark|>": NEXT, "<|extra|>": NEXT + 1})),
    "qwen": (False, of(QWEN | {"added_tokens_decoder": decoder(*NEW), "eos_token": "<|im_end|>"})),
    "qwen_fast_name": (False, of({"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": decoder()})),
    "qwen_model_type": (False, MODEL),
    "qwen_prefix": (False, MODEL | of(QWEN | {"add_prefix_space": True})),
    "qwen_added_tokens": (False, MODEL | of(QWEN | {"eos_token": "<|im_end|>"}, added_tokens_json={t["content"]: i for i, t in KNOWN.items()}, special_tokens_map_json=MAP)),
    "qwen_bos": (False, of(QWEN | {"bos_token": "<|im_start|>", "add_bos_token": True, "added_tokens_decoder": decoder()})),
    "gpt2": (False, of(GPT2)),
    "gpt2_decoder": (False, of(GPT2 | {"added_tokens_decoder": decoder(*NEW), "unk_token": "<|endoftext|>"})),
    "gpt2_prefix": (False, of(GPT2 | {"add_prefix_space": True, "added_tokens_decoder": decoder()})),
    "gpt2_bos_eos": (False, of(GPT2 | {"add_bos_token": True, "add_eos_token": True, "added_tokens_decoder": decoder(), "errors": "replace"})),
    "gpt2_null": (False, of(GPT2 | {"bos_token": None, "eos_token": None, "unk_token": None, "pad_token": "<pad>"})),
}


def main():
    golden = []
    for name, (is_whole, files) in FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for file, value in files.items():
                (folder / file).write_text(json.dumps(value))
            if is_whole:
                (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            else:
                (folder / "vocab.json").write_text(json.dumps(TOKENIZER["model"]["vocab"], ensure_ascii=False))
                merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in TOKENIZER["model"]["merges"]]
                (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            cases = []
            for text in TEXTS:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                special = tokenizer(text)["input_ids"]
                decoded = [tokenizer.decode(ids, skip_special_tokens=s, clean_up_tokenization_spaces=False) for s in (False, True)]
                cases.append({"text": text, "ids": ids, "with_special": special, "decoded": decoded})
            # vocabulary files are written by the test itself
            golden.append({"name": name, "tokenizer_json": is_whole, "files": files, "vocab_size": len(tokenizer), "eos": tokenizer.eos_token,
                           "class": type(tokenizer).__name__, "cases": cases})
    out = GOLDEN / "folders.json"
    out.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in golden) + "\n]\n")
    print(f"{len(golden)} folders, {out.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
