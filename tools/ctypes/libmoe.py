# SPDX-License-Identifier: Apache-2.0
"""libmoe from Python with ctypes and nothing else.

The structs and functions are those of moe.h under their own names; on top of them are a few classes that own handles
and turn a status into an exception. Pointers are integers, as torch's data_ptr() and numpy's ctypes.data give them:

    import libmoe
    moe = libmoe.load("build/runtime/libmoe.so")
    ctx = libmoe.Context(moe, device=libmoe.CUDA)
    layer = ctx.load_layer("Mixtral-8x7B-v0.1", 0)
    workspace = torch.empty(layer.workspace_size(len(x)), dtype=torch.uint8, device="cuda")
    layer.forward(x.data_ptr(), y.data_ptr(), len(x), libmoe.BF16, workspace.data_ptr(), workspace.numel(),
                  stream=torch.cuda.current_stream().cuda_stream)

torch_example.py is a whole program.
"""
import ctypes
from ctypes import POINTER, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p

BF16, F16, F32, I32, I64 = 1, 2, 3, 4, 5  # moe_dtype
AUTO, CPU, CUDA = 0, 1, 2  # moe_device
ROW_MAJOR, PACKED = 1, 2  # moe_layout
WORKSPACE_ALIGNMENT = 256

LogFn = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p)
ProgressFn = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint64)


class _Sized(ctypes.Structure):
    """A struct that begins with its size; made as its *_init function in moe.h makes it."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.size = ctypes.sizeof(self)


class moe_context_options(_Sized):
    _fields_ = [("size", c_size_t), ("device", c_int), ("device_index", c_int32), ("threads", c_int32), ("log", LogFn),
                ("log_user", c_void_p), ("tuned", c_char_p)]


class moe_device_info(_Sized):
    _fields_ = [("size", c_size_t), ("device", c_int), ("device_index", c_int32), ("name", c_char * 256),
                ("cores", c_int32), ("compute_capability", c_int32), ("memory_bytes", c_uint64),
                ("l2_bytes", c_uint64), ("features", c_char * 128)]


class moe_layer_desc(_Sized):
    _fields_ = [("size", c_size_t), ("hidden_size", c_int64), ("intermediate_size", c_int64),
                ("num_experts", c_int32), ("top_k", c_int32), ("dtype", c_int), ("gate_dtype", c_int),
                ("scoring", c_int), ("renormalize", c_int32), ("logits_dtype", c_int), ("topk_weight_dtype", c_int),
                ("activation", c_int)]


class moe_checkpoint_info(_Sized):
    _fields_ = [("size", c_size_t), ("model_type", c_char * 64), ("num_layers", c_int32),
                ("first_moe_layer", c_int32), ("num_files", c_int32), ("file_bytes", c_uint64)]


class moe_load_options(_Sized):
    _fields_ = [("size", c_size_t), ("progress", ProgressFn), ("progress_user", c_void_p), ("layout", c_int)]


class moe_layer_weights(_Sized):
    _fields_ = [("size", c_size_t), ("gate", c_void_p), ("w13", c_void_p), ("w2", c_void_p), ("layout", c_int)]


class moe_batch(_Sized):
    _fields_ = [("size", c_size_t), ("tokens", c_int64), ("dtype", c_int), ("hidden_states", c_void_p),
                ("output", c_void_p), ("topk_ids", c_void_p), ("topk_weights", c_void_p), ("ids_dtype", c_int),
                ("top_k", c_int32), ("router_logits_out", c_void_p), ("topk_ids_out", c_void_p),
                ("topk_weights_out", c_void_p), ("path", c_int), ("max_sms", c_int32), ("config", c_int32)]


class moe_limits(_Sized):
    _fields_ = [("size", c_size_t), ("max_tokens", c_int64), ("top_k", c_int32), ("path", c_int)]


class moe_record(_Sized):
    _fields_ = [("size", c_size_t), ("layer", c_int32), ("phase", c_char_p), ("tokens", c_int64),
                ("hidden_size", c_int64), ("num_experts", c_int32), ("top_k", c_int32), ("dtype", c_int),
                ("time", c_double), ("hidden_states", c_void_p), ("topk_ids", c_void_p), ("topk_weights", c_void_p),
                ("router_logits", c_void_p), ("output", c_void_p)]


# Function -> result and arguments. A handle is a void *, a handle's address a void **.
_HANDLE = POINTER(c_void_p)
_RUN = [c_void_p, POINTER(moe_batch), c_void_p, c_size_t, c_void_p]
PROTOTYPES = {
    "moe_version": (c_int, []),
    "moe_status_string": (c_char_p, [c_int]),
    "moe_dtype_size": (c_size_t, [c_int]),
    "moe_dtype_name": (c_char_p, [c_int]),
    "moe_path_name": (c_char_p, [c_int]),
    "moe_path_from_name": (c_int, [c_char_p, POINTER(c_int)]),
    "moe_path_config_name": (c_char_p, [c_int, c_int32]),
    "moe_context_create": (c_int, [POINTER(moe_context_options), _HANDLE]),
    "moe_context_destroy": (None, [c_void_p]),
    "moe_last_error": (None, [c_void_p, c_char_p, c_size_t]),
    "moe_context_device": (c_int, [c_void_p, POINTER(moe_device_info)]),
    "moe_buffer_alloc": (c_int, [c_void_p, c_size_t, POINTER(c_void_p)]),
    "moe_buffer_free": (None, [c_void_p, c_void_p]),
    "moe_copy_in": (c_int, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p]),
    "moe_copy_out": (c_int, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p]),
    "moe_synchronize": (c_int, [c_void_p, c_void_p]),
    "moe_checkpoint_open": (c_int, [c_void_p, c_char_p, _HANDLE]),
    "moe_checkpoint_close": (None, [c_void_p]),
    "moe_checkpoint_describe": (c_int, [c_void_p, POINTER(moe_checkpoint_info)]),
    "moe_checkpoint_layer": (c_int, [c_void_p, c_int32, POINTER(moe_layer_desc)]),
    "moe_layer_load": (c_int, [c_void_p, c_int32, POINTER(moe_load_options), _HANDLE]),
    "moe_layer_create": (c_int, [c_void_p, POINTER(moe_layer_desc), POINTER(moe_layer_weights), _HANDLE]),
    "moe_layer_pack": (c_int, [c_void_p, _HANDLE]),
    "moe_layer_destroy": (None, [c_void_p]),
    "moe_layer_describe": (c_int, [c_void_p, POINTER(moe_layer_desc)]),
    "moe_layer_weights_get": (c_int, [c_void_p, POINTER(moe_layer_weights)]),
    "moe_workspace_size": (c_int, [c_void_p, POINTER(moe_limits), POINTER(c_size_t)]),
    "moe_forward": (c_int, _RUN),
    "moe_route": (c_int, _RUN),
    "moe_experts_forward": (c_int, _RUN),
    "moe_path_choose": (c_int, [c_void_p, c_int, c_int64, POINTER(c_int), c_char_p, c_size_t]),
    "moe_path_available": (c_int, [c_void_p, c_int, POINTER(moe_layer_desc), c_char_p, c_size_t]),
    "moe_capture_open": (c_int, [c_void_p, c_char_p, _HANDLE]),
    "moe_capture_append": (c_int, [c_void_p, POINTER(moe_record)]),
    "moe_capture_close": (None, [c_void_p]),
    "moe_session_open": (c_int, [c_void_p, c_char_p, _HANDLE]),
    "moe_session_close": (None, [c_void_p]),
    "moe_session_count": (c_int64, [c_void_p]),
    "moe_session_read": (c_int, [c_void_p, c_int64, POINTER(moe_record)]),
}


def load(path="libmoe.so.0"):
    """The shared library with the prototypes set: every function of moe.h can be called as in C."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Error(Exception):
    """A call failed: `status` is its moe_status, the text says what and where."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def mixtral_desc(hidden_size, intermediate_size, num_experts, top_k, dtype):
    """A layer with Mixtral's rule, as moe_layer_desc_init makes it."""
    return moe_layer_desc(hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts,
                          top_k=top_k, dtype=dtype, gate_dtype=dtype, logits_dtype=dtype, scoring=1, renormalize=1,
                          topk_weight_dtype=F32, activation=1)


class Context:
    """A device. Layers made from it must be closed first."""

    def __init__(self, library, device=AUTO, device_index=0, threads=0):
        self.library = library
        self.handle = None
        handle = c_void_p()
        options = moe_context_options(device=device, device_index=device_index, threads=threads)
        self.check(library.moe_context_create(ctypes.byref(options), ctypes.byref(handle)))
        self.handle = handle

    def check(self, status):
        if status != 0:
            text = ctypes.create_string_buffer(1024)
            self.library.moe_last_error(self.handle, text, len(text))
            raise Error(status, (text.value or self.library.moe_status_string(status)).decode())

    def device(self):
        info = moe_device_info()
        self.check(self.library.moe_context_device(self.handle, ctypes.byref(info)))
        return info

    def load_layer(self, directory, index, layout=AUTO):
        """Layer `index` of a checkpoint directory; layout: AUTO, ROW_MAJOR or PACKED."""
        checkpoint, layer = c_void_p(), c_void_p()
        options = moe_load_options(layout=layout)
        self.check(self.library.moe_checkpoint_open(self.handle, str(directory).encode(), ctypes.byref(checkpoint)))
        try:
            self.check(self.library.moe_layer_load(checkpoint, index, ctypes.byref(options), ctypes.byref(layer)))
        finally:
            self.library.moe_checkpoint_close(checkpoint)
        return Layer(self, layer)

    def create_layer(self, desc, gate, w13, w2):
        """A layer on the caller's weights, which must stay as they are until it is closed; desc: a moe_layer_desc."""
        layer = c_void_p()
        weights = moe_layer_weights(gate=gate, w13=w13, w2=w2)
        self.check(self.library.moe_layer_create(self.handle, ctypes.byref(desc), ctypes.byref(weights),
                                                 ctypes.byref(layer)))
        return Layer(self, layer)

    def synchronize(self, stream=None):
        self.check(self.library.moe_synchronize(self.handle, stream))

    def close(self):
        self.library.moe_context_destroy(self.handle)
        self.handle = None


class Layer:
    def __init__(self, context, handle):
        self.context, self.library, self.handle = context, context.library, handle

    def describe(self):
        desc = moe_layer_desc()
        self.context.check(self.library.moe_layer_describe(self.handle, ctypes.byref(desc)))
        return desc

    def pack(self):
        """A packed copy."""
        packed = c_void_p()
        self.context.check(self.library.moe_layer_pack(self.handle, ctypes.byref(packed)))
        return Layer(self.context, packed)

    def path(self, name):
        """The number of the path `name`."""
        path = c_int()
        self.context.check(self.library.moe_path_from_name(name.encode(), ctypes.byref(path)))
        return path.value

    def workspace_size(self, max_tokens, path="auto"):
        """Bytes of workspace, aligned to WORKSPACE_ALIGNMENT, that serve every batch of up to max_tokens."""
        limits, size = moe_limits(max_tokens=max_tokens, path=self.path(path)), c_size_t()
        self.context.check(self.library.moe_workspace_size(self.handle, ctypes.byref(limits), ctypes.byref(size)))
        return size.value

    def forward(self, hidden_states, output, tokens, dtype, workspace, workspace_bytes, stream=None, path="auto",
                **outputs):
        """Enqueues the layer. `outputs`: router_logits_out, topk_ids_out, topk_weights_out."""
        batch = moe_batch(hidden_states=hidden_states, output=output, tokens=tokens, dtype=dtype,
                          path=self.path(path), **outputs)
        self.context.check(self.library.moe_forward(self.handle, ctypes.byref(batch), workspace, workspace_bytes,
                                                    stream))

    def experts_forward(self, hidden_states, output, tokens, dtype, topk_ids, topk_weights, workspace,
                        workspace_bytes, ids_dtype=I32, top_k=0, stream=None, path="auto"):
        """Enqueues the experts with the caller's routing."""
        batch = moe_batch(hidden_states=hidden_states, output=output, tokens=tokens, dtype=dtype, topk_ids=topk_ids,
                          topk_weights=topk_weights, ids_dtype=ids_dtype, top_k=top_k, path=self.path(path))
        self.context.check(self.library.moe_experts_forward(self.handle, ctypes.byref(batch), workspace,
                                                            workspace_bytes, stream))

    def close(self):
        self.library.moe_layer_destroy(self.handle)
        self.handle = None
