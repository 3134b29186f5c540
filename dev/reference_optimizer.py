"""Writes the golden numbers of optimizers and schedules; called by reference.py."""

import math

import torch
import torch.optim._muon as torch_muon
import transformers


def steps_of(reference, make, shapes, seed, state=None, lr=1e-2):
    """Ten steps of a torch optimizer: values, gradients and the final state."""
    random = reference.generator(seed)
    values = {name: torch.randn(shape, generator=random).requires_grad_() for name, shape in shapes.items()}
    tensors = {f"step.0.{name}": value.detach().clone() for name, value in values.items()}
    found = make(list(values.values()), lr)
    for step in range(1, 11):
        for name, value in values.items():
            value.grad = torch.randn(value.shape, generator=random) * 10.0 ** (step % 4 - 2)
            if step == 3:
                value.grad.zero_()
            tensors[f"grad.{step}.{name}"] = value.grad.clone()
        for one in found if isinstance(found, list) else [found]:
            one.step()
        tensors.update({f"step.{step}.{name}": value.detach().clone() for name, value in values.items()})
    for key, mine in (state or {}).items():
        for name, value in values.items():
            if key in found.state[value]:
                tensors[f"{mine}.{name}"] = found.state[value][key]
    return tensors, values, found


def dynamic_map(signed):
    """The numbers of the dynamic tree code: seven decades, with finer divisions of the higher ones, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        for i in range(count):
            value = (0.1 + 0.9 * (i + 0.5) / count) * 10.0 ** (decade - 6)
            values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def near_bitsandbytes(reference, shapes, values, maps, settings):
    """Checks codes and steps against bitsandbytes if it is installed; on the CPU it does not always use the nearest code."""
    try:
        from bitsandbytes.functional import create_dynamic_map
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        return
    for signed, codes in maps.items():
        assert (create_dynamic_map(signed) - codes).abs().max() < 1e-7
    _, theirs, _ = steps_of(reference, lambda p, lr: AdamW8bit(p, lr, weight_decay=0.1, min_8bit_size=0, **settings), shapes, 62)
    for name, value in values.items():
        assert ((theirs[name] - value).abs() < 1e-6).float().mean() > 0.9


def optimizers(reference):
    shapes = {"matrix": (5, 7), "vector": (11,), "cube": (3, 4, 2)}
    settings = dict(betas=(0.9, 0.999), eps=1e-8)
    slow = dict(foreach=False, fused=False)
    moments = {"exp_avg": "first_moment", "exp_avg_sq": "second_moment"}

    def write(name, make, state=None, shapes=shapes):
        tensors, values, found = steps_of(reference, make, shapes, 60, state)
        reference.write_tensors(reference.ROOT / "optimizer" / f"{name}.safetensors", tensors)
        return values, found

    write("adamw", lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01, **settings, **slow), moments)
    write("adam", lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1, **settings, **slow), moments)
    momentum = {"momentum_buffer": "first_moment"}
    write("sgd", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1, **slow), momentum)
    write("sgd-nesterov", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, **slow), momentum)
    write("sgd-plain", lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.1, **slow))

    class Lion(torch.optim.Optimizer):
        """Program 1 of the paper."""

        def __init__(self, parameters, lr, betas, weight_decay):
            super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay))

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                (beta1, beta2), lr = group["betas"], group["lr"]
                for p in group["params"]:
                    moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    direction = torch.sign(beta1 * moment + (1.0 - beta1) * p.grad)
                    p.sub_(lr * (direction + group["weight_decay"] * p))
                    moment.copy_(beta2 * moment + (1.0 - beta2) * p.grad)

    write("lion", lambda p, lr: Lion(p, lr, (0.9, 0.99), 0.1), {"exp_avg": "first_moment"})

    # No factors for 3-D tensors: their two last dimensions are not a matrix of the model.
    shapes2 = {"tall": (9, 4), "wide": (3, 300), "vector": (11,)}
    adafactor = dict(eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, relative_step=False)
    for name, scales in [("adafactor", False), ("adafactor-scaled", True)]:
        factors = {"exp_avg_sq_row": "row_means", "exp_avg_sq_col": "column_means", "exp_avg_sq": "second_moment"}
        write(name, lambda p, lr: transformers.Adafactor(p, lr, weight_decay=0.1, scale_parameter=scales, **adafactor), factors, shapes2)

    def in_single_precision(grad, coefficients, iterations, eps):
        """torch's iteration uses bfloat16; this is the same iteration in the dtype of the gradient."""
        a, b, c = coefficients
        x = grad.T if grad.size(0) > grad.size(1) else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(iterations):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if grad.size(0) > grad.size(1) else x

    in_half_precision = torch_muon._zeropower_via_newtonschulz
    sample = torch.randn(9, 40, generator=reference.generator(61))
    coefficients = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)
    arguments = (sample, coefficients, 5, torch_muon.EPS)
    assert (in_single_precision(*arguments) - in_half_precision(*arguments).float()).abs().max() < 0.02
    torch_muon._zeropower_via_newtonschulz = in_single_precision
    rest = dict(weight_decay=0.1, **settings, **slow)
    for scale in ["original", "match_rms_adamw", "spectral_unclamped"]:
        write(f"muon-{scale}", lambda p, lr: [
            torch.optim.Muon(p[:2], lr, weight_decay=0.1, momentum=0.95, nesterov=scale != "original", adjust_lr_fn=scale),
            torch.optim.AdamW(p[2:], lr, **rest),
        ], None, shapes2)
    torch_muon._zeropower_via_newtonschulz = in_half_precision

    class ScheduleFreeAdamW(torch.optim.Optimizer):
        """Algorithm 1 of the paper, storing all three sequences."""

        def __init__(self, parameters, lr, betas, eps, weight_decay):
            super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
            self.count, self.highest, self.total = 0, 0.0, 0.0

        @torch.no_grad()
        def step(self):
            self.count += 1
            for group in self.param_groups:
                (beta1, beta2), rate = group["betas"], group["lr"] * min(1.0, self.count / 4)
                self.highest = max(self.highest, rate)
                self.total += self.highest ** 2
                share = self.highest ** 2 / self.total
                for y in group["params"]:
                    state = self.state[y]
                    if not state:
                        state.update(x=y.double(), z=y.double(), v=torch.zeros_like(y, dtype=torch.float64))
                    grad = y.grad.double()
                    state["v"] = beta2 * state["v"] + (1.0 - beta2) * grad ** 2
                    root = (state["v"] / (1.0 - beta2 ** self.count)).sqrt() + group["eps"]
                    state["z"] = state["z"] - rate * (grad / root + group["weight_decay"] * y.double())
                    state["x"] = (1.0 - share) * state["x"] + share * state["z"]
                    y.copy_((1.0 - beta1) * state["z"] + beta1 * state["x"])

    def with_package(values, tensors):
        """Checks the steps against the package of the paper's authors, if it is installed."""
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            return
        copies = [torch.nn.Parameter(tensors[f"step.0.{name}"].clone()) for name in values]
        package = AdamWScheduleFree(copies, lr=1e-2, weight_decay=0.1, warmup_steps=4, **settings)
        package.train()
        for step in range(1, 11):
            for name, copy in zip(values, copies):
                copy.grad = tensors[f"grad.{step}.{name}"].clone()
            package.step()
            for name, copy in zip(values, copies):
                assert (copy - tensors[f"step.{step}.{name}"]).abs().max() < 1e-6

    tensors, values, found = steps_of(
        reference, lambda p, lr: ScheduleFreeAdamW(p, lr, weight_decay=0.1, **settings), shapes, 60, {"x": "average", "z": "last_point"})
    with_package(values, tensors)
    reference.write_tensors(reference.ROOT / "optimizer" / "schedule-free-adamw.safetensors", {k: v.float() for k, v in tensors.items()})

    maps = {True: dynamic_map(True), False: dynamic_map(False)}

    class AdamW8bit(torch.optim.Optimizer):
        """AdamW with moments rounded to the nearest code in blocks of 256; only second moments of 0 get the code of 0."""

        def __init__(self, parameters, lr, betas, eps, weight_decay):
            super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
            self.count = 0

        @staticmethod
        def rounded(moment, signed):
            blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % 256)).view(-1, 256)
            scales = blocks.abs().amax(1, keepdim=True)
            relative = torch.where(scales > 0, blocks / scales, torch.zeros_like(blocks))
            codes = (relative[..., None] - maps[signed]).abs().argmin(-1)
            if not signed:
                codes = torch.where((blocks > 0) & (codes == 0), 1, codes)
            value = (maps[signed][codes] * scales).flatten()[: moment.numel()].view(moment.shape)
            return value, codes.flatten()[: moment.numel()].to(torch.uint8), scales.flatten()

        @torch.no_grad()
        def step(self):
            self.count += 1
            for group in self.param_groups:
                (beta1, beta2), lr = group["betas"], group["lr"]
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                    m, v = beta1 * state["m"] + (1 - beta1) * p.grad, beta2 * state["v"] + (1 - beta2) * p.grad**2
                    root = v.sqrt() / math.sqrt(1 - beta2**self.count) + group["eps"]
                    p.mul_(1 - lr * group["weight_decay"]).sub_(lr / (1 - beta1**self.count) * m / root)
                    state["m"], state["first_codes"], state["first_scales"] = self.rounded(m, True)
                    state["v"], state["second_codes"], state["second_scales"] = self.rounded(v, False)

    shapes8 = {"matrix": (5, 300), "vector": (257,)}
    state = {name: name for name in ["first_codes", "first_scales", "second_codes", "second_scales"]}
    tensors, values, found = steps_of(reference, lambda p, lr: AdamW8bit(p, lr, weight_decay=0.1, **settings), shapes8, 62, state)
    near_bitsandbytes(reference, shapes8, values, maps, settings)
    reference.write_tensors(reference.ROOT / "optimizer" / "adamw-8bit.safetensors", {**tensors, "signed_map": maps[True], "unsigned_map": maps[False]})


def schedules(reference):
    def table(make):
        parameter = torch.nn.Parameter(torch.zeros(1))
        sgd = torch.optim.SGD([parameter], lr=1e-3)
        schedule, rates = make(sgd), []
        for _ in range(30):
            rates.append(sgd.param_groups[0]["lr"])
            sgd.step()
            schedule.step()
        return rates

    def cosine_to_minimum(step, warmup, total, highest, lowest):
        if step < warmup:
            return highest * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return lowest + (highest - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def linear_to_minimum(step, warmup, total, highest, lowest):
        if step < warmup:
            return highest * step / warmup
        return lowest + (highest - lowest) * max(0.0, (total - step) / max(1, total - warmup))

    t, cases = transformers, []
    for warmup in [0, 5]:
        cases += [
            {"schedule": "constant", "warmup": warmup, "lrs": table(lambda o: t.get_constant_schedule_with_warmup(o, warmup))},
            {"schedule": "linear", "warmup": warmup, "lrs": table(lambda o: t.get_linear_schedule_with_warmup(o, warmup, 30))},
            {"schedule": "cosine", "warmup": warmup, "lrs": table(lambda o: t.get_cosine_schedule_with_warmup(o, warmup, 30))},
        ]
    for case in cases:
        case["min_lr"] = 0.0
    for warmup in [0, 5]:
        rates = [cosine_to_minimum(step, warmup, 30, 1e-3, 1e-4) for step in range(35)]
        library = table(lambda o: t.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, 30, min_lr=1e-4))
        assert all(abs(a - b) < 1e-12 for a, b in zip(rates, library))
        cases.append({"schedule": "cosine", "warmup": warmup, "min_lr": 1e-4, "lrs": rates})
        rates = [linear_to_minimum(step, warmup, 30, 1e-3, 1e-4) for step in range(35)]
        cases.append({"schedule": "linear", "warmup": warmup, "min_lr": 1e-4, "lrs": rates})
    # These fall to 0 in transformers; there, the warm-up of the stable schedule starts at its minimum, ours at 0.
    for warmup in [0, 5]:
        common = {"warmup": warmup, "min_lr": 0.0}
        cases += [
            {"schedule": "cosine-restarts", "num_cycles": cycles, **common,
             "lrs": table(lambda o: t.get_cosine_with_hard_restarts_schedule_with_warmup(o, warmup, 28, cycles))}
            for cycles in [1, 3]
        ]
        cases += [
            {"schedule": "polynomial", "power": power, **common, "min_lr": 1e-5,
             "lrs": table(lambda o: t.get_polynomial_decay_schedule_with_warmup(o, warmup, 28, lr_end=1e-5, power=power))}
            for power in [1.0, 2.5]
        ]
        cases += [
            {"schedule": "warmup-stable-decay", "decay_steps": 9, "shape": shape, **common, "min_lr": 1e-3 * ratio,
             "lrs": table(lambda o: t.get_wsd_schedule(o, warmup, 9, 28, decay_type=shape, min_lr_ratio=ratio))}
            for shape in ["linear", "cosine", "1-sqrt"] for ratio in ([0.0, 0.1] if warmup == 0 else [0.0])
        ]
        cases.append({"schedule": "inverse-sqrt", **common, "lrs": table(lambda o: t.get_inverse_sqrt_schedule(o, warmup))})
    for case in cases:
        case.setdefault("total", 28 if case["schedule"] in ["cosine-restarts", "polynomial", "warmup-stable-decay"] else 30)
    reference.write_json(reference.ROOT / "optimizer" / "schedules.json", {"max_lr": 1e-3, "cases": cases})


def write(reference):
    optimizers(reference)
    schedules(reference)
