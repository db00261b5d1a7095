"""What only a GPU can show of the CUDA layer: streams, graphs, determinism, races, memory. `make gpu-check` runs it.

    python tests/cuda/cuda_checks.py [--device cuda|cpu] [--quick] [NAME ...]

Writes one line of JSON before and one after each check, so that its reader knows at which one a process died.
Results: "passed", "failed", or "not run" with the reason. With ``--device cpu`` (to try out the checks themselves) the
checks that are about GPUs do not run. pytest runs the same checks: test_cuda_checks.py. Those of the kernels that do
all steps at once are in cuda_persistent_checks.py.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from cuda_problems import CASES, DTYPES, Problem, assert_same_bits, sized, tf32
from cuda_runs import (
    CHECKS,
    NotRun,
    Run,
    assert_ours,
    check,
    gpu_check,
    kernel,
    kernels_for,
    on_two_streams,
    perform,
    repeated,
    replayed,
)
from judge import relative_error

import lstm_ext

# ---- values


@check
def agrees_with_float64_on_the_cpu(run: Run) -> dict[str, Any]:
    """Sizes around the edges of a warp, of a block and of a grid. Bounds are rough; the suite has the exact ones."""
    bound = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
    cases = [sized(3, 3, 5, h) for h in (1, 2, 31, 32, 33, 64, 127, 128, 129, 257)]
    cases += [sized(3, b, 5, 34) for b in (1, 2, 7, 8, 9, 65)]
    cases += [sized(2, 9, i, 17) for i in (1, 2, 33, 300)]
    cases += [sized(t, 2, 3, 5) for t in (1, 2, 3, 65, 300)]
    cases += [sized(2, 3, 4, h, proj_size=p) for h, p in ((2, 1), (40, 33), (130, 129))]
    cases += [
        *CASES,
        sized(70, 33, 12, 40, packed=True),
        sized(140, 70, 3, 5, packed=True, num_layers=2, bidirectional=True),
    ]
    worst: dict[str, float] = {}
    with tf32(rnn=False):
        for dtype in DTYPES:
            for case in cases if not run.quick else cases[::6]:
                problem = Problem(case, dtype, run.device)
                expected = problem.on("cpu", torch.float64).training()
                results = problem.training()
                errors = [relative_error(a, b) for a, b in zip(results, expected, strict=True)]
                inference = problem.inference()
                errors += [relative_error(a, b) for a, b in zip(inference, expected, strict=False)]
                assert max(errors) < bound[dtype], f"{case}, {dtype}: errors {[f'{e:.1e}' for e in errors]}"
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), *errors)
    return {"worst_errors": worst}


@check
def gradcheck(run: Run) -> None:
    for case in (
        sized(3, 2, 2, 4),
        sized(2, 2, 2, 3, bidirectional=True, proj_size=2, packed=True),
    ):
        problem = Problem(case, torch.float64, run.device)
        torch.autograd.gradcheck(
            lambda *_, p=problem: tuple(p.forward()), problem.leaves, fast_mode=run.quick
        )


@check
def gradgradcheck(run: Run) -> None:
    for case in (sized(2, 2, 2, 3), sized(2, 2, 2, 2, bidirectional=True, packed=True)):
        problem = Problem(case, torch.float64, run.device)
        torch.autograd.gradgradcheck(
            lambda *_, p=problem: tuple(p.forward()), problem.leaves, fast_mode=run.quick
        )


@gpu_check
def tf32_follows_the_setting_of_cudnn(run: Run) -> dict[str, Any]:
    """And not that of matrix products. Sizes are large enough for cuBLAS to use the tensor cores."""
    problem = Problem(sized(20, 64, 256, 256), torch.float32, run.device)
    exact = problem.on(run.device, torch.float64).training()
    found = {}
    results = {}
    for rnn in (False, True):
        for matmul in (False, True):
            with tf32(rnn, matmul):
                results[rnn, matmul] = problem.training()
            errors = [relative_error(a, b) for a, b in zip(results[rnn, matmul], exact, strict=True)]
            found[f"rnn {rnn}, matmul {matmul}"] = max(errors)
    assert_same_bits(results[False, True], results[False, False], "TF32 for matrix products alone")
    assert_same_bits(
        results[True, True], results[True, False], "TF32 for RNNs, with and without matrix products"
    )
    assert found["rnn False, matmul False"] < 1e-5, found
    assert 1e-5 < found["rnn True, matmul False"] < 1e-2, found
    return {"largest_errors": found}


# ---- the same bits every time


@check
def determinism(run: Run) -> dict[str, Any]:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        result = repeated(run, 5, CASES, DTYPES)
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN, too
        repeated(run, 5, CASES, DTYPES)
    finally:
        torch.use_deterministic_algorithms(before)
    return result


@check
def race_loop(run: Run) -> dict[str, Any]:
    cases = (
        sized(30, 64, 64, 128),
        sized(20, 200, 33, 250),
        sized(40, 1, 512, 512),
        sized(60, 40, 20, 96, bidirectional=True, packed=True),
    )
    if run.quick:
        cases = cases[:1]
    return repeated(run, 100, cases, (torch.float32, torch.bfloat16))


@check
def several_python_threads(run: Run) -> dict[str, Any]:
    problems = [Problem(s, torch.float32, run.device, seed) for seed in (1, 2) for s in CASES]
    alone = [p.training() for p in problems]
    failures: list[str] = []

    def work(i: int) -> None:
        try:
            for _ in range(run.count(40)):
                assert_same_bits(problems[i].training(), alone[i], f"thread {i}")
        except Exception as caught:
            failures.append(str(caught))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)
    return {"threads": len(threads)}


# ---- streams


@gpu_check
def side_streams(run: Run) -> None:
    """The arguments come late, on a side stream; the results are used on a third, after an event."""
    for case in CASES:
        problem = Problem(case, torch.float32, run.device)
        expected = problem.training()
        numbers = [leaf.detach().clone() for leaf in problem.leaves]
        for _ in range(run.count(20)):
            with torch.no_grad():
                for leaf in problem.leaves:
                    leaf.zero_()
            torch.cuda.synchronize()
            producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
            with torch.cuda.stream(producer):
                torch.cuda._sleep(2_000_000)  # a kernel on another stream would overtake it and read zeros
                with torch.no_grad():
                    for leaf, value in zip(problem.leaves, numbers, strict=True):
                        leaf.copy_(value)
                results = problem.training()
                done = torch.cuda.Event()
                done.record()
            with torch.cuda.stream(consumer):
                consumer.wait_event(done)
                copies = [t.clone() for t in results]
                for t in results:
                    t.record_stream(consumer)
            del results
            torch.cuda.synchronize()
            assert_same_bits(copies, expected, f"{case} on a side stream")


@gpu_check
def backward_on_the_stream_of_forward(run: Run) -> None:
    """Forward on a side stream, backward() called on the current one: autograd goes back to the side stream."""
    problem = Problem(CASES[1], torch.float32, run.device)
    expected = problem.training()
    for _ in range(run.count(20)):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            results = problem.forward()
        torch.cuda.current_stream().wait_stream(stream)
        grads = torch.autograd.grad(results, problem.leaves, problem.grads)
        torch.cuda.synchronize()
        assert_same_bits([*(t.detach() for t in results), *grads], expected, "backward after a side stream")


@gpu_check
def two_streams_at_once(run: Run) -> None:
    problems = [Problem(sized(40, 16, 64, 128), torch.bfloat16, run.device, seed) for seed in (1, 2)]
    on_two_streams(run, problems, "bfloat16")


@gpu_check
def nothing_waits_for_the_gpu(run: Run) -> None:
    """No read of a number back to the host, neither forwards nor backwards."""
    problems = [
        Problem(case, dtype, run.device) for case in CASES for dtype in (torch.float32, torch.float16)
    ]
    for problem in problems:
        problem.training()  # whatever is made on first use
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem in problems:
            problem.inference()
            problem.training()
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- graphs


@gpu_check
def graph_of_inference(run: Run) -> None:
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(case, dtype, run.device)
            replayed(run, problem, problem.inference, f"inference, {case}, {dtype}")


@gpu_check
def graph_of_training(run: Run) -> None:
    for case in CASES:
        for dtype in (torch.float32, torch.float16):
            problem = Problem(case, dtype, run.device)
            replayed(run, problem, problem.training, f"training, {case}, {dtype}")


@gpu_check
def graph_of_step(run: Run) -> None:
    problem = Problem(sized(1, 3, 16, 64, num_layers=2), torch.float32, run.device)

    def step() -> list[Tensor]:
        with torch.no_grad():
            y, states = problem.layer.step(problem.x[0], (problem.h, problem.c))
        return [y, *states]

    replayed(run, problem, step, "step()")


@gpu_check
def make_graphed_callables(run: Run) -> None:
    problem = Problem(CASES[0], torch.float32, run.device)
    layer = copy.deepcopy(problem.layer)
    graphed = torch.cuda.make_graphed_callables(layer, (problem.x.detach().clone().requires_grad_(),))
    for _ in range(run.count(20)):
        x = torch.randn_like(problem.x)
        results = []
        for module in (graphed, problem.layer):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            output, (h_n, c_n) = module(leaf)
            (output.square().sum() + h_n.sum() + c_n.sum()).backward()
            results.append(
                [output.detach().clone(), leaf.grad.clone(), *(p.grad.clone() for p in module.parameters())]
            )
        assert_same_bits(*results, "make_graphed_callables")


# ---- compilers


@check
def torch_compile(run: Run) -> dict[str, Any]:
    if run.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise NotRun("Triton, which torch compiles for GPUs with, is not installed")
    backend = "aot_eager" if run.quick else "inductor"
    problem = Problem(CASES[1], torch.float32, run.device)
    head = torch.nn.Linear(10, 3).to(run.device)

    def model(x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return head(problem.layer(x.sin(), (h, c))[0]).tanh()

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for steps in (6, 4, 5):
        x = problem.x.detach()[:steps].clone().requires_grad_()
        leaves = [x, *problem.leaves[1:], *head.parameters()]
        outputs = [f(x, problem.h, problem.c) for f in (compiled, model)]
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in outputs]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)
    return {"backend": backend}


# ---- sizes and memory


@check
def more_steps_than_a_grid_has_blocks(run: Run) -> dict[str, Any]:
    """T beyond 65,535, with rows that end early: the same as in pieces whose states are carried on."""
    steps, piece = (600, 100) if run.quick else (70_000, 10_000)
    problem = Problem(sized(steps, 2, 3, 8), torch.float64, run.device)
    results = problem.training()
    with torch.no_grad():
        outputs, state = [], (problem.h, problem.c)
        for start in range(0, steps, piece):
            y, state = problem.layer(problem.x[start : start + piece], state)
            outputs.append(y)
    expected = [torch.cat(outputs), *state]
    for a, b in zip(results[:3], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert all(torch.isfinite(t).all() for t in results)
    # The last gradients know nothing of what was long before.
    tail = problem.on(run.device, torch.float64)
    last = steps // 7
    with torch.no_grad():
        _, (h, c) = problem.layer(problem.x[:-last], (problem.h, problem.c))
    output, states = tail.layer(tail.x[-last:], (h, c))
    grads = [problem.grads[0][-last:], *problem.grads[1:]]
    (of_x,) = torch.autograd.grad([output, *states], tail.x, grads)
    torch.testing.assert_close(results[3][-last:], of_x[-last:], rtol=1e-9, atol=1e-11)
    return {"steps": steps}


@check
def more_elements_than_int32_counts(run: Run) -> dict[str, Any]:
    """B T H beyond 2^31, and B beyond what a grid is high: rows do not know of each other, so any few tell."""
    steps, batch, hidden = (3, 70, 40) if run.quick else (16, 1 << 18, 520)
    if run.device.type == "cuda":
        # Output and its gradient, gates, cells; and what one step needs.
        needed = int(1.2 * batch * hidden * (steps * (2 + 2 + 8 + 4) + 6 * 4 * 4))
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            raise NotRun(f"{needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} are free")
    torch.manual_seed(0)
    layer = lstm_ext.LSTM(8, hidden, dtype=torch.bfloat16, device=run.device)
    x = torch.randn(steps, batch, 8, device=run.device).to(torch.bfloat16).requires_grad_()
    some = torch.cat([torch.arange(16), torch.arange(batch - 16, batch)]).to(run.device)
    few = x.detach()[:, some].clone().requires_grad_()
    expected, (_, c_few) = layer(few)
    (grad_of_few,) = torch.autograd.grad(
        [expected, c_few], few, [torch.ones_like(expected), torch.ones_like(c_few)]
    )
    output, (_, c_n) = layer(x)
    grads = torch.autograd.grad(
        [output, c_n], [x, layer.weight_hh_l0], [torch.ones_like(output), torch.ones_like(c_n)]
    )
    # Products of other heights are summed in another order.
    for a, b in ((output[:, some], expected), (c_n[:, some], c_few), (grads[0][:, some], grad_of_few)):
        assert relative_error(a, b) < 0.02, relative_error(a, b)
    assert torch.isfinite(grads[1]).all()
    assert grads[1].any()
    elements = output.numel()
    del output, c_n, grads
    with torch.no_grad():
        output, _ = layer(x)
        assert relative_error(output[:, some], expected) < 0.02
    return {"elements": elements}


@gpu_check
def out_of_memory_is_an_error_and_no_more(run: Run) -> None:
    problem = Problem(CASES[1], torch.float32, run.device)
    expected = problem.training()
    layer = lstm_ext.LSTM(16, 1024, device=run.device)
    x = torch.zeros(1, 1, 16, device=run.device).expand(2048, 256, 16)  # gates alone: 8 GiB
    total = torch.cuda.mem_get_info()[1]
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (used + 2**30) / total))
    try:
        for _ in range(3):
            try:
                layer(x)
            except torch.OutOfMemoryError:
                pass
            else:
                raise AssertionError("a layer that needs 8 GiB ran in one")
            assert_same_bits(problem.training(), expected, "after an error for want of memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert_same_bits(problem.training(), expected, "with memory again")


@gpu_check
def memory_comes_back(run: Run) -> dict[str, Any]:
    problem = Problem(sized(50, 32, 64, 128), torch.float32, run.device)
    problem.training()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        problem.training()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    return {"bytes": before}


# Its checks are in the list behind those above.
import cuda_persistent_checks  # noqa: E402

# ---- run by compute-sanitizer: every kernel once or twice, small


def sanitized(run: Run) -> None:
    assert_ours(run)
    for case in (*CASES, sized(2, 9, 5, 130), sized(70, 3, 2, 5, packed=True)):
        for dtype in DTYPES:
            for name in kernels_for(run, case, dtype):
                with kernel(name):
                    Problem(case, dtype, run.device).training()
    cuda_persistent_checks.sanitized(run)
    run.synchronize()


# ---- as a program


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(CHECKS)}; or sanitized")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--list", action="store_true", help="print the names as JSON, and no more")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    options = parser.parse_args(arguments)
    if options.list:
        print(json.dumps(list(CHECKS)))
        return 0
    run = Run(
        torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"), options.quick
    )
    if options.names == ["sanitized"]:
        torch.zeros(1, device=run.device).add_(1).item()
        print(
            json.dumps("began"), flush=True
        )  # so that a tool that cannot watch it is told from one that reports
        with kernel(
            "stepwise"
        ):  # requested, so that nothing is tried first, which takes ages under such a tool
            sanitized(run)
        print(json.dumps("done"), flush=True)
        return 0
    failed = False
    for name in options.names or CHECKS:
        print(json.dumps({"check": name, "result": "started"}), flush=True)
        result = perform(name, run)
        print(json.dumps(result), flush=True)
        if result["result"] == "failed":
            failed = True
            if run.device.type == "cuda":
                # After an illegal access nothing works any more in this process: that is an error here, and ends it.
                torch.zeros(1, device=run.device).add_(1).item()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
