"""Compaction of key and value caches in Triton; _moves has the kernels and says what they cost.

Caches of one form (shape, type, strides, alignment) take one launch, those of several one each; CUDA C++ takes one for
all.
    64 caches, 3072 -> 352 tokens, B 1, Hk 32, D 128, bf16, new: 369 MB, 86 us on an H200 at 4.3 TB/s; 12288 programs.
    such caches losing 10 % in place, 3072 -> 2765: 2.9 GB, 674 us; 4096 programs, 22 blocks of tokens each.
"""

from ._moves import copy, copy_kernel, grouped, move_job, move_jobs, shift, shift_kernel

DIMS = {"token": 2, "batch": 0, "head": 1}


def kv_compact(caches, keep, lengths):
    """caches of [B, Hk, S, D], keep [B, K] or [B, Hk, K]; the arguments are checked by pruneops.ops."""
    results = {}
    for indices, sources in grouped(caches):
        own = new_caches(caches[indices[0]], keep.shape[-1], len(indices))
        copy(caches[indices[0]], sources, own, keep, lengths, **DIMS)
        results.update(zip(indices, own))
    return [results[i] for i in range(len(caches))]


def kv_compact_(caches, keep, lengths):
    """The same in place, positions ascending."""
    for indices, sources in grouped(caches):
        shift(caches[indices[0]], sources, keep, lengths, **DIMS)


def new_caches(cache, K, count):
    """Uninitialised ones of [B, Hk, K, D] that lie in memory as the cache does: heads inside of tokens, or outside."""
    B, Hk, S, D = cache.shape
    if Hk > 1 and S > 1 and cache.stride(1) < cache.stride(2):
        return [cache.new_empty((B, K, Hk, D)).transpose(1, 2) for _ in range(count)]
    return [cache.new_empty((B, Hk, K, D)) for _ in range(count)]


def compile_jobs():
    """Every kind of configuration that the launchers above can ask for, to be compiled without a GPU."""
    jobs = []
    for kernel in (copy_kernel, shift_kernel):
        for count, rank, lengths in ((8, 2, None), (64, 2, "i64"), (192, 2, "i32"), (64, 6, None)):
            jobs.append(move_job(kernel, 16, 256, count, rank, lengths))
        jobs += move_jobs(kernel, ((16, 32), (16, 8192), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)))
    return jobs
