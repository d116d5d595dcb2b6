"""Fixtures for all tests: few threads, fixed seeds, and poisoned memory, so that an unwritten output cannot pass."""

import os

# Tests share few cores with each other: threads that spin while they wait would hold the core that the others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.pop("PYTEST_XDIST_WORKER", None):  # which a pytest that a test starts is not
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core; tests of what threads do ask for theirs

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before any kernel is defined: the Triton kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
from torch.utils._device import _device_constructors  # noqa: E402


def hurry_interpreter() -> None:
    """Triton's interpreter in a fifth of its time. It replaces all functions of its language anew whenever one function of a
    kernel calls another, which it does once a launch here; it makes the types of its tensors anew at each step, where those of
    one name are one; it looks at each sum and product for overflows, of which it tells nobody; it looks for the common type
    of operands of one type; and for the common shape of two, and what becomes of a number beside a tensor, each time."""
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    replace, launch, replaced = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def first(fn):
        languages = frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if languages not in replaced:
            replaced.add(languages)
            return replace(fn)

    def launched(self, *arguments, **options):
        replaced.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = first, launched

    tensor, block, numpy_type = tl.core.tensor, tl.core.block_type, interpreter._get_np_dtype
    construct, with_element, to_ir = tensor.__init__, block.with_element_ty, block.to_ir
    tensors, blocks, numpy_types = {}, {}, {}

    def constructed(self, handle, type):
        if type.name not in tensors:
            construct(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    def with_element_ty(self, scalar):
        key = self.name, scalar.name
        if key not in blocks:
            blocks[key] = with_element(self, scalar)
        return blocks[key]

    def numpy_type_of(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    semantic, plain = TritonSemantic, {"fp32", "int32", "uint32", "int64", "uint64", "int1"}
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    constexpr, unwrap = tl.core.constexpr, tl.core._unwrap_if_constexpr
    shapes, numbers = {}, {}

    def checked(self, lhs, rhs, *arguments, **options):
        left, right = type(lhs) is tensor, type(rhs) is tensor
        if left and right and lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in plain:
            return (lhs, rhs) if lhs.type.name == rhs.type.name else broadcasted(self, lhs, rhs)
        x, number = (lhs, rhs) if left else (rhs, lhs)
        if left == right or type(number) not in (bool, int, float) or x.dtype.name not in plain:
            return check(self, lhs, rhs, *arguments, **options)
        key = left, x.type.name, type(number), repr(number), arguments, *options.items()
        if key not in numbers:
            made = check(self, lhs, rhs, *arguments, **options)
            numbers[key] = made[left] if made[right] is x else None
            return made
        if numbers[key] is None:  # the tensor's type changes too
            return check(self, lhs, rhs, *arguments, **options)
        return (x, numbers[key]) if left else (numbers[key], x)

    def broadcasted(self, lhs, rhs):
        key = lhs.type.name, rhs.type.name
        if key not in shapes:
            made = broadcast(self, lhs, rhs)
            changes = zip((lhs, rhs), made, strict=True)
            shapes[key] = [None if x.type.name == y.type.name else y.type for x, y in changes]
            return made
        return tuple(x if to is None else spread(x, to) for x, to in zip((lhs, rhs), shapes[key], strict=True))

    def spread(x, to):
        builder, handle = interpreter.interpreter_builder, x.handle
        made = builder.create_broadcast(handle, to.shape) if x.type.is_block() else builder.create_splat(to, handle)
        return tensor(made, to)

    def unwrapped(x):
        kind = type(x)
        return x if kind in (tensor, int, float, bool) else x.value if kind is constexpr else unwrap(x)

    tl.core._unwrap_if_constexpr = unwrapped
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = checked, broadcasted
    semantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None

    tensor.__init__, block.with_element_ty, interpreter._get_np_dtype = constructed, with_element_ty, numpy_type_of
    block.to_ir = lambda self, builder: self if builder is interpreter.interpreter_builder else to_ir(self, builder)


if os.environ.get("TRITON_INTERPRET") == "1":
    hurry_interpreter()

# A process that begins one of these last, each of a minute or more, would leave the others idle.
LONG = {f"test_{name}.py" for name in ("resources", "cuda_compiled", "cuda", "kernels", "run", "gpu_script")}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


POISON_BYTE = 0xA5  # for integer outputs: codes are uint8, where NaN has no meaning


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty and Tensor.new_empty give NaN in floats and a byte pattern elsewhere, never what happens to be zero."""
    # `with torch.device("meta")` goes by what it remembers: the plain torch.empty, whatever a test before left there
    _device_constructors.cache_clear()
    _device_constructors()
    plain_empty, plain_new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) is not torch.Tensor or not x.numel():
            return x
        if x.dtype.is_floating_point and x.element_size() > 1:
            return x.fill_(float("nan"))
        return (
            x.view(torch.uint8).fill_(POISON_BYTE).view(x.dtype)
            if x.element_size() == 1 and x.dtype != torch.bool
            else x
        )

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(plain_new_empty(self, *a, **k)))


@pytest.fixture(params=("native", "reference"))
def backend(request):
    """The test runs once on each of the two, with nothing else allowed."""
    import nvfp4_kernels as nk
    from nvfp4_kernels.ops._native import native

    if request.param == "native" and native is None:
        pytest.skip("no native module")
    with nk.backend(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Threads only cost at small sizes, and a great deal where other processes want the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
