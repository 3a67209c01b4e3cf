"""The queries and keys of an attention module, while it computes what it always does with its own implementation.

An attention module looks its function up by a name in its configuration. In a pass that wants its queries the call runs
on a shallow copy with another name there; the module itself, which other threads may be running, stays as it is.
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
    """A configuration under another attention implementation."""

    def __init__(self, config):
        self.__dict__.update(_config=config, _attn_implementation=NAME)

    def __getattr__(self, name):
        return getattr(self._config, name)


class QueryCapture:
    """The `forward` of an attention module for as long as passes want its queries; other passes are left alone."""

    def __init__(self, module):
        self.module, self.users = module, 0

    def __call__(self, *args, **kwargs):
        layer = getattr(ACTIVE.get(), "captures", {}).get(self.module)
        if layer is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        copy = object.__new__(type(self.module))
        copy.__dict__.update(vars(self.module), config=ConfigProxy(self.module.config))
        copy.__dict__.pop("forward", None)  # another thread may have taken it away by now
        copy.__dict__["_pruneops_captured"] = self.module, layer
        return type(copy).forward(copy, *args, **kwargs)


def attention_with_capture(copy, query, key, *args, **kwargs):
    """The module's own attention function, after a look at the queries and keys."""
    module, layer = copy._pruneops_captured
    ACTIVE.get().captured[layer] = query.detach(), key.detach()
    attend = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation, eager_attention(type(module)))
    return attend(module, query, key, *args, **kwargs)


def eager_attention(cls):
    """What a modeling file calls where no function is registered; a class may derive from that file's (FSDP2's do)."""
    own = (getattr(inspect.getmodule(base), "eager_attention_forward", None) for base in cls.__mro__)
    return next(filter(None, own), None)


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
