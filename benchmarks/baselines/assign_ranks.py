"""DTR's ranked list as one would write it in PyTorch: a softmax, then rank after rank its most probable free token.

All take logits [B, N, J + 1] and j, compute in the dtype of the logits, and return indices [B, j]. Cost: the softmax
and a transposition, then j passes over N probabilities; `loop_item` reads every index back on the host.
"""

import torch


def step(column, taken):
    """The token that one rank, column [B, N], takes, and taken [B, N] with it."""
    choice = column.masked_fill(taken, -1).argmax(-1, keepdim=True)
    return choice, taken.scatter(-1, choice, True)


def loop(logits, j, step=step):
    """Nothing read by the host; `step` may come compiled."""
    columns = logits.softmax(-1)[..., :j].mT.contiguous()
    taken = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    chosen = []
    for column in columns.unbind(1):
        choice, taken = step(column, taken)
        chosen.append(choice)
    return torch.cat(chosen, -1)


def loop_item(logits, j):
    """Image by image, with the index read by the host in every step."""
    chosen = []
    for columns in logits.softmax(-1)[..., :j].mT.contiguous():
        ranks = []
        for p in range(j):
            choice = columns[p].argmax().item()
            columns[p + 1 :, choice] = -1
            ranks.append(choice)
        chosen.append(ranks)
    return torch.tensor(chosen, device=logits.device)
