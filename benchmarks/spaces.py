"""What `make gpu-tune` may change in triton_kernels: per kernel, where its configuration comes from and what to try.

A target is one place in a kernel module: `current` returns its configuration, `use` overrides it, `text` is the line
that would be committed. Only this file depends on how those modules are written.
"""

import contextlib
import importlib
import itertools
import sys
from dataclasses import dataclass
from unittest import mock

import torch

KERNELS = "pruneops.triton_kernels"


@dataclass(frozen=True)
class Table:
    """An entry of a dict of the module that `_launch.tuned` reads: (tile sizes, launch options), or both in one."""

    module: str
    name: str
    key: object

    def current(self):
        return flat(self._entry())

    def _entry(self):
        return _module("_launch").tuned(getattr(_module(self.module), self.name), self.key)

    @contextlib.contextmanager
    def use(self, config):
        """Override the configuration; yields a list that is not empty once it has been read."""
        module, used = _module(self.module), []
        table = {key: value for key, value in getattr(module, self.name).items() if not isinstance(key, tuple)}

        class Logged(dict):
            def __getitem__(table, key):
                used.extend([key] * (key == self.key))
                return dict.__getitem__(table, key)

        changed = Logged({**table, self.key: like(table[self.key], config)})
        with mock.patch.object(module, self.name, changed):
            yield used

    def text(self, config):
        arch = "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "any"
        return f"{self.name}[{arch}, {self.key!r}] = {like(self._entry(), config)}"


@dataclass(frozen=True)
class Function:
    """What a function of the module returns for some arguments: (tile sizes, launch options), or both in one dict.

    `parts` are functions of the same module that return one of these values: (name, key).
    """

    module: str
    name: str
    arguments: dict  # position -> value; others are ignored
    example: tuple  # arguments that match
    parts: tuple = ()

    def _matches(self, args):
        return all(place < len(args) and args[place] == value for place, value in self.arguments.items())

    def current(self):
        return flat(getattr(_module(self.module), self.name)(*self.example))

    @contextlib.contextmanager
    def use(self, config):
        """As for a table."""
        module, used = _module(self.module), []
        original = getattr(module, self.name)

        def changed(*args):
            result = original(*args)
            if not self._matches(args):
                return result
            used.append(args)
            return like(result, flat(result) | config)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(module, self.name, changed))
            for name, key in self.parts:
                stack.enter_context(mock.patch.object(module, name, lambda *args, key=key: config[key]))
            yield used

    def text(self, config):
        return f"{self.name}{self.example} -> {like(getattr(_module(self.module), self.name)(*self.example), config)}"


@dataclass(frozen=True)
class Constant:
    """A constant of the module; a configuration is {name: value}."""

    module: str
    name: str

    def current(self):
        return {self.name: getattr(_module(self.module), self.name)}

    @contextlib.contextmanager
    def use(self, config):
        """As for a table, but always counted as read."""
        with mock.patch.object(_module(self.module), self.name, config[self.name]):
            yield [self.name]

    def text(self, config):
        return f"{self.name} = {config[self.name]!r}"


@dataclass(frozen=True)
class Space:
    """Configurations of a target and the case of an operator's benchmark that times them."""

    name: str
    target: object
    operator: str
    case: str
    candidates: tuple
    rehearsal: tuple = ()  # (target, case) for Triton's interpreter


def flat(value):
    """Tile sizes and launch options in one dict."""
    return dict(value) if isinstance(value, dict) else {key: entry for part in value for key, entry in part.items()}


def like(example, config):
    """A configuration in the layout of an example: one dict, or (tile sizes, launch options)."""
    if isinstance(example, dict):
        return dict(config)
    tiles = {key: value for key, value in config.items() if not key.startswith("num_")}
    return tiles, {key: value for key, value in config.items() if key.startswith("num_")}


def grid(warps, stages, **tiles):
    """Every combination."""
    names = (*tiles, "num_warps", "num_stages")
    return tuple(dict(zip(names, values)) for values in itertools.product(*tiles.values(), warps, stages))


_kept = []  # kernels that captured graphs may still use


def clear_caches():
    """Make every launcher read its tables again: drop cached plans and compiled kernels."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(KERNELS):
            continue
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
            if isinstance(getattr(value, "compiled", None), dict):
                _kept.append(value.compiled)
                value.compiled = {}


def _module(name):
    return importlib.import_module(f"{KERNELS}.{name}")


def _pivots(element, few, example_many):
    return Function(
        "pivot_cosine", "_tiles", {0: element, 1: True, 2: few}, (element, True, few, example_many),
        (("_block_n", "BLOCK_N"),),
    )  # fmt: skip


SPACES = (
    Space(
        "kcenter gram half", Table("kcenter", "GRAM", "half"), "kcenter", "b1-n2880-d4096-bfloat16",
        grid((4, 8), (3, 4, 5), BLOCK=(64, 128), BLOCK_D=(32, 64, 128)),
        (Table("kcenter", "GRAM", "float"), "b1-n96-d64-float32"),
    ),
    Space(
        "kcenter gram float", Table("kcenter", "GRAM", "float"), "kcenter", "b1-n2880-d4096-float32",
        grid((4, 8), (2, 3, 4), BLOCK=(64, 128), BLOCK_D=(16, 32)),
    ),
    Space(
        "kcenter rounds half", Table("kcenter", "ROUNDS", "half"), "kcenter", "b1-n9216-d4096-bfloat16",
        grid((8,), (3, 4), BLOCK_M=(32, 64), BLOCK_N=(64, 128), BLOCK_C=(32, 64, 128), BLOCK_D=(32, 64)),
    ),
    Space(
        "kcenter candidates", Constant("kcenter", "CANDIDATES"), "kcenter", "b1-n23328-d4096-bfloat16",
        tuple({"CANDIDATES": (128, many)} for many in (128, 512, 1024)),
    ),
    Space(
        "attention_mass prefill half", Function("attention_mass", "tiles", {0: 2, 1: 128, 2: True}, (2, 128, True)),
        "attention_mass", "prefill-s3072-h32-bfloat16",
        (
            *grid((8,), (2, 3, 4), BLOCK_M=(128,), BLOCK_N=(32, 64)),
            *grid((8,), (2, 3), BLOCK_M=(128,), BLOCK_N=(128,)),
            *grid((4,), (2, 3), BLOCK_M=(64,), BLOCK_N=(64,)), *grid((4,), (2,), BLOCK_M=(64,), BLOCK_N=(128,)),
            *grid((16,), (2,), BLOCK_M=(256,), BLOCK_N=(64,)),
        ),
        (Function("attention_mass", "tiles", {0: 4, 2: True}, (4, 32, True)), "prefill-s130-h4-float32"),
    ),
    Space(
        "attention_mass registers", Constant("attention_mass", "REGISTERS"),
        "attention_mass", "prefill-s3072-h32-bfloat16",
        tuple({"REGISTERS": {2: 255, 4: 255, (90, 2): count}} for count in (112, 144, 168, 255)),
    ),
    Space(
        "attention_mass programs", Constant("attention_mass", "PROGRAMS"),
        "attention_mass", "decode-b1-s3072-bfloat16",
        tuple({"PROGRAMS": count} for count in (128, 384, 512, 768)),
    ),
    Space(
        "attention_mass decode half", Function("attention_mass", "tiles", {0: 2, 1: 128, 2: False}, (2, 128, False)),
        "attention_mass", "decode-b1-s3072-bfloat16",
        grid((2, 4), (3, 4, 5), BLOCK_N=(64, 128)),
    ),
    Space(
        "attention_received half",
        Function("attention_received", "tiles", {0: 2, 1: 128, 2: 1, 3: True}, (2, 128, 1, True)),
        "attention_received", "text-s3072-lse-bfloat16",
        grid((4, 8), (2, 3, 4), BLOCK_T=(64,), BLOCK_N=(64, 128)),
        (Function("attention_received", "tiles", {0: 4, 3: True}, (4, 32, 2, True)), "last-s130-float32"),
    ),
    Space(
        "attention_received programs", Constant("attention_received", "PROGRAMS"),
        "attention_received", "text-s3072-lse-bfloat16",
        tuple({"PROGRAMS": count} for count in (132, 396, 528, 1024)),
    ),
    Space(
        "pivot_cosine few half", _pivots(2, True, False), "pivot_cosine", "b1-n2880-d4096-p8-bfloat16",
        grid((2, 4, 8), (4, 6, 8), BLOCK_N=(16, 32), BLOCK_P=(16,), BLOCK_D=(64, 128)),
        (_pivots(4, True, False), "b1-n96-d64-p4-float32"),
    ),
    Space(
        "pivot_cosine many half", _pivots(2, False, False), "pivot_cosine", "b1-n2880-d4096-p64-bfloat16",
        grid((4, 8), (3, 4, 6), BLOCK_N=(16, 32, 64), BLOCK_P=(64,), BLOCK_D=(32, 64)),
    ),
)  # fmt: skip
