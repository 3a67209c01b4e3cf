"""`patch` makes a model prune its images; the handle undoes it."""

import collections
import contextlib
import dataclasses
import inspect
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ...methods import Method
from .cache import ACTIVE, Stats, request_of
from .models import MODALITIES, UnsupportedError, find_model
from .passes import Continuation
from .prefill import Prefill, has_images
from .vision import as_merged, encode

MAX_STATS = 16  # requests whose statistics a handle holds
EAGER = "pruneops prunes in eager mode: compile without fullgraph, or use pruneops.prepare"
ENCODING = ContextVar("pruneops_encoding", default=False)
ENTERED: ContextVar[int | None] = ContextVar("pruneops_entered", default=None)  # id of the handle of the last pass
# (handle, method or None) of each enclosing `with` block
SETTINGS: ContextVar[tuple[tuple[Any, Method | None], ...]] = ContextVar("pruneops_settings", default=())


def patch(model: nn.Module, method: Method) -> "Handle":
    """Prune inside a model, in place or as a context manager.

    Parameters
    ----------
    model : PreTrainedModel, or a wrapper around one
        One of `FAMILIES`; PEFT, torch.compile, DataParallel (one device) and accelerate may be around it.
    method : pruneops.methods.Method
        Budgets are per image or video, whatever tiles, rows or frames its tokens come in.

    Returns
    -------
    Handle
        Undoes the patch by ``remove()``, suspends it by ``disabled()``, changes settings by ``override(keep=...)``,
        has statistics in ``stats``. Also a context manager, which removes the patch at its end.

    Raises
    ------
    UnsupportedError
        On an unknown architecture, or a model that is patched already. In forward passes, before anything is computed:
        on caches that cannot be pruned (static, offloaded, quantised, sliding), on flex attention and continuous
        batching and, for methods that prune inside the decoder, on ``use_cache=False`` outside of training.

    Notes
    -----
    Outputs are as long as the inputs, so labels and losses fit: a token that was removed has the output of the last one
    before it that was kept. Gradients flow through the tokens that are kept.

    Examples
    --------
    ::

        with pruneops.patch(model, pruneops.methods.ToDRE(keep=0.1)) as handle:
            output = model.generate(**inputs)
        print(handle.stats[-1])
    """
    real = find_model("pruneops.patch", model)
    if getattr(real, "_pruneops", None) is not None or is_patched(real.base_model):
        raise UnsupportedError("pruneops.patch: this model is patched already; call remove() of its handle first")
    return Handle(real, method)


class Handle:
    """A patched model.

    Attributes
    ----------
    model : PreTrainedModel
        The supported model, without its wrappers.
    method : Method
        May be replaced between requests.
    stats : deque of Stats
        Of the last 16 requests.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """Seconds, for measuring selection: the host's time, unless replaced by a clock that waits for the device."""

    def __init__(self, model: Any, method: Method) -> None:
        self.model, self.method = model, method
        self.stats: collections.deque[Stats] = collections.deque(maxlen=MAX_STATS)
        self.decoder, base, self._warned = model.get_decoder(), model.base_model, False
        names = [f"get_{name}_features" for name in MODALITIES if hasattr(base, f"get_{name}_features")]
        self._overrides: list[Override] = [PatchedForward(base, "forward", self)]
        self._overrides += [PatchedEncoder(base, name, self) for name in names]
        self._check = base.register_forward_hook(self._check_entered, with_kwargs=True)
        model._pruneops = self

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model."""
        for override in self._overrides:
            override.remove()
        self._check.remove()
        if getattr(self.model, "_pruneops", None) is self:
            del self.model._pruneops

    def disabled(self) -> "AbstractContextManager[Handle]":
        """Context manager: requests that begin inside are not pruned.

        It holds for this thread or task, not for threads started inside.
        """
        return self._with(None)

    def override(self, **settings: Any) -> "AbstractContextManager[Handle]":
        """Context manager: requests that begin inside are pruned with other settings of the method.

        It holds for this thread or task. A thread started inside inherits it if it runs in
        ``contextvars.copy_context().run``.

        Parameters
        ----------
        **settings
            Fields of the method, such as ``keep=0.25``.

        Raises
        ------
        ValueError
            On a bad value.
        TypeError
            On an unknown setting.
        """
        return self._with(dataclasses.replace(self.current_method() or self.method, **settings))

    @contextlib.contextmanager
    def _with(self, method):
        token = SETTINGS.set((*SETTINGS.get(), (self, method)))
        try:
            yield self
        finally:
            SETTINGS.reset(token)

    def _check_entered(self, module, args, kwargs, output):
        """After a pass of the base model: warn if another override has replaced our `forward`."""
        entered = ENTERED.get() == id(self)
        ENTERED.set(None)
        if not entered and self.current_method() is not None and has_images(kwargs):
            self.warn_unpruned("the forward of the base model was replaced; call remove() and patch() again")

    def warn_unpruned(self, reason: str) -> None:
        """Warn, once per handle, that a request with images was not pruned."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"pruneops: a request with images was not pruned: {reason}", stacklevel=2)

    def current_method(self) -> Method | None:
        """The method of requests that begin now; None if they are not pruned."""
        return next((method for handle, method in reversed(SETTINGS.get()) if handle is self), self.method)


class Override:
    """An instance attribute that replaces a method of one module and calls the original.

    The original is the class's method, or another instance attribute, `previous`. It holds no closure, so copies and
    pickles of the module have overrides of their own.
    """

    def __init__(self, module, name, handle):
        self.module, self.name, self.handle = module, name, handle
        self.previous = vars(module).get(name)
        self.parameters = list(inspect.signature(self.inner).parameters)
        setattr(module, name, self)

    @property
    def inner(self):
        return self.previous or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self):
        return inspect.signature(self.inner)

    def arguments(self, args, kwargs):
        return dict(zip(self.parameters, args)) | kwargs

    def remove(self):
        """If the attribute was replaced meanwhile, the replacement stays, and this override only forwards calls."""
        self.handle = None
        if vars(self.module).get(self.name) is self:
            delattr(self.module, self.name)
            if self.previous is not None:
                setattr(self.module, self.name, self.previous)


def run_pass(handle, model, forward, inputs):
    """`forward(**inputs)` of the base model, with the images of the request pruned."""
    cache = inputs.get("past_key_values")
    cached_tokens = 0 if cache is None else cache.get_seq_length()
    request, method = request_of(cache) if cached_tokens else None, handle.current_method()
    if has_images(inputs) and (request is not None or method is not None):
        if cached_tokens:
            raise UnsupportedError(
                "pruneops: images on a cache that holds tokens already (chunked prefill, or a new image in a later "
                "turn) cannot be pruned; give all images with the first forward pass, or use handle.disabled()"
            )
        return Prefill(handle, model, method, inputs).run(forward)
    if request is not None and not request.is_plain():
        return Continuation(handle, request, inputs).run(forward)
    return run_unpruned(forward, inputs)


def run_unpruned(forward, inputs):
    """Run outside of an enclosing pass, whose hooks are on the same layers."""
    if ACTIVE.get() is None:
        return forward(**inputs)
    token = ACTIVE.set(None)
    try:
        return forward(**inputs)
    finally:
        ACTIVE.reset(token)


class PatchedForward(Override):
    @torch.compiler.disable(reason=EAGER)
    def __call__(self, *args, **kwargs):
        handle = self.handle
        if handle is None:
            return self.inner(*args, **kwargs)
        output = run_pass(handle, self.module, self.inner, self.arguments(args, kwargs))
        ENTERED.set(id(handle))  # last, because passes may be nested in this one
        return output


def is_patched(base):
    override = vars(base).get("forward")
    return isinstance(override, PatchedForward) and override.handle is not None


class PatchedEncoder(Override):
    @torch.compiler.disable(reason=EAGER)
    def __call__(self, *args, **kwargs):
        method = self.handle and self.handle.current_method()
        if method is None or ENCODING.get():  # Qwen3-VL encodes videos as images
            return self.inner(*args, **kwargs)
        token, arguments = ENCODING.set(True), self.arguments(args, kwargs)
        try:
            encoded = encode(self.module, self.inner, arguments, method)
        finally:
            ENCODING.reset(token)
        active = ACTIVE.get()
        if getattr(active, "model", None) is self.module:
            modality = self.name.split("_")[1]
            active.encoded[modality] = as_merged(self.module, modality, arguments, encoded)
        return encoded
