"""Gathering tokens of tensors of any shape in Triton; _token_copy has the kernel and says what it costs.

Tensors of one layout (shape, type, strides, place of the tokens) take one launch, those of several one each: hidden
states, positions and a mask are three. CUDA C++ takes one for all.
    hidden states, 3072 -> 352 tokens of 4096, B 1, bf16: 5.8 MB, 1.3 us on an H200 at 4.3 TB/s, less than a launch.
"""

from ._token_copy import COPY_SLICE, Roles, alike, copy, copy_kernel, expect, expect_keep, form, grouped


def gather_tokens(tensors, keep, dims):
    """keep [K], or [B, K] where the batch stands before the tokens."""
    expect_keep(keep, None, (1, 2))
    batched, groups, results = keep.dim() == 2, grouped(tensors, dims), {}
    for layout, *_ in groups:
        expect(layout.device == keep.get_device() and batched <= layout.token < len(layout.shape))
        expect(not batched or layout.shape[layout.token - 1] in (1, keep.shape[0]))
    for layout, indices, sources in groups:
        token = layout.token
        shape = (*layout.shape[: token - batched], *keep.shape, *layout.shape[token + 1 :])
        own = alike(tensors[indices[0]].new_empty(shape), len(indices))
        copy(layout, sources, own, keep, None, Roles(token, token - 1 if batched else None))
        results.update(zip(indices, own))
    return [results[i] for i in range(len(tensors))]


def specializations():
    """(kernel, form) of every kind of configuration that the launcher can ask for, to be compiled without a GPU."""
    for count, rank in ((8, 2), (64, 2), (192, 2), (8, 6)):
        yield copy_kernel, form(COPY_SLICE, 16, 8192, count, rank)
    for unit, width in ((16, 16), (8, 8), (4, 132), (2, 2), (2, 1026), (1, 1), (1, 33)):
        yield copy_kernel, form(COPY_SLICE, unit, width)
