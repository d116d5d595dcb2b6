"""The torch.library namespace `nvfp4::` in which every op is registered, so that torch.compile and export see whole ops."""

import torch

LIBRARY = torch.library.Library("nvfp4", "DEF")


def unobserved(x: torch.Tensor) -> bool:
    """Whether an op on x may be run without torch's dispatcher, whose 10 to 15 us a decoded token pays a dozen times.

    True where nobody would see the call: no gradients, compiler, profiler, mode, autocast, subclass or functorch transform, and
    x has values.
    """
    return not torch.is_grad_enabled() and unwrapped(x) and not torch.autograd._profiler_enabled()


def unwrapped(x: torch.Tensor) -> bool:
    """The same, but that gradients may be wanted and a profiler may run."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_tracing()
        or x.is_meta
        or not ordinary(x)
        or torch._C._len_torch_dispatch_stack()
        or transformed()
    )


def transformed() -> bool:
    """Whether one of torch.func's transforms is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def ordinary(x: torch.Tensor) -> bool:
    """Whether x is of no subclass."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def register(schema: str, run, fake) -> None:
    """Define `nvfp4::<schema>` with its eager implementation (all devices) and its fake (shapes alone).

    The caller's autocast does not reach inside: torch's products may be what makes an op's sums. Lower overhead than
    torch.library.custom_op, which matters to small layers; the ops take tensors, numbers and strings.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def in_own_types(*given):
        with torch._C._DisableAutocast():
            return run(*given)

    LIBRARY.impl(name, in_own_types, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4::{name}", fake, lib=LIBRARY)


def register_differentiable(name: str, arguments: str, outputs: int, run, fake, backward, gradients: int) -> None:
    """Define `nvfp4::<name>` and `nvfp4::<name>_backward`, the derivative of the one being the other.

    arguments: the schema's arguments, tensors first. Of these the first `gradients` are differentiable, and all tensors
        are kept for backward, nothing else: what backward needs beside them it forms again.
    backward: takes the gradients of the outputs (None where unused), then the arguments; returns a gradient for each
        differentiable argument, None where that is None or its gradient is.
    The derivative has none itself: whoever asks for it gets a RuntimeError, where torch would go on without that part.
    """
    tensors = sum(part.strip().startswith("Tensor") for part in arguments.split(","))
    grads = ", ".join(f"Tensor? grad{i}" for i in range(outputs))
    returns = "Tensor" if gradients == 1 else f"({', '.join(['Tensor'] * gradients)})"

    def run_backward(*given):
        nothing = given[outputs].new_empty(0)
        made = tuple(nothing.clone() if g is None else g.contiguous() for g in backward(*given))
        return made if gradients > 1 else made[0]

    def fake_backward(*given):
        inputs = given[outputs : outputs + gradients]
        made = tuple(
            inputs[0].new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in inputs
        )
        return made if gradients > 1 else made[0]

    results = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    register(f"{name}({arguments}) -> {results}", run, fake)
    register(f"{name}_backward({grads}, {arguments}) -> {returns}", run_backward, fake_backward)
    call = getattr(torch.ops.nvfp4, f"{name}_backward")

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def derivative(ctx, *dys):
        if all(dy is None for dy in dys):
            return (None,) * (tensors + len(ctx.options))
        inputs = ctx.saved_tensors
        made = call(*dys, *inputs, *ctx.options)
        made = [g if x is not None else None for g, x in zip(made if gradients > 1 else (made,), inputs, strict=False)]
        return *made, *[None] * (tensors - gradients + len(ctx.options))

    def no_second(ctx, *grads):
        raise RuntimeError(
            f"nk.{name}: got a second derivative (create_graph=True); allowed: first derivatives, its kernels have no others"
        )

    torch.library.register_autograd(f"nvfp4::{name}", derivative, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"nvfp4::{name}_backward", no_second, lib=LIBRARY)
