"""Gathering tokens of tensors of any shape in Triton; _moves has the kernel and says what it costs.

Tensors of one form (shape, type, strides, alignment, place of the tokens) take one launch, those of several one each:
hidden states, positions and a mask are three. CUDA C++ takes one for all.
    hidden states, 3072 -> 352 tokens of 4096, B 1, bf16: 5.8 MB, 1.3 us on an H200 at 4.3 TB/s, less than a launch.
"""

from ._moves import copy, copy_kernel, grouped, move_job, move_jobs


def gather_tokens(tensors, keep, dims):
    """keep [K], or [B, K] where the batch stands before the tokens; the arguments are checked by pruneops.ops."""
    results = []
    for tensor, token in zip(tensors, dims):
        before, after = tensor.shape[: token + 1 - keep.dim()], tensor.shape[token + 1 :]
        results.append(tensor.new_empty((*before, *keep.shape, *after)))
    for indices, sources in grouped(tensors, dims):
        tensor, token = tensors[indices[0]], dims[indices[0]]
        batch = token - 1 if keep.dim() == 2 else None
        copy(tensor, sources, [results[i] for i in indices], keep, None, token=token, batch=batch)
    return results


def compile_jobs():
    """Every kind of configuration that the launcher above can ask for, to be compiled without a GPU."""
    jobs = [move_job(copy_kernel, 16, 8192, count, rank) for count, rank in ((8, 2), (64, 2), (192, 2), (8, 6))]
    return jobs + move_jobs(copy_kernel, ((16, 16), (8, 8), (4, 132), (2, 2), (2, 1026), (1, 1), (1, 33)))
