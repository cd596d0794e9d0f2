"""A GPU for machines that have none: tensors that say they are on "cuda" and hold their numbers on
the CPU.

`start()` makes this process believe in one. From then on, what a GPU refuses is refused: two
devices in one operation, a generator of another device, `.numpy()` without `.cpu()`, a matrix
product or a resampling of integers. Everything else gives the CPU's numbers, so that whole
notebooks run. Speed, memory and CUDA's own rounding are not seen this way.
"""

import threading

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, aten = torch.device("cuda:0"), torch.ops.aten
MIXING = (
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
)  # with the CPU's indices too
# What CUDA computes of floating-point numbers only.
FLOATS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "dot",
    "convolution",
    "grid_sampler_2d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
)


class _State(threading.local):
    def __init__(self):
        self.moving, self.making = (
            [],
            [],
        )  # where the next copy goes; the `device=` of the calls that are running


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `.held` is where its numbers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="cpu",
        )  # autograd would ask the driver about a stream of "cuda"

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"on the pretended GPU: {self.held}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args: tuple, kwargs: dict):
    """Return what an operation gives, on the device where a GPU would put it."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    there = _place(func, args, tensors, ours)
    if (
        ours
        and func._schema.name.removeprefix("aten::") in FLOATS
        and not ours[0].held.is_floating_point()
    ):
        raise RuntimeError(f"{func} is not implemented for {ours[0].held.dtype} on CUDA")
    held_args, held_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if not there or func is aten._local_scalar_dense.default:
        return out
    # A view of a tensor that was not made in inference mode is none of that mode either.
    plain = any(not tensor.is_inference() for tensor in ours)
    with torch.inference_mode(torch.is_inference_mode_enabled() and not plain):
        out = tree_map_only(
            torch.Tensor, lambda one: one if isinstance(one, OnGPU) else OnGPU(one), out
        )
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def _place(func, args: tuple, tensors: list, ours: list) -> bool:
    """Return whether the result is on the GPU; RuntimeError where the devices of the arguments
    differ.
    """
    if func is aten._to_copy.default and _state.moving:
        return _state.moving.pop()
    if func is aten.copy_.default:
        return isinstance(args[0], OnGPU)
    if func.overloadpacket in MIXING and isinstance(args[0], OnGPU):
        return True
    if ours and any(tensor.ndim and not isinstance(tensor, OnGPU) for tensor in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} of "
            f"{[(tuple(t.shape), 'cuda' if isinstance(t, OnGPU) else 'cpu') for t in tensors]}"
        )
    return bool(ours) or bool(_state.making and _state.making[-1])


class _Names(TorchFunctionMode):
    """Answers what is asked by name: `.device`, `.to("cuda")`, `device="cuda"`, `generator=`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, first = (
            dict(kwargs or {}),
            getattr(func, "__name__", ""),
            args[0] if args else None,
        )
        if isinstance(first, OnGPU) and (answer := _answer(func, name, first)) is not None:
            return answer
        if name in ("to", "cuda", "cpu") and isinstance(first, torch.Tensor):
            return _moved(name, first, args[1:], kwargs)
        if isinstance(source := kwargs.get("generator"), Generator):
            there = (
                isinstance(first, OnGPU)
                if isinstance(first, torch.Tensor)
                else _is_gpu(kwargs.get("device"))
            )
            if there != _is_gpu(source.device):
                raise RuntimeError(
                    f"{name}: expected a generator of the other device, found {source.device}"
                )
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        _state.making.append(_is_gpu(kwargs["device"]))
        try:
            return func(*args, **kwargs | {"device": torch.device("cpu")})
        finally:
            _state.making.pop()


def _answer(func, name: str, tensor: OnGPU):
    """Return what a tensor of the GPU says of itself, None where it has nothing of its own to
    say.
    """
    known = {torch.Tensor.device: CUDA, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
    if name == "__get__":
        return known.get(getattr(func, "__self__", None))
    if name == "numpy":
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return tensor.held.tolist() if name == "tolist" else None


def _moved(name: str, tensor, rest: tuple, kwargs: dict):
    """Return `.to(…)`, `.cuda()` or `.cpu()` of a tensor; type and memory layout as asked."""
    where, dtype = kwargs.get("device") if name == "to" else name, kwargs.get("dtype")
    for asked in rest:
        if isinstance(asked, (str, torch.device)):
            where = asked
        elif isinstance(asked, torch.dtype):
            dtype = asked
        elif isinstance(asked, torch.Tensor):
            where, dtype = CUDA if isinstance(asked, OnGPU) else "cpu", asked.dtype
    layout = {"memory_format": kwargs["memory_format"]} if kwargs.get("memory_format") else {}
    dtype, here = dtype or tensor.dtype, isinstance(tensor, OnGPU)
    if where is None or _is_gpu(where) == here:
        return torch.Tensor.to(tensor, dtype, **layout)
    _state.moving.append(not here)
    return aten._to_copy(tensor, dtype=dtype, **layout)


def _is_gpu(device) -> bool:
    return str(device).startswith("cuda")


class Generator(torch.Generator):
    """A generator of either device; both draw the CPU's numbers."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    @property
    def device(self):
        return self.where


def start() -> None:
    """Make this process believe in a GPU, until it ends; threads that it starts believe in it
    too.
    """
    torch.__future__.set_swap_module_params_on_conversion(True)
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "get_device_name": "a pretended GPU",
        "is_current_stream_capturing": False,
        "mem_get_info": (2**30, 2**30),
        "max_memory_allocated": 2**20,
    }
    nothing = dict.fromkeys(
        (
            "_lazy_init",
            "synchronize",
            "empty_cache",
            "reset_peak_memory_stats",
            "manual_seed",
            "manual_seed_all",
        )
    )
    for name, value in (answers | nothing).items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.Generator = Generator
    autocast, run = torch.autocast.__init__, threading.Thread.run
    torch.autocast.__init__ = lambda self, device, *args, **kwargs: autocast(
        self, "cpu", *args, **kwargs
    )

    def believing(thread):
        with _Names(), _Operations():
            run(thread)

    threading.Thread.run = believing
    _Names().__enter__()
    _Operations().__enter__()


_state = _State()
