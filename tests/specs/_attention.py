"""Invalid calls by arguments that both attention operators have."""

import functools

import torch

from tests.invalid_calls import DTYPE_NAMES, InvalidCall, TypeErrorCall

QUERY, KEY = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8)


def invalid_calls(op, valid):
    """`valid` holds QUERY and KEY."""
    invalid, lse = functools.partial(InvalidCall, op, valid), torch.zeros(2, 4, 5)
    of_batch = "of shape [2, Hk, Sk, 8]"
    return [
        invalid(ValueError, "query", "of shape [5, 8]", "of rank 3 or 4", query=QUERY[0, 0]),
        invalid(ValueError, "query", "of shape [1, 2, 4, 5, 8]", "of rank 3 or 4", query=QUERY[None]),
        invalid(ValueError, "query", "of shape [2, 4, 5, 0]", "at least one feature wide", query=QUERY[..., :0]),
        invalid(TypeError, "query", "torch.float64", DTYPE_NAMES, query=QUERY.double()),
        invalid(TypeError, "query", "torch.int32", DTYPE_NAMES, query=QUERY.int()),
        invalid(TypeError, "key", "torch.float16", "the dtype of query, torch.float32", key=KEY.half()),
        invalid(ValueError, "key", "on meta", "on the device of query, cpu", key=KEY.to("meta")),
        invalid(ValueError, "key", "of shape [2, 6, 8]", of_batch, key=KEY[0]),
        invalid(ValueError, "key", "of shape [1, 2, 6, 8]", of_batch, key=KEY[:1]),
        invalid(ValueError, "key", "of shape [2, 2, 6, 7]", of_batch, key=KEY[..., :7]),
        invalid(ValueError, "key", "of shape [2, 2, 6, 8]", "of shape [Hk, Sk, 8]", query=QUERY[0]),
        invalid(
            ValueError, "query", "257 features a head", "at most 256 features a head",
            query=torch.ones(2, 4, 5, 257), key=torch.ones(2, 2, 6, 257),
        ),
        invalid(ValueError, "key", "of 0 heads", "of a number of heads that divides the 4 of query", key=KEY[:, :0]),
        invalid(
            ValueError, "key", "of 3 heads", "of a number of heads that divides the 4 of query",
            key=KEY[:, [0, 1, 1]],
        ),
        invalid(TypeError, "lse", "torch.float64", "float32", lse=lse.double()),
        invalid(ValueError, "lse", "of shape [2, 4, 6]", "of shape [2, 4, 5]", lse=torch.zeros(2, 4, 6)),
        invalid(ValueError, "lse", "of shape [4, 5]", "of shape [2, 4, 5]", lse=lse[0]),
        invalid(ValueError, "lse", "on meta", "on the device of query, cpu", lse=lse.to("meta")),
    ]  # fmt: skip


def type_errors(op, valid):
    wrong_type = functools.partial(TypeErrorCall, op, valid)
    return [
        wrong_type("query must be Tensor, got list", query=[[1.0]]),
        wrong_type("key must be Tensor, got float", key=1.0),
        wrong_type("causal must be bool, got str", causal="yes"),
        wrong_type("scale must be float or int or NoneType, got str", scale="1"),
        wrong_type("lse must be Tensor or NoneType, got float", lse=0.0),
    ]
