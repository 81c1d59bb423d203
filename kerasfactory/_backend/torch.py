"""PyTorch."""

import functools
import weakref

import keras
import torch
from keras import ops

from kerasfactory._backend._shared import (
    Operation,
    after_fork,
    missing,
    read_arithmetic,
    read_einsum,
    read_matmul,
    read_reshape,
    read_sum,
    read_swap,
    read_transpose,
    read_two,
    stateless_predict_step,
)

_of_forked = []  # whether this process was forked from one that imported this file
after_fork(lambda: _of_forked.append(True))

PRIVATE_NAMES = {"torch._C._functorch": ("is_functorch_wrapped_tensor",)}


def as_numpy(tensor):
    """The values of a tensor, not copied where that can be helped."""
    return with_numpy_dtype(tensor.detach().cpu()).numpy()


def as_tensor(array):
    """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
    return ops.convert_to_tensor(torch.from_numpy(array))


def check_process():
    """Has a process that was forked compute in one thread: where there are more, it waits for those of its parent."""
    if _of_forked:
        _of_forked.clear()
        torch.set_num_threads(1)


def compiled(step, run_eagerly, jit_compile, runs_once=False):
    """`step(state, data)`, without gradients. Not compiled: `torch.compile` would change nothing but the time."""
    return torch.no_grad()(step)


def concrete(tensor):
    """The tensor, detached, if it holds values, `None` if it only carries a shape."""
    return None if tensor.device.type == "meta" else tensor.detach()


def evaluation(model, layers):
    """What puts the model and its layers into evaluation mode, as `predict` does, as pairs of a module and methods.

    They are to stand in front of the module's own for one thread, where others may be training. A mode that only
    Keras' own layers have, and do not look at, is left. That of other layers of Keras is set.
    """
    reached = list(model.modules())
    for layer in reached:
        is_own = type(layer).__module__.startswith(("keras.src.", "kerasfactory."))
        if isinstance(layer, keras.layers.Layer) and layer.training and not is_own:
            layer.training = False  # they may look at it in a `call` that sets attributes
    wrapped = [layer.module for layer in layers if isinstance(layer, keras.layers.TorchModuleWrapper)]
    modes = {module: module.training for outer in wrapped for module in outer.modules()}
    modes |= {module: False for module in reached if module in modes}

    def train(module, mode=True):
        modes.update(dict.fromkeys(module.modules(), mode))
        return module

    for module in list(modes):
        methods = {"train": functools.partial(train, module), "forward": _in_mode_of_thread(module, modes)}
        yield module, methods


def _in_mode_of_thread(module, modes):
    """`module.forward`, with what `modes` says in place of `module.training`."""
    forward = module.forward
    if getattr(forward, "__self__", None) is not module or isinstance(module, torch.jit.ScriptModule):
        return forward

    def of_twin(*args, **kwargs):
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__, training=modes[module])
        return forward.__func__(twin, *args, **kwargs)

    return of_twin


def gradient(function, inputs):
    """The gradient of the first result of `function(inputs)` with respect to the inputs, and the second result.

    The inputs are tensors in dictionaries or lists.
    """
    with torch.enable_grad():
        inputs = keras.tree.map_structure(lambda tensor: tensor.detach().requires_grad_(), inputs)
        value, others = function(inputs)
        flat = keras.tree.flatten(inputs)
        if value.requires_grad:
            flat = torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True)
        else:  # for which PyTorch raises an error, and the other backends return 0
            flat = [torch.zeros_like(tensor) for tensor in flat]
    return keras.tree.pack_sequence_as(inputs, flat), others


def in_scope(tensor):
    """Whether the traced `tensor` can be used here. PyTorch has no graph, so no tensor without values can be."""
    return False


def is_usable(tensor):
    """Whether the tensor can be used here: it holds values, and is not from within `torch.vmap`."""
    try:
        from torch._C._functorch import is_functorch_wrapped_tensor
    except ImportError:
        raise missing("torch._C._functorch.is_functorch_wrapped_tensor", "Watching the calls of a layer") from None
    return not is_functorch_wrapped_tensor(tensor)


def on_cpu(tensor):
    """Whether the CPU computes with the tensor."""
    return tensor.device.type == "cpu"


def operations():
    """PyTorch's own functions that attention goes through, as a list of `Operation`."""
    functional, tensors = torch.nn.functional, torch.Tensor
    softmaxes = [(functional, "softmax"), (torch, "softmax"), (torch.special, "softmax"), (tensors, "softmax")]
    products = [(torch, "matmul"), (torch, "bmm"), (tensors, "matmul"), (tensors, "bmm")]
    return [
        *(Operation("softmax", place, name, _read_softmax) for place, name in softmaxes),
        *(Operation("contraction", place, name, _read_matmul) for place, name in products),
        Operation("contraction", torch, "einsum", _read_einsum),
        Operation("attention", functional, "scaled_dot_product_attention", _read_attention),
        *read_arithmetic(tensors),
        *(Operation("product", place, "mul", read_two) for place in (torch, tensors)),
        *(Operation("total", place, "sum", _read_sum) for place in (torch, tensors)),
        *(Operation("moved", tensors, name, read_reshape) for name in ("reshape", "view")),
        *(Operation("moved", place, "transpose", read_swap) for place in (torch, tensors)),
        Operation("moved", tensors, "permute", _read_permute),
        # Modules of PyTorch then compute what they else leave to one kernel, layer norms and all.
        Operation("switch", torch.backends.mha, "get_fastpath_enabled", lambda original: (False,)),
    ]


def _read_softmax(original, input, dim=None, *others, axis=None, **options):
    return input, axis if dim is None else dim


def _read_matmul(original, input, other=None, *, mat2=None, **options):
    return read_matmul(original, input, mat2 if other is None else other, **options)


def _read_sum(original, input, dim=None, keepdim=False, **options):
    return read_sum(original, input, dim, keepdim, **options)


def _read_permute(original, input, *dims):
    return read_transpose(original, input, dims[0] if isinstance(dims[0], list | tuple) else dims)


def _read_einsum(original, equation, *operands):
    return read_einsum(original, equation, *(operands[0] if isinstance(operands[0], list | tuple) else operands))


def _read_attention(
    original, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Its axes are (batch, head, position, size), or without heads; Keras' are (batch, position, head, size)."""
    rank = query.dim()
    if rank not in (3, 4):
        return (f"it calls `scaled_dot_product_attention` with tensors of {rank} axes, which must be 3 or 4",)

    def there(tensor):
        return tensor.unsqueeze(2) if rank == 3 else tensor.transpose(1, 2)

    def back(tensor):
        return tensor.squeeze(2) if rank == 3 else tensor.transpose(1, 2)

    def as_keras(query, key, value, bias=None, mask=None, scale=None, is_causal=False, flash_attention=None):
        allowed = bias if mask is None else mask
        allowed = allowed.squeeze(1) if rank == 3 and allowed is not None and allowed.dim() == 4 else allowed
        heads = (back(tensor) for tensor in (query, key, value))
        return there(original(*heads, allowed, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa))

    given = {"query": there(query), "key": there(key), "value": there(value), "scale": scale, "is_causal": is_causal}
    if attn_mask is not None:
        with_heads = attn_mask.unsqueeze(1) if rank == 3 and attn_mask.dim() == 3 else attn_mask
        given["mask" if attn_mask.dtype == torch.bool else "bias"] = with_heads
    return as_keras, given, there, back


def outside_traces():
    """A context in which PyTorch records no gradients."""
    return torch.no_grad()


def padded_size(samples, full):
    """How many samples to run a compiled function with: nothing is compiled."""
    return samples


def predict_step(model, state, data):
    """What `model.predict` does with a batch, on the values in `state` instead of the variables.

    Returns the outputs and the state after them.
    """
    return stateless_predict_step(model, state, data)


def value_of(variable):
    """The value of a variable that has one."""
    return variable.value


def weak_reference(tensor, owner):
    """A weak reference to the traced `tensor`. The owner's name is not needed."""
    return weakref.ref(tensor)


def with_numpy_dtype(tensor):
    """The tensor, in a dtype that NumPy knows: not bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
