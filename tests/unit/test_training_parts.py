"""Schedule, optimizer, clipping, mixed precision, stopping: each alone, without ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from titan.config import Optimizer, Schedule
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.norms import GradientNorms
from titan.optim import make_optimizer, set_lr, state_tensors
from titan.parallel.mesh import Mesh
from titan.precision.mixed import compute_in
from titan.schedule import lr_share
from titan.stop import Stop


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedules_rise_hold_and_fall(name: str, warmup: int) -> None:
    schedule = Schedule(name=name, warmup_steps=warmup, decay_steps=20 if name == "wsd" else 0, min_lr_ratio=0.2)  # type: ignore[arg-type]
    steps = warmup + 100
    shares = [lr_share(schedule, step, steps) for step in range(1, steps + 1)]
    assert shares[:warmup] == pytest.approx([s / warmup for s in range(1, warmup + 1)])
    after = shares[max(0, warmup - 1) :]
    assert after == sorted(after, reverse=True)
    assert shares[-1] == pytest.approx(1.0 if name == "constant" else 0.2)
    middle = {"constant": 1.0, "linear": 0.6, "cosine": 0.6, "wsd": 1.0}[name]
    assert lr_share(schedule, warmup + 50, steps) == pytest.approx(middle)
    if name == "wsd":
        assert shares[-21] == 1.0 > shares[-20]


def test_no_decay_on_vectors_and_states_by_name() -> None:
    model = Transformer(Config(n_layers=1))
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_lr(optimizer, 0.1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    states = state_tensors(model, optimizer)
    assert len(states) == 3 * len(before)
    assert states["optimizer.step.norm.weight"].item() == 1


def test_made_states_change_nothing() -> None:
    """An optimizer with states made beforehand steps as one that makes them at its first step."""
    models = [nn.Linear(8, 8), nn.Linear(8, 8)]
    models[1].load_state_dict(models[0].state_dict())
    ours = make_optimizer(models[0], Optimizer(weight_decay=0.0))
    theirs = torch.optim.AdamW(models[1].parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for _ in range(5):
        x = torch.randn(4, 8)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("limit", [0.0, 0.1, 1e9])
def test_clipping_is_by_the_norm_of_all(limit: float) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    norms = GradientNorms(model, model, "*", Mesh(), lambda name: True)
    model(torch.randn(2, 5)).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in grads]).double().norm().item()
    found, loss = norms.clip(limit, torch.tensor(2.5))
    assert found.item() == pytest.approx(norm, rel=1e-6)
    assert loss.item() == 2.5
    scale = min(1.0, limit / norm) if limit else 1.0
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad * scale, rtol=1e-4, atol=0)


def test_mixed_precision_keeps_masters_and_accumulates_in_float32() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(n_layers=2))
    model.init_weights()
    masters = dict(model.named_parameters())
    compute_in([*model.layers.values(), model], torch.bfloat16)
    seen = []
    up = model.get_submodule("layers.0.ffn.up")
    up.register_forward_hook(lambda module, args, out: seen.append((out.dtype, module.weight.dtype)))
    tokens = torch.randint(512, (2, 17))

    def backward() -> None:
        model(tokens[:, :-1], labels=tokens[:, 1:]).backward()

    backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in masters.items()}
    first = {name: p.grad.clone() for name, p in masters.items() if p.grad is not None}
    assert {g.dtype for g in first.values()} == {torch.float32}
    backward()
    for name, parameter in masters.items():
        torch.testing.assert_close(parameter.grad, 2 * first[name], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 4, 999))
    assert {id(p) for p in model.parameters()} == {id(p) for p in masters.values()}, "an error lost the masters"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_wish_to_stop(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = Stop()
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same request, seen twice
        assert stop.wanted()
        assert Stop(seconds=1e-9).out_of_time()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = "import time; from titan.stop import Stop; Stop(); print('ready', flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 1
