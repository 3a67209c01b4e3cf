"""Capture of the queries and keys of an attention module, which still runs its own attention implementation.

An attention module looks up its attention function by a name in its configuration. In a pass that captures queries the
call runs on a shallow copy of the module whose configuration has another name; the module itself, which other threads
may be running, is not changed.
"""

import inspect
import threading

from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import ACTIVE
from .models import UnsupportedError

NAME = "pruneops_query_capture"
_lock = threading.Lock()


class ConfigProxy:
    """A configuration with another attention implementation."""

    def __init__(self, config):
        self.__dict__.update(_config=config, _attn_implementation=NAME)

    def __getattr__(self, name):
        return getattr(self._config, name)


class QueryCapture:
    """The `forward` of an attention module while some pass captures its queries; in other passes it changes nothing."""

    def __init__(self, module):
        self.module, self.users = module, 0

    def __call__(self, *args, **kwargs):
        layer = getattr(ACTIVE.get(), "captures", {}).get(self.module)
        if layer is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        copy = object.__new__(type(self.module))
        copy.__dict__.update(vars(self.module), config=ConfigProxy(self.module.config))
        copy.__dict__.pop("forward", None)  # another thread may have removed it
        copy.__dict__["_pruneops_captured"] = self.module, layer
        return type(copy).forward(copy, *args, **kwargs)


def attention_with_capture(copy, query, key, *args, **kwargs):
    """Record queries and keys, then call the module's own attention function."""
    module, layer = copy._pruneops_captured
    ACTIVE.get().captured[layer] = query.detach(), key.detach()
    attend = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation, eager_attention(type(module)))
    return attend(module, query, key, *args, **kwargs)


def eager_attention(cls):
    """The eager attention function of the modeling file that defines a class or one of its bases (FSDP2 derives)."""
    functions = (getattr(inspect.getmodule(base), "eager_attention_forward", None) for base in cls.__mro__)
    return next(filter(None, functions), None)


def check_capturable(module):
    if isinstance(vars(module).get("forward"), (QueryCapture, type(None))):
        return
    raise UnsupportedError(
        f"pruneops: the forward of a {type(module).__name__} was replaced, so its queries are out of reach; take that "
        "away first, or use a method that does not read queries"
    )


def start_capture(module):
    AttentionInterface.register(NAME, attention_with_capture)
    with _lock:
        capture = vars(module).setdefault("forward", QueryCapture(module))
        capture.users += 1


def stop_capture(module):
    with _lock:
        capture = vars(module)["forward"]
        capture.users -= 1
        if not capture.users:
            del module.forward
