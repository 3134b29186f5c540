"""Measures mlx-lm or transformers for `metal-candle bench --against`.

Arguments: `mlx-lm`, `transformers` or `transformers-best`, and `cpu`, `metal` or `cuda`. The first printed line contains the name and version, or what is
missing. Then each line of standard input is a request in JSON, answered by one line of JSON.
"""

import json
import os
import sys
import time

# whatever the libraries print goes to standard error
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

# first steps of decoding that are not counted
WARM_UP_STEPS = 4


def answer(**fields):
    ANSWERS.write(json.dumps(fields) + "\n")


def ids(vocab, sequence, length):
    """The tokens of a prompt or sample: the same as those of metal-candle."""
    return [(position * 577 + sequence * 7919 + 13) % vocab for position in range(length)]


def forget_process_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def process_peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def repeated(repeats, work, warm_up=1):
    seconds = []
    for _ in range(repeats + warm_up):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def between(times):
    """The durations of the steps after those that warm up."""
    steps = [later - earlier for earlier, later in zip(times, times[1:])]
    return steps[min(WARM_UP_STEPS, len(steps) - 1):]


class MlxLm:
    def __init__(self, device):
        import mlx.core as mx

        # before mlx_lm makes its stream
        mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
        import mlx_lm
        from importlib.metadata import version

        self.mx, self.device = mx, device
        self.name = f"mlx-lm {mlx_lm.__version__} (mlx {version('mlx')})"

    def load(self, folder, dtype):
        from pathlib import Path

        from mlx_lm.utils import load_model

        self.model, config = load_model(Path(folder))
        self.model.set_dtype({"f32": self.mx.float32, "f16": self.mx.float16, "bf16": self.mx.bfloat16}[dtype])
        self.mx.eval(self.model.parameters())
        self.vocab = config["vocab_size"]

    def forget_peak(self):
        self.mx.clear_cache()
        self.mx.reset_peak_memory()
        forget_process_peak()

    def peak(self):
        return process_peak() if self.device == "cpu" else self.mx.get_peak_memory()

    def prefill(self, length, repeats):
        from mlx_lm.generate import generate_step

        prompt = self.mx.array(ids(self.vocab, 0, length))

        def work():
            for token, _ in generate_step(prompt, self.model, max_tokens=1):
                int(token)

        return repeated(repeats, work)

    def decode(self, sequences, length, steps, rank):
        if rank > 0:
            from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

            linear_to_lora_layers(self.model, len(self.model.layers), {"rank": rank, "scale": 2.0, "dropout": 0.0})
        times = self.decode_one(length, steps) if sequences == 1 else self.decode_batch(sequences, length, steps)
        if rank > 0:
            remove_lora_layers(self.model)
        return times

    def decode_one(self, length, steps):
        from mlx_lm.generate import generate_step

        times = []
        for token, _ in generate_step(self.mx.array(ids(self.vocab, 0, length)), self.model, max_tokens=steps + 1):
            int(token)
            times.append(time.perf_counter())
        return between(times)

    def decode_batch(self, sequences, length, steps):
        from mlx_lm.generate import BatchGenerator

        prompts = [ids(self.vocab, sequence, length) for sequence in range(sequences)]
        # the first sequences decode while the last are still read
        generator = BatchGenerator(self.model, max_tokens=steps + 8 * sequences, completion_batch_size=sequences)
        generator.insert(prompts)
        times = []
        next_tokens = getattr(generator, "next_generated", generator.next)
        while len(times) <= steps:
            responses = next_tokens()
            if not responses:
                break
            # a step counts when all sequences take part in it
            if len(responses) == sequences:
                times.append(time.perf_counter())
        return between(times)

    def train(self, sequences, length, rank, repeats):
        from functools import partial

        import mlx.nn as nn
        import mlx.optimizers as optimizers
        from mlx_lm.tuner.trainer import default_loss
        from mlx_lm.tuner.utils import linear_to_lora_layers

        mx, model = self.mx, self.model
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": 2.0, "dropout": 0.0})
        model.train()
        optimizer = optimizers.AdamW(learning_rate=1e-4)
        gradients_of = nn.value_and_grad(model, default_loss)
        state = [model.state, optimizer.state, mx.random.state]

        # as mlx_lm.tuner.trainer.train compiles its step
        @partial(mx.compile, inputs=state, outputs=state)
        def step(batch, lengths):
            (loss, tokens), gradients = gradients_of(model, batch, lengths)
            optimizer.update(model, gradients)
            return loss, tokens

        # the loss takes all tokens but the last as input
        batch = mx.array([ids(self.vocab, sequence, length + 1) for sequence in range(sequences)])
        lengths = mx.array([[0, length]] * sequences)

        def work():
            loss, tokens = step(batch, lengths)
            mx.eval(state, loss, tokens)

        return repeated(repeats, work, warm_up=2)


class Transformers:
    def __init__(self, device):
        import peft
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.transformers, self.peft = torch, transformers, peft
        self.device = {"metal": "mps"}.get(device, device)
        self.name = f"transformers {transformers.__version__} (torch {torch.__version__}, peft {peft.__version__})"

    def load(self, folder, dtype):
        torch = self.torch
        self.dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        model = self.transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=self.dtype)
        self.model = model.to(self.device).eval()
        self.vocab = model.config.vocab_size
        # no text ends by itself
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        elif self.device == "mps":
            self.torch.mps.synchronize()

    def forget_peak(self):
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
        elif self.device == "mps":
            self.torch.mps.empty_cache()
        forget_process_peak()

    def peak(self):
        if self.device == "cuda":
            return self.torch.cuda.max_memory_reserved()
        if self.device == "mps":
            return self.torch.mps.driver_allocated_memory()
        return process_peak()

    def batch(self, sequences, length):
        rows = [ids(self.vocab, sequence, length) for sequence in range(sequences)]
        return self.torch.tensor(rows, device=self.device)

    def generate(self, prompts, tokens):
        mask = self.torch.ones_like(prompts)
        self.model.generate(prompts, attention_mask=mask, max_new_tokens=tokens, do_sample=False).cpu()

    def prefill(self, length, repeats):
        prompt = self.batch(1, length)
        return repeated(repeats, lambda: self.generate(prompt, 1))

    def decode(self, sequences, length, steps, rank):
        plain = self.model
        if rank > 0:
            self.model = self.with_adapter(rank)
        prompts = self.batch(sequences, length)
        # whole calls, less that of one token: nothing is asked in between
        self.generate(prompts, 2)
        one, all_of_them = (repeated(2, lambda: self.generate(prompts, tokens), warm_up=0) for tokens in (1, steps + 1))
        if rank > 0:
            self.model.unload()
            self.model = plain
        return [(whole - first) / steps for first, whole in zip(one, all_of_them)]

    def with_adapter(self, rank):
        config = self.peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return self.peft.get_peft_model(self.model, config)

    def train(self, sequences, length, rank, repeats):
        torch = self.torch
        model = self.with_adapter(rank)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batch = self.batch(sequences, length)

        def work():
            with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.synchronize()

        return repeated(repeats, work)


class TransformersAtItsBest(Transformers):
    """Compiled forward passes over a static cache, tokens that stay on the device, and for training adapters in the type of the
    weights, a compiled model, a fused optimizer, and Liger's kernels if they are installed. Compilation is not counted."""

    def __init__(self, device):
        super().__init__(device)
        self.torch.set_float32_matmul_precision("high")
        # each shape is compiled on its own
        import torch._dynamo as dynamo

        dynamo.config.cache_size_limit = 64
        self.name += ", static cache and torch.compile"

    def compiled(self, function):
        mode = "reduce-overhead" if self.device == "cuda" else None
        return self.torch.compile(function, mode=mode, fullgraph=True, dynamic=False)

    def static_cache(self, sequences, length):
        config = self.model.config
        return self.transformers.StaticCache(config=config, max_batch_size=sequences, max_cache_len=length)

    def next_tokens(self, forward, tokens, positions, cache):
        if self.device == "cuda":
            self.torch.compiler.cudagraph_mark_step_begin()
        logits = forward(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True).clone()

    def prefill(self, length, repeats):
        prompt, forward = self.batch(1, length), self.compiled(self.model.forward)
        positions = self.torch.arange(length, device=self.device)[None]
        cache = self.static_cache(1, length)

        def work():
            cache.reset()
            self.next_tokens(forward, prompt, positions, cache).cpu()

        with self.torch.inference_mode():
            return repeated(repeats, work, warm_up=4)

    def decode(self, sequences, length, steps, rank):
        plain, torch = self.model, self.torch
        if rank > 0:
            self.model = self.with_adapter(rank)
        prompts, forward = self.batch(sequences, length), self.compiled(self.model.forward)
        cache = self.static_cache(sequences, length + steps + WARM_UP_STEPS)

        def decoded(count):
            cache.reset()
            positions = torch.arange(length, device=self.device).expand(sequences, -1)
            tokens = self.next_tokens(self.model.forward, prompts, positions, cache)
            positions = torch.full((sequences, 1), length, device=self.device)
            self.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                tokens = self.next_tokens(forward, tokens, positions, cache)
                positions = positions + 1
            tokens.cpu()
            return (time.perf_counter() - started) / count

        with torch.inference_mode():
            decoded(WARM_UP_STEPS)
            seconds = [decoded(steps) for _ in range(3)]
        if rank > 0:
            self.model.unload()
            self.model = plain
        return seconds

    def with_adapter(self, rank):
        config = self.peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return self.peft.get_peft_model(self.model, config, autocast_adapter_dtype=False)

    def train(self, sequences, length, rank, repeats):
        torch = self.torch
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model)
        except ImportError:
            pass
        model = self.with_adapter(rank)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=self.device != "mps")
        batch, compiled = self.batch(sequences, length), torch.compile(model)

        def work():
            compiled(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.synchronize()

        return repeated(repeats, work, warm_up=4)


def main():
    kind, device = sys.argv[1:3]
    kinds = {"mlx-lm": MlxLm, "transformers": Transformers, "transformers-best": TransformersAtItsBest}
    try:
        peer = kinds[kind](device)
    except ImportError as error:
        answer(missing=str(error))
        return
    answer(name=peer.name)
    for line in sys.stdin:
        request = json.loads(line)
        work = request.pop("work")
        try:
            if work == "load":
                peer.load(**request)
                answer(seconds=[])
                continue
            peer.forget_peak()
            seconds = getattr(peer, work)(**request)
            answer(seconds=seconds, peak_memory_bytes=peer.peak())
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


main()
