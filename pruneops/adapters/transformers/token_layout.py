"""Which tokens of a prompt belong to which image, and the indices that remain when some of them are removed.

An image is what the processor made of one picture or one video: all its tiles, all its rows with the break tokens
between them, all its frames. How many tokens each has follows from the encoder's outputs. The prompt is read, in one
copy to the host, only where these do not determine which tokens belong to which image: with several prompts, several
tiles, or images beside videos.
"""

import itertools
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from .models import UnsupportedError, layout_kind, tile_tokens, visual_tokens

Spans = list[tuple[int, int]]  # (first, last + 1)


class Tokens(NamedTuple):
    """The tokens of a batch of prompts that are left, [B, S].

    Lists have an entry per row; their contents are known without reading a tensor.
    """

    text: Any  # bool [B, S]: valid tokens that belong to no image; None, like places, after the last removal
    places: Any  # list of int64 [n]: positions of the visual tokens, ascending
    sizes: list[list[int]]  # tokens of each image
    lengths: list[int]  # valid tokens; padding is on the left
    valid: Tensor | None  # bool [B, S]; None: all are
    padding_unknown: bool = False  # `valid` was not read, and padding counts as text

    @property
    def images(self) -> list[Spans]:
        """For every row, (first, last + 1) of each image among its visual tokens."""
        return [spans_from_counts(row) for row in self.sizes]


class Layout(NamedTuple):
    """Where the images of prompts are.

    images: for every row, (modality, first, size) of each image: its tokens within the concatenated encoder outputs.
    """

    tokens: Tokens
    images: list[list[tuple[str, int, int]]]
    left_padded: bool = True


class Kept(NamedTuple):
    """What is left of a batch of prompts. Rows that get shorter than others are padded on the left.

    index: int64 [B, S'], positions of the kept tokens, ascending where they are valid. source: int64 [B, S], for
    every token before the removal the index in the result of the last kept token up to it. ranks: for every row, of the
    kept tokens among its visual tokens.
    """

    index: Tensor
    source: Tensor
    tokens: Tokens
    ranks: list[Tensor]


def layout_of(model, features, ids, embeds=None, mask=None, read=False):
    """The layout of a model's prompts, or None if they have no image.

    features: {modality: the encoder's tensors}. embeds: of the prompts before images are merged, required without ids.
    """
    counts = {name: [len(image) for image in tensors] for name, tensors in features.items()}
    if not any(map(sum, counts.values())):
        return None
    kind, tile, visual = layout_kind(model), tile_tokens(model, counts), visual_tokens(model, ids, embeds)
    return token_layout(kind, ids, visual, counts, mask, tile, read)


def token_layout(
    kind: str,
    ids: Tensor | None,
    visual: dict[str, Tensor],
    counts: dict[str, list[int]],
    mask: Tensor | None = None,
    tile: int | None = None,
    read: bool = False,
) -> Layout:
    """The layout of a batch of prompts.

    Parameters
    ----------
    kind : {"image", "run", "tiles"}
        See `models.FAMILIES`.
    ids : Tensor [B, S], int64, or None
        Needed to tell tiles apart.
    visual : dict
        {modality: bool [B, S], its tokens}.
    counts : dict
        {modality: tokens of each of the encoder's tensors}.
    mask : Tensor [B, S], optional
        0 for padding.
    tile : int, optional
        Tokens of a tile, for kinds "run" and "tiles".
    read : bool
        Whether the padding must be known. If not, that of a single prompt is treated as text.

    Raises
    ------
    ValueError
        If the prompts have not as many visual tokens as the encoder gave. For a single prompt on a device, where
        reading would wait for it, the model itself reports this.
    UnsupportedError
        If the mask hides visual tokens; not checked for a single prompt on a device.
    """
    counts = {name: list(filter(None, sizes)) for name, sizes in counts.items() if sum(sizes)}
    names = list(counts)
    either = torch.stack([visual[name] for name in names]).any(0) if len(names) > 1 else visual[names[0]]
    B, S = either.shape
    known = len(names) == 1 and (kind == "image" or sum(counts[names[0]]) == tile)
    if B == 1 and known and not (read and mask is not None):
        valid, left_padded = None if mask is None else mask.bool(), True
        images, lengths, padding_unknown = [spans_of_sizes(names[0], counts[names[0]])], [S], mask is not None
        if either.device.type == "cpu":  # reading costs no synchronisation
            _check(either.numpy(), either.numpy() if mask is None else mask.numpy(), counts)
    else:
        images, lengths, left_padded = _read(kind, ids, {name: visual[name] for name in names}, counts, mask, tile)
        valid, padding_unknown = None if mask is None or min(lengths) == S else mask.bool(), False
    sizes = [[size for *_, size in row] for row in images]
    flat = either.flatten().nonzero_static(size=sum(map(sum, sizes)))[:, 0]
    rows = flat.split([sum(row) for row in sizes])
    places = [row - b * S if b else row for b, row in enumerate(rows)]
    text = ~either if valid is None or padding_unknown else valid & ~either
    return Layout(Tokens(text, places, sizes, lengths, valid, padding_unknown), images, left_padded)


def _read(kind: str, ids: Tensor | None, visual: dict[str, Tensor], counts: dict[str, list[int]], mask, tile):
    """(images, lengths, left_padded) of every row, from one copy to the host."""
    codes = torch.stack([i * flags.long() for i, flags in enumerate(visual.values(), 1)]).sum(0)
    if ids is None and kind == "tiles":
        raise UnsupportedError("pruneops: tiles are told apart by the tokens between them; give input_ids")
    rows = torch.stack([codes, codes if ids is None else ids, torch.ones_like(codes) if mask is None else mask.long()])
    rows = rows.cpu().numpy()
    _check(rows[0], rows[2], counts)
    names, queues = list(visual), {name: spans_of_sizes(name, sizes) for name, sizes in counts.items()}
    images, starts = [], dict.fromkeys(names, 0)
    for row_codes, row_ids in rows[:2].swapaxes(0, 1):
        places, row = row_codes.nonzero()[0], []
        while sum(size for *_, size in row) < len(places):
            rest = places[sum(size for *_, size in row) :]
            name = names[row_codes[rest[0]] - 1]
            if kind == "image":
                size = queues[name].pop(0)[2] if queues[name] else 0
            else:
                size = run_length(rest) if kind == "run" else tiles_length(rest, row_ids)
            complete = size and size <= len(rest) and (kind == "image" or size % tile == 0)
            if not complete or (row_codes[rest[:size]] != row_codes[rest[0]]).any():
                raise ValueError(
                    f"pruneops: the {len(places)} image tokens of prompt {len(images)} are not those of whole images; "
                    f"the encoder gave {counts}"
                )
            row.append((name, starts[name], size))
            starts[name] += size
        images.append(row)
    lengths = rows[2].astype(bool).sum(1).tolist()
    left_padded = all(valid[len(valid) - length :].all() for valid, length in zip(rows[2], lengths))
    return images, lengths, left_padded


def run_length(places: numpy.ndarray) -> int:
    """Tokens of the first run of consecutive positions."""
    breaks = numpy.flatnonzero(numpy.diff(places) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(places)


def tiles_length(places: numpy.ndarray, ids: numpy.ndarray) -> int:
    """Tokens of the first image of an Idefics3 or SmolVLM prompt: runs, with tokens between them.

    Before every tile stand <fake_token_around_image> and its place in the grid, and one more such token after the last:
    `fake row_1_col_1 tile fake row_1_col_2 tile \\n fake row_2_col_1 tile .. \\n\\n fake global tile fake`. So an image
    ends where a run is followed by that token, and then by something else than one token and the next run.
    """
    size = 0
    while True:
        size += run_length(places[size:])
        if size == len(places):
            return size
        end, following = places[size - 1] + 1, places[size]
        fake = ids[following - 2]
        if ids[end] == fake and following - end != 2:
            return size


def _check(visual, valid, counts):
    """Arrays [B, S]: as many visual tokens as features, all of them valid."""
    tokens, features = int((visual != 0).sum()), sum(map(sum, counts.values()))
    if tokens != features:
        raise ValueError(f"pruneops: {tokens} image tokens in the prompts for {features} image features")
    if not valid[visual != 0].all():
        raise UnsupportedError("pruneops: the attention mask hides tokens of an image; leave that image out")


def features_of(encoded: Any, first: int, size: int) -> Tensor:
    """Tokens first .. first + size - 1 of the encoder's tensors [.., n, D], concatenated: [size, D]."""
    if isinstance(encoded, Tensor):
        return encoded.flatten(0, -2)[first : first + size]
    parts, offset = [], 0
    for tensor in encoded:
        start, end = max(first - offset, 0), min(first + size - offset, len(tensor))
        if start < end:
            parts.append(tensor[start:end] if end - start < len(tensor) else tensor)
        offset += len(tensor)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def keep_tokens(tokens: Tokens, chosen: list[list[Tensor]], again: bool = False) -> Kept:
    """Remove the visual tokens that are not chosen, and padding.

    Parameters
    ----------
    tokens : Tokens
    chosen : list of lists of Tensor [k], int64
        For every row and image, ascending ranks within the image.
    again : bool
        Whether more may be removed afterwards; only then `Kept.tokens` has the fields `text` and `places`.

    Returns
    -------
    Kept
    """
    ranks = []
    for row, images, places in zip(chosen, tokens.images, tokens.places):
        parts = [rank.to(places.device) + first if first else rank for rank, (first, _) in zip(row, images)]
        ranks.append(torch.cat(parts) if len(parts) > 1 else parts[0] if parts else places)
    return keep_ranks(tokens, ranks, [[len(rank) for rank in row] for row in chosen], again)


def keep_ranks(tokens: Tokens, ranks: list[Tensor], sizes: list[list[int]], again: bool = False) -> Kept:
    """The same for ranks [k] among all visual tokens of a row; `sizes` are the kept tokens of each image."""
    stays, kept = tokens.text.clone(), []
    for row, places, chosen in zip(stays, tokens.places, ranks):
        kept.append(places.index_select(0, chosen.to(places.device)))
        row.index_fill_(0, kept[-1], True)
    lengths = [length - sum(before) + sum(after) for length, before, after in zip(tokens.lengths, tokens.sizes, sizes)]
    if not min(lengths, default=1):
        raise UnsupportedError(
            "pruneops: nothing would be left of a prompt that is an image and nothing else; add text, or keep tokens"
        )
    longest = max(lengths, default=0)
    index = stays.byte().argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
    source = stays.cumsum(1).sub_(1)
    for row, length in zip(source, lengths):
        if length < longest:
            row += longest - length
    if tokens.padding_unknown and tokens.valid is not None:
        valid = tokens.valid.gather(1, index)
    else:
        valid = None if min(lengths, default=0) == longest else stays.gather(1, index)
    text = tokens.text.gather(1, index) if again else None
    places = [row.index_select(0, positions) for row, positions in zip(source, kept)] if again else None
    left = Tokens(text, places, sizes, lengths, valid, tokens.padding_unknown)
    return Kept(index, source.clamp_(min=0), left, ranks)


def spans_from_counts(counts: list[int]) -> Spans:
    """(first, last + 1) of consecutive groups of these sizes."""
    ends = list(itertools.accumulate(counts))
    return [(end - count, end) for count, end in zip(counts, ends)]


def spans_of_sizes(name: str, sizes: list[int]) -> list[tuple[str, int, int]]:
    """(name, first, size) of consecutive groups of these sizes."""
    return [(name, first, last - first) for first, last in spans_from_counts(sizes)]
