"""The operator on one GPU. Checks of it that a CPU can make are in tests/."""

import itertools
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from unittest.mock import patch

import torch

from sla2_kernels import select_key_blocks, sla2_attention, triton_backend
from sla2_kernels.fitted_attention import FITTED_ROWS, call_errors, fitted_attention, sample_rows
from sla2_kernels.kernels import launch
from sla2_kernels.key_block_sums import key_block_sums, largest_scores, why_no_kernels
from sla2_kernels.reference import fitted_ratio, sla2_reference
from sla2_kernels.router import K_BLOCK, block_count

from ..measure import launch_ms, median_ms
from . import busy
from .checks import BOUNDS, random_qkv, relative_error, require

SHARED_SECONDS = 15  # of calls beside another process


def missing(comfyui):
    """None: one GPU is enough."""


def checks(comfyui):
    """The first one needs a process that has called no kernel yet."""
    return [
        *forward_checks(),
        gradients,
        another_process,
        compiled_around_it,
        intermediates_beyond_32_bits,
        cost_of_the_diagonal,
        router_training_sums,
    ]


def forward_checks():
    """Those of the forward pass alone, of few minutes."""
    return [
        threads_launch_for_the_first_time,
        few_tokens,
        queries_of_a_selection,
        large_logits,
        linear_branch_without_weight,
        replayed_calls,
        two_streams,
        fitted_and_judged,
        cuda_graph,
    ]


def threads_launch_for_the_first_time():
    """Six threads make the first call of the process at once, with an empty cache of kernels."""
    inputs = random_qkv(2500, 2, seed=1)
    gate, outs, errors = threading.Barrier(6), {}, []

    def work(number):
        try:
            gate.wait()
            outs[number] = sla2_attention(*inputs, sparsity=0.9, layout="BNHD", backend="triton")
            torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not errors, f"a thread failed: {errors[:1]}")
    alone = sla2_attention(*inputs, sparsity=0.9, layout="BNHD", backend="triton")
    require(all(torch.equal(out, alone) for out in outs.values()), "threads got other results than one call alone")
    return "6 threads, all bits equal"


def few_tokens():
    """Counts that are 1 (which Triton compiles apart), ragged ends, all dtypes and precisions, with and without the linear
    branch, against float64."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    cases = itertools.product((1, 63, 64, 65, 128, 129, 1000), (torch.bfloat16, torch.float16), (True, False))
    for tokens, dtype, linear in cases:
        inputs = random_qkv(tokens, 1, dtype=dtype, seed=tokens)
        options = {"sparsity": 0.5, "linear_branch": linear}
        expected, _ = sla2_reference(*(x.transpose(1, 2) for x in inputs), **options)
        for precision in BOUNDS:
            out = sla2_attention(*inputs, **options, layout="BNHD", precision=precision, backend="triton")
            error = relative_error(out.transpose(1, 2), expected)
            worst[precision] = max(worst[precision], error)
            which = f"{tokens} tokens, {dtype}, {precision}{'' if linear else ', no linear branch'}"
            require(error < BOUNDS[precision], f"{which}: error {error:.2e}")
    return "largest errors " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def queries_of_a_selection():
    """64 and 128 query tokens, head_dim 64 and 128, a ratio per block and an estimated one, against float64."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for query_block, head_dim, mixing in itertools.product((64, 128), (64, 128), ("given", "estimated")):
        q, k, v = random_qkv(3001, 2, head_dim, seed=12)
        blocks = select_key_blocks(q, k, sparsity=0.9, query_block=query_block, layout="BNHD")
        options = {"query_block": query_block, "key_blocks": blocks, "alpha": None}
        if mixing == "given":
            options["alpha"] = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.4, 0.95]], device="cuda")
        expected, shares = sla2_reference(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        for precision in BOUNDS:
            choice = {"precision": precision, "layout": "BNHD", "backend": "triton", "return_alpha": True}
            out, share = sla2_attention(q, k, v, **options, **choice)
            errors = relative_error(out.transpose(1, 2), expected), relative_error(share, shares)
            worst[precision] = max(worst[precision], *errors)
            what = f"{query_block} queries, head_dim {head_dim}, {mixing} ratio, {precision}"
            require(max(errors) < BOUNDS[precision], f"{what}: errors of output and ratio {errors}")
    return "largest errors " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def large_logits():
    """Logits up to millions, against float64: no softmax mass is lost, and INT8 errs no more than FP8.

    4,096 tokens, sparsity 0.9, head_dim 64 and 128, which are two kernels on Hopper. Mass: V = 1, alpha = 1 must give 1, but
    for the rounding of the output and of P, 1/16 in FP8. Error: with any V, on Gaussian Q and K alone, since one outlier
    channel suits FP8 better than INT8.
    """
    said = []
    for head_dim in (64, 128):
        for name, factor, channels in (
            ("11,000", 40, slice(None)),
            ("35,000", 75, slice(None)),
            ("200,000", 180, slice(None)),
            ("one channel times 400", 400, slice(3, 4)),
            ("one channel times 2,000", 2000, slice(3, 4)),
        ):
            q, k, v = random_qkv(4096, 4, head_dim, seed=8)
            q[..., channels] *= factor
            k[..., channels] *= factor
            blocks = select_key_blocks(q, k, sparsity=0.9, layout="BNHD")
            options = {"alpha": torch.ones(4, device="cuda"), "key_blocks": blocks}
            expected, _ = sla2_reference(*(x.transpose(1, 2) for x in (q, k, v)), **options)
            lost, errors = {}, {}
            for precision in BOUNDS:
                options |= {"precision": precision, "layout": "BNHD", "backend": "triton"}
                mass = sla2_attention(q, k, torch.ones_like(v), **options).double()
                lost[precision] = (mass - 1).abs().nan_to_num(torch.inf).max().item()
                errors[precision] = relative_error(sla2_attention(q, k, v, **options).transpose(1, 2), expected)
            what = f"head_dim {head_dim}, {name}"
            seen = ", ".join(f"{x} mass off by {lost[x]:.3f} and error {errors[x]:.3f}" for x in BOUNDS)
            require(max(lost.values()) < 0.07, f"{what}: {seen}")
            require(channels.start is not None or errors["int8"] < 1.2 * errors["fp8"] + 0.02, f"{what}: {seen}")
            said.append(f"{what}: {seen}")
    return "; ".join(said)


def linear_branch_without_weight():
    """Rows whose features no unselected key has: the ratio is 1, V = 1 gives 1, and all gradients are finite."""
    worst = 0.0
    for head_dim in (64, 128):
        for sharpness in (60, 300):
            q, k, v = random_qkv(2000, 2, head_dim, seed=9)
            q[:, ::2, :, 5] += 300
            sign = torch.arange(2000, device="cuda")[:, None] % 2 * 2 - 1
            k[..., 3] += sharpness * sign
            k[..., 4] -= sharpness * sign
            for precision in BOUNDS:
                leaves = [x.detach().requires_grad_() for x in (q, k, torch.ones_like(v))]
                alpha = torch.full((2,), 0.3, device="cuda", requires_grad=True)
                options = {"alpha": alpha, "precision": precision, "layout": "BNHD", "backend": "triton"}
                out, share = sla2_attention(*leaves, sparsity=0.9, return_alpha=True, **options)
                out.sum().backward()
                worst = max(worst, (out - 1).abs().nan_to_num(torch.inf).max().item())
                what = f"head_dim {head_dim}, sharpness {sharpness}, {precision}"
                require(worst < 0.07, f"{what}: V = 1 gives 1 but for {worst:.3f}")
                require(bool((share[..., ::2] == 1).all()), f"{what}: a ratio is not 1")
                finite = all(torch.isfinite(x.grad).all() for x in (*leaves, alpha))
                require(finite, f"{what}: a gradient is not finite")
    return f"V = 1 gives 1 within {worst:.3f}"


def gradients():
    """All gradients against float64 in 16 bit: ragged queries and keys, two batches of three heads, views of one projection,
    64 and 128 query tokens per selection, with and without the linear branch; also with scores around -260 (log2), where a
    row past the end must add nothing, and with scores that rise by more than 128, the range of float32's exponents. A second
    backward pass, in memory full of NaN, has the same bits."""
    worst = 0.0
    scores = ((1, 0), (1, 4), (30, 0))
    cases = itertools.product((130, 1000, 2061), (torch.bfloat16, torch.float16), (64, 128), (True, False), scores)
    for tokens, dtype, query_block, linear, (factor, mean) in cases:
        q, k, v = random_qkv(tokens, 9, dtype=dtype, seed=tokens, batch=2)[0].unflatten(2, (3, 3)).unbind(2)
        q.mul_(factor).add_(mean)
        k -= mean
        grad = random_qkv(tokens, 3, dtype=dtype, seed=1, batch=2)[0]
        alpha = [torch.tensor([0.3, 0.6, 0.9], device="cuda")] if linear else []
        leaves = [x.detach().requires_grad_() for x in (q, k[:, 37:], v[:, 37:], *alpha)]
        shared = {"query_block": query_block, "linear_branch": linear}
        shared["key_blocks"] = select_key_blocks(*leaves[:2], sparsity=0.5, layout="BNHD", query_block=query_block)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        out, _ = sla2_reference(*(x.transpose(1, 2) for x in exact[:3]), None, None, *exact[3:], **shared)
        expected = torch.autograd.grad(out.transpose(1, 2), exact, grad.double())

        def found(leaves=leaves, grad=grad, shared=shared):
            options = {**shared, "precision": "16bit", "layout": "BNHD", "backend": "triton"}
            return torch.autograd.grad(sla2_attention(*leaves[:3], None, None, *leaves[3:], **options), leaves, grad)

        first = found()
        errors = [relative_error(*pair) for pair in zip(first, expected, strict=True)]
        worst = max(worst, *errors)
        what = f"{tokens} tokens, {dtype}, {query_block} per selection, linear branch {linear}, queries {factor} q + {mean}"
        require(worst < BOUNDS["16bit"], f"{what}: errors of dq, dk, dv and the ratio's gradient {errors}")
        _spoil_free_memory()
        require(all(map(torch.equal, found(), first)), f"{what}: other bits in the second backward pass")
    return f"largest error {worst:.1e}, all bits equal"


def another_process():
    """Forward and backward at 32,760 tokens while another process has its share of the GPU: kernels are interrupted there,
    and what is not waited for comes too late. All bits are those of the first call."""
    q, k, v = (x.requires_grad_() for x in random_qkv(32_760, 6, seed=4, batch=2))
    grad = random_qkv(32_760, 6, seed=5, batch=2)[0] * 1e-7
    proj = torch.eye(128, device="cuda")
    alpha = torch.full((6,), 0.8, device="cuda", requires_grad=True)

    def call():
        out = sla2_attention(q, k, v, proj, proj, alpha, sparsity=0.97, precision="int8", layout="BNHD")
        return out.detach(), *torch.autograd.grad(out, (q, k, v, alpha), grad)

    first = call()
    others, calls = torch.zeros(len(first), dtype=torch.int64, device="cuda"), 0
    with _busy_gpu():
        end = time.monotonic() + SHARED_SECONDS
        while time.monotonic() < end:
            for _ in range(5):  # nothing is waited for in between, so that the GPU has always more to do
                others += torch.stack([(x != y).any() for x, y in zip(call(), first, strict=True)])
            calls += 5
            torch.cuda.synchronize()
    found = dict(zip(("out", "dq", "dk", "dv", "the ratio's gradient"), others.tolist(), strict=True))
    require(not any(found.values()), f"of {calls} calls so many have other bits: {found}")
    return f"{calls} calls, all bits equal"


@contextmanager
def _busy_gpu():
    """While open, another process keeps the GPU busy."""
    command = [sys.executable, "-m", busy.__name__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  itself
        try:
            require(process.stdout.readline() == "busy\n", "the other process did not start")
            yield
        finally:
            process.kill()


def replayed_calls():
    """A call of a kind that was made before replays its launches: for other tensors, in memory full of NaN, with the
    bits of the first one. Tensors that were one at first need not stay one."""
    for precision in BOUNDS:
        for mixing in ({}, {"alpha": torch.full((4,), 0.8, device="cuda")}, {"linear_branch": False}):
            for blocks in (None, torch.arange(5, device="cuda").expand(1, 4, 24, 5)):

                def call(*inputs, precision=precision, mixing=mixing, blocks=blocks):
                    chosen = {**mixing, "key_blocks": blocks, "precision": precision}
                    return sla2_attention(*inputs, sparsity=0.9, layout="BNHD", return_alpha=True, **chosen)

                inputs = random_qkv(3001, 4, seed=6)
                one = inputs[:1] * 3
                for first in (inputs, one):
                    expected = [x.clone() for x in call(*first)]
                    again = [x.clone() for x in first]
                    _spoil_free_memory()
                    same = all(map(torch.equal, call(*again), expected))
                    require(same, f"{precision}: other bits than at the first call")
    q, k, v = random_qkv(4096, 12, seed=7)
    return f"all bits equal; a call takes the host {launch_ms(lambda: sla2_attention(q, k, v, layout='BNHD')):.2f} ms"


def two_streams():
    """Replayed calls work on two groups of heads at a time, on two streams: one right after the other, with inputs in turns, in
    one and in several groups a stream, and as a CUDA graph. All bits are those of launches that came one after the other."""
    inputs, rows = [random_qkv(20_000, 8, seed=seed) for seed in (9, 10)], sample_rows(20_000, 0, "cuda")
    ratio = torch.linspace(0.5, 0.9, 8, device="cuda")
    calls = 0
    for precision, kind, floor in itertools.product(BOUNDS, ("given", "estimated", "fitted"), (0, 2**26)):
        options = {"sparsity": 0.95, "precision": precision, "layout": "BNHD"}

        def call(tensors, kind=kind, options=options):
            if kind == "fitted":
                return fitted_attention(*tensors, rows=rows, **options).out
            return sla2_attention(*tensors, alpha=ratio if kind == "given" else None, **options)

        with (
            patch.object(triton_backend, "WORKSPACE_FLOOR", floor),
            patch.object(triton_backend, "_lanes", lambda device: 2),  # also on Hopper, which has no use for it
        ):
            expected = []
            for tensors in inputs:
                launch._recordings.clear()
                expected.append(call(tensors))  # recorded, so on one stream
            others = torch.zeros((), dtype=torch.int64, device="cuda")
            _spoil_free_memory()
            for number in range(40):
                others += (call(inputs[number % 2]) != expected[number % 2]).any()
            static = [x.clone() for x in inputs[0]]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call(static)
            for number in range(10):
                for place, fresh in zip(static, inputs[number % 2], strict=True):
                    place.copy_(fresh)
                graph.replay()
                others += (captured != expected[number % 2]).any()
        calls += 50
        require(not others.item(), f"{precision}, {kind} ratio: {others.item()} of 50 calls have other bits")
    launch._recordings.clear()
    return f"{calls} calls, all bits equal"


def fitted_and_judged():
    """Sampled rows, ratios and totals of a call that fits, against float64 and plain torch; replayed, the same bits."""
    q, k, v = (x.transpose(1, 2) for x in random_qkv(3001, 4, seed=8))
    rows, blocks = sample_rows(3001, 0, "cuda"), select_key_blocks(q, k, sparsity=0.9)
    on_cpu = [x.cpu() for x in (q, k, v, blocks, rows)]
    ratio, _ = fitted_ratio(*on_cpu[:4], on_cpu[4][:FITTED_ROWS])
    _, dense = fitted_ratio(*on_cpu)
    worst = 0.0

    def call(precision):
        found = fitted_attention(q, k, v, rows=rows, key_blocks=blocks, precision=precision)
        found.out[0, 1, rows[30], 5] = torch.nan
        return *found, call_errors(found.out, found.dense, rows)

    for precision in BOUNDS:
        first = [x.cpu() for x in call(precision)]
        out, fitted, exact, errors = first
        require(relative_error(exact, dense) < 1e-2, f"{precision}: the sampled rows are not dense attention")
        worst = max(worst, (fitted - ratio).abs().max().item())
        require(worst < 5e-2, f"{precision}: the ratio is {worst:.3f} from that in float64")
        expected = call_errors(out, exact, on_cpu[4])
        require(torch.allclose(errors, expected, rtol=1e-4) and errors[4] == 1, f"{precision}: {errors} not {expected}")
        _spoil_free_memory()
        same = all(map(torch.equal, (x.nan_to_num().cpu() for x in call(precision)), (x.nan_to_num() for x in first)))
        require(same, f"{precision}: other bits than at the first call")
    return f"ratios within {worst:.4f}, all bits equal"


def _spoil_free_memory():
    """Leaves nothing in PyTorch's cache but memory full of NaN."""
    torch.cuda.empty_cache()
    pieces = [torch.full((size,), float("nan"), device="cuda") for size in (2**28, *[2**17] * 200)]
    del pieces


def intermediates_beyond_32_bits():
    """Inputs and intermediates of more than 2^31 elements: the last heads equal a call of these heads alone."""
    tokens, heads = 430_000, 40
    inputs = random_qkv(tokens, heads, seed=2)
    require(inputs[0].numel() > 2**31, "the input is too small for this check")
    out = sla2_attention(*inputs, sparsity=0.97, layout="BNHD", backend="triton")
    alone = sla2_attention(*(x[:, :, -2:] for x in inputs), sparsity=0.97, layout="BNHD", backend="triton")
    require(torch.equal(out[:, :, -2:], alone), "the last heads differ from a call of these heads alone")
    require(bool(torch.isfinite(out[:, -1]).all()), "NaN or infinity in the last row")
    return f"{inputs[0].numel():,} elements, all bits equal"


def cuda_graph():
    """A captured call replays on new contents with the bits of an ordinary call, for every precision and ratio."""
    for precision in BOUNDS:
        for alpha in (None, torch.full((4,), 0.8, device="cuda")):
            static = random_qkv(5000, 4, seed=3)

            def call(inputs, precision=precision, alpha=alpha):
                return sla2_attention(
                    *inputs, alpha=alpha, sparsity=0.9, layout="BNHD", precision=precision, keep_diagonal=True
                )

            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                call(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call(static)
            for place, fresh in zip(static, random_qkv(5000, 4, seed=4), strict=True):
                place.copy_(fresh)
            graph.replay()
            torch.cuda.synchronize()
            require(torch.equal(captured, call(static)), f"{precision}: the replay differs from a call")
    return "all precisions, learned and estimated ratio, all bits equal"


def compiled_around_it():
    """torch.compile with fullgraph, and with CUDA graphs: one operator, its output equal to the uncompiled module's."""
    layer = torch.nn.Linear(512, 3 * 512, device="cuda", dtype=torch.bfloat16)

    def module(x):
        q, k, v = layer(x).unflatten(-1, (3, 4, 128)).unbind(2)
        return sla2_attention(q, k, v, sparsity=0.9, layout="BNHD", keep_diagonal=True).flatten(2)

    x = torch.randn(1, 3000, 512, device="cuda", dtype=torch.bfloat16)
    said = []
    with torch.no_grad():
        expected = module(x).double()
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(module, fullgraph=True, mode=mode)
            for _ in range(3):
                out = compiled(x).clone()
            error = relative_error(out, expected)
            require(error < 1e-2, f"mode {mode}: differs by {error:.2e}")
            said.append(f"{mode} {error:.1e}")
    return "difference to eager: " + ", ".join(said)


def cost_of_the_diagonal():
    """Milliseconds with and without each query block's own key blocks, skips 97%, int8, learned ratio."""
    said = []
    for name, tokens, heads in (("1.3B-480p", 32760, 12), ("14B-720p", 75600, 40)):
        inputs, alpha = random_qkv(tokens, heads, seed=5), torch.full((heads,), 0.8, device="cuda")
        times = [
            median_ms(
                lambda kept=kept, inputs=inputs, alpha=alpha: sla2_attention(
                    *inputs, alpha=alpha, sparsity=0.97, layout="BNHD", precision="int8", keep_diagonal=kept
                ),
                "cuda",
            )
            for kept in (False, True)
        ]
        said.append(f"{name} {times[0]:.3f} -> {times[1]:.3f} ms")
    return ", ".join(said)


def router_training_sums():
    """Attention by key block, from which a router is trained, against float64: ragged keys as views, then keys of a large mean
    with an outlier channel, whose scores are of hundreds."""
    worst = {}
    for dtype, head_dim, hard in itertools.product((torch.bfloat16, torch.float16), (64, 128), (False, True)):
        q, k, v = random_qkv(5000, 4, head_dim, dtype=dtype, seed=11)
        if hard:
            k += 8 * torch.randn(1, 1, 4, head_dim, device="cuda").to(dtype)
            k[..., 3] += 40
            q[..., 3] *= 6
        q, (k, v) = q[0, :1024].transpose(0, 1).contiguous(), (x[0].transpose(0, 1) for x in (k, v))
        require(why_no_kernels(q, k, v) is None, f"no kernels take {dtype}: {why_no_kernels(q, k, v)}")
        mass, scale = torch.full((4, 1024, block_count(5000, K_BLOCK)), torch.nan, device="cuda"), head_dim**-0.5
        value = key_block_sums(q, k, v, largest_scores(q, k, scale), scale, mass)
        scores = q.double() @ k.double().transpose(1, 2) * scale
        blocks = (scores - scores.amax(dim=2, keepdim=True)).exp().split(K_BLOCK, dim=2)
        values = torch.stack([p @ x for p, x in zip(blocks, v.double().split(K_BLOCK, dim=1), strict=True)])
        masses = torch.stack([p.sum(dim=2) for p in blocks], dim=2)
        errors = relative_error(mass, masses), relative_error(value, values)
        require(max(errors) < (1e-3 if hard else 1e-4), f"{dtype}, head_dim {head_dim}, hard {hard}: {errors}")
        worst[hard] = max(worst.get(hard, 0.0), *errors)
    return f"largest errors {worst[False]:.1e} and, of keys of a large mean, {worst[True]:.1e}"
