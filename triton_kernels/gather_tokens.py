"""gather_tokens in Triton: argument checks and launches; _token_copy has the kernel.

Tensors of one layout (type, shape, strides, token dimension) share a launch: hidden states, positions and a mask take
three. Kept bytes are read once and written once.
Documentation: docs/kernels/token_copy.md
"""

from ._token_copy import (
    NEW_CHUNK,
    DimRoles,
    allocate_like,
    check,
    check_keep,
    copy_new,
    copy_new_kernel,
    group_by_layout,
    make_spec,
)


def gather_tokens(tensors, keep, dims):
    """keep [K], or [B, K] where the batch dimension is before the token dimension."""
    check_keep(keep, None, (1, 2))
    batched, groups, results = keep.dim() == 2, group_by_layout(tensors, dims), {}
    for layout, *_ in groups:
        check(layout.device == keep.get_device() and batched <= layout.token < len(layout.shape))
        check(not batched or layout.shape[layout.token - 1] in (1, keep.shape[0]))
    for layout, indices, sources in groups:
        token = layout.token
        shape = (*layout.shape[: token - batched], *keep.shape, *layout.shape[token + 1 :])
        group_results = allocate_like(tensors[indices[0]].new_empty(shape), len(indices))
        copy_new(layout, sources, group_results, keep, None, DimRoles(token, token - 1 if batched else None))
        results.update(zip(indices, group_results))
    return [results[i] for i in range(len(tensors))]


def specializations():
    """(kernel, spec) of every kind of configuration of the launcher, to be compiled without a GPU."""
    for count, rank in ((8, 2), (64, 2), (192, 2), (8, 6)):
        yield copy_new_kernel, make_spec(NEW_CHUNK, 16, 8192, count, rank)
    for vec_bytes, width in ((16, 16), (8, 8), (4, 132), (2, 2), (2, 1026), (1, 1), (1, 33)):
        yield copy_new_kernel, make_spec(NEW_CHUNK, vec_bytes, width)
