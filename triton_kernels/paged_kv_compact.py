"""Compaction of paged caches in place in Triton; _moves has the kernel and says what it costs.

Tensors of one form (shape, type, strides, alignment) take one launch, those of several one each; CUDA C++ takes one for
all. Beside what kv_compact_ costs: two entries of the block table a token and slice, out of L1, and their divisions.
"""

from ._moves import grouped, move_job, move_jobs, shift, shift_kernel


def paged_kv_compact_(pages, block_table, keep, lengths, layout):
    """pages of [pages, page, Hk, D] (NHD) or [pages, Hk, page, D] (HND), or with a dimension of two after the pages;
    the arguments are checked by pruneops.ops."""
    for indices, sources in grouped(pages):
        tensor = pages[indices[0]]
        token, head = (tensor.dim() - place for place in ((3, 2) if layout == "NHD" else (2, 3)))
        dims = {"token": token, "head": head, "page": 0}
        shift(tensor, sources, keep, lengths, block_table, tensor.shape[token], **dims)


def compile_jobs():
    """Every kind of configuration that the launcher above can ask for, to be compiled without a GPU."""
    jobs = []
    for count, rank, lengths in ((8, 2, "i32"), (64, 2, "i64"), (192, 2, "i32"), (64, 6, "i32")):
        jobs.append(move_job(shift_kernel, 16, 256, count, rank, lengths, paged=True))
    widths = (16, 32), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)
    return jobs + move_jobs(shift_kernel, widths, lengths="i32", paged=True)
