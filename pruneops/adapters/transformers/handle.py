"""`patch`: a model whose images are pruned, and the handle that undoes it."""

import collections
import contextlib
import dataclasses
import inspect
import time
import warnings
from contextvars import ContextVar

import torch

from .cache import ACTIVE, request_of
from .models import MODALITIES, UnsupportedError, find_model
from .passes import Continuation
from .prefill import Prefill, brings_images
from .vision import as_merged, encode

RECORDS = 16  # requests whose statistics a handle holds
EAGER = "pruneops prunes in eager mode: compile without fullgraph, or use pruneops.prepare"
ENCODING = ContextVar("pruneops_encoding", default=False)
ENTERED = ContextVar("pruneops_entered", default=None)  # id of the handle whose `forward` ended last
SETTINGS = ContextVar("pruneops_settings", default=())  # (handle, method or None) of the `with` blocks around


def patch(model, method):
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
        `remove()`, `disabled()`, `override(keep=...)`, `stats`; also a context manager that removes itself.

    Raises
    ------
    UnsupportedError
        On an unknown architecture, or a model that is patched already. In forward passes, before anything is computed:
        on caches that cannot be pruned (static, offloaded, quantised, sliding), on flex attention and continuous
        batching and, for methods that prune inside the decoder, on `use_cache=False` outside of training.

    Notes
    -----
    Outputs are as long as the inputs, so labels and losses fit: a token that was removed has the output of the last one
    before it that was kept. Gradients flow through the tokens that are kept.
    """
    real = find_model("pruneops.patch", model)
    if getattr(real, "_pruneops", None) is not None or is_patched(real.base_model):
        raise UnsupportedError("pruneops.patch: this model is patched already; call remove() of its handle first")
    return Handle(real, method)


class Handle:
    """A patched model, without its wrappers. `method` may be exchanged between requests.

    `stats` has a `Stats` for each of the last 16 requests. `clock` measures selection: the host's seconds unless it is
    replaced by one that awaits the device.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, model, method):
        self.model, self.method, self.stats = model, method, collections.deque(maxlen=RECORDS)
        self.decoder, base, self._warned = model.get_decoder(), model.base_model, False
        names = [f"get_{name}_features" for name in MODALITIES if hasattr(base, f"get_{name}_features")]
        self._overrides = [PatchedForward(base, "forward", self)]
        self._overrides += [PatchedEncoder(base, name, self) for name in names]
        self._check = base.register_forward_hook(self._expect_entered, with_kwargs=True)
        model._pruneops = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def remove(self):
        """Make the model what it was."""
        for override in self._overrides:
            override.remove()
        self._check.remove()
        if getattr(self.model, "_pruneops", None) is self:
            del self.model._pruneops

    def disabled(self):
        """Requests that begin inside are not pruned: those of this thread or task, not of threads started inside."""
        return self._with(None)

    def override(self, **settings):
        """Requests that begin inside, in this thread or task, are pruned with other settings of the method.

        A thread that is started inside takes them along as `contextvars.copy_context().run`.
        """
        return self._with(dataclasses.replace(self.current_method() or self.method, **settings))

    @contextlib.contextmanager
    def _with(self, method):
        token = SETTINGS.set((*SETTINGS.get(), (self, method)))
        try:
            yield self
        finally:
            SETTINGS.reset(token)

    def _expect_entered(self, module, args, kwargs, output):
        """After a pass of the base model: somebody may have taken our `forward` away, with an override of their own."""
        entered = ENTERED.get() == id(self)
        ENTERED.set(None)
        if not entered and self.current_method() is not None and brings_images(kwargs):
            self.warn_unpruned("the forward of the base model was replaced; call remove() and patch() again")

    def warn_unpruned(self, reason):
        if not self._warned:
            self._warned = True
            warnings.warn(f"pruneops: a request with images was not pruned: {reason}", stacklevel=2)

    def current_method(self):
        """The method of requests that begin now, None if they are not to be pruned."""
        return next((method for handle, method in reversed(SETTINGS.get()) if handle is self), self.method)


class Override:
    """An attribute of one module in place of its class's method, or of the owner's own override, which it calls.

    It holds no closure, so copies and pickles of the module have one of their own.
    """

    def __init__(self, module, name, handle):
        self.module, self.name, self.handle = module, name, handle
        self.owners = vars(module).get(name)
        self.parameters = list(inspect.signature(self.inner).parameters)
        setattr(module, name, self)

    @property
    def inner(self):
        return self.owners or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self):
        return inspect.signature(self.inner)

    def arguments(self, args, kwargs):
        return dict(zip(self.parameters, args)) | kwargs

    def remove(self):
        """If the owner has put something on top meanwhile, that stays, and this only passes calls on."""
        self.handle = None
        if vars(self.module).get(self.name) is self:
            delattr(self.module, self.name)
            if self.owners is not None:
                setattr(self.module, self.name, self.owners)


def run_pass(handle, model, forward, inputs):
    """`forward(**inputs)` of the base model, with the images of the request pruned."""
    cache = inputs.get("past_key_values")
    held = 0 if cache is None else cache.get_seq_length()
    request, method = request_of(cache) if held else None, handle.current_method()
    if brings_images(inputs) and (request is not None or method is not None):
        if held:
            raise UnsupportedError(
                "pruneops: images on a cache that holds tokens already (chunked prefill, or a new image in a later "
                "turn) cannot be pruned; give all images with the first forward pass, or use handle.disabled()"
            )
        return Prefill(handle, model, method, inputs).run(forward)
    if request is not None and not request.is_plain():
        return Continuation(handle, request, inputs).run(forward)
    return run_unpruned(forward, inputs)


def run_unpruned(forward, inputs):
    """Out of the pass that this one may be nested in, whose hooks are on the same layers."""
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
        ENTERED.set(id(handle))  # the last thing, for passes may be nested in this one
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
        if getattr(ACTIVE.get(), "model", None) is self.module:
            modality = self.name.split("_")[1]
            ACTIVE.get().encoded[modality] = as_merged(self.module, modality, arguments, encoded)
        return encoded
