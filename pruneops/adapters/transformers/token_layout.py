"""Which tokens of a prompt belong to which image, and what is left of a prompt when some of them go.

An image is what the processor made of one picture or one video: all its tiles, all its rows with the break tokens
between them, all its frames. How many tokens each has follows from the encoder's outputs. Only where these do not say
which tokens are whose (several prompts, several tiles, images beside videos) is the prompt read: one copy to the host.
"""

import itertools
from typing import NamedTuple

import numpy
import torch

from .models import UnsupportedError, layout_kind, tile_tokens, visual_tokens


class Tokens(NamedTuple):
    """The tokens of a batch of prompts that are still there, [B, S].

    Lists have an entry a row; what they hold is known without reading a tensor.
    """

    text: torch.Tensor  # bool [B, S]: valid tokens that belong to no image
    places: list  # int64 [n] each: positions of the visual tokens, ascending
    sizes: list  # of lists: tokens of each image
    lengths: list  # valid tokens; padding is on the left
    valid: torch.Tensor | None  # bool [B, S]; None: all are
    padding_unknown: bool = False  # `valid` was not read: what it hides counts as text

    @property
    def images(self):
        """Of every row, (first, last + 1) of each image among its visual tokens."""
        return [spans_from_counts(row) for row in self.sizes]

    def flags(self):
        """bool [B, S]: the visual ones."""
        flags = torch.zeros_like(self.text)
        for row, places in zip(flags, self.places):
            row.index_fill_(0, places, True)
        return flags


class Layout(NamedTuple):
    """Where the images of prompts are.

    images: of every row, (modality, first, size) of each: which of the encoder's tokens, end to end, are its.
    """

    tokens: Tokens
    images: list
    left_padded: bool = True


class Kept(NamedTuple):
    """What stays of a batch of prompts. Rows that get shorter than others are padded on the left.

    index: int64 [B, S'], positions of the tokens that stay, ascending where they are valid. source: int64 [B, S], of
    every token that was there the last one up to it that stays, counted from the left of what stays. ranks: of every
    row, among its visual tokens.
    """

    index: torch.Tensor
    source: torch.Tensor
    tokens: Tokens
    ranks: list


def layout_of(model, features, ids, embeds=None, mask=None, read=False):
    """The layout of a model's prompts, or None if they have no image.

    features: of each modality the encoder's tensors. embeds: of the prompts before images are in them, without ids.
    """
    counts = {name: [len(own) for own in tensors] for name, tensors in features.items()}
    if not any(map(sum, counts.values())):
        return None
    kind, tile, visual = layout_kind(model), tile_tokens(model, counts), visual_tokens(model, ids, embeds)
    return token_layout(kind, ids, visual, counts, mask, tile, read)


def token_layout(kind, ids, visual, counts, mask=None, tile=None, read=False):
    """The layout of a batch of prompts.

    Parameters
    ----------
    kind : {"image", "run", "tiles"}
        See `models.FAMILIES`.
    ids : Tensor [B, S], int64, or None
        Read where tiles are to be told apart.
    visual : dict
        Of each modality bool [B, S]: its tokens.
    counts : dict
        Of each modality a list: tokens of each of the encoder's tensors.
    mask : Tensor [B, S], optional
        0 for padding.
    tile : int, optional
        Tokens of a tile, for kinds "run" and "tiles".
    read : bool
        Whether the padding must be known. Without, that of a single prompt is carried along as text.

    Raises
    ------
    ValueError
        If the prompts have not as many visual tokens as the encoder gave. For a single prompt on a device, where
        reading waits for it, the model itself will say so.
    UnsupportedError
        If the mask hides visual tokens; not looked at for a single prompt on a device.
    """
    counts = {name: list(filter(None, own)) for name, own in counts.items() if sum(own)}
    names = list(counts)
    either = torch.stack([visual[name] for name in names]).any(0) if len(names) > 1 else visual[names[0]]
    B, S = either.shape
    told = len(names) == 1 and (kind == "image" or sum(counts[names[0]]) == tile)
    if B == 1 and told and not (read and mask is not None):
        valid, left_padded = None if mask is None else mask.bool(), True
        images, lengths, padding_unknown = [spans_of_sizes(names[0], counts[names[0]])], [S], mask is not None
        if either.device.type == "cpu":  # nothing waits there
            _check(either.numpy(), either.numpy() if mask is None else mask.numpy(), counts)
    else:
        images, lengths, left_padded = _read(kind, ids, {name: visual[name] for name in names}, counts, mask, tile)
        valid, padding_unknown = None if mask is None or min(lengths) == S else mask.bool(), False
    sizes = [[size for *_, size in row] for row in images]
    flat = either.flatten().nonzero_static(size=sum(map(sum, sizes)))[:, 0]
    places = [own - b * S if b else own for b, own in enumerate(flat.split([sum(row) for row in sizes]))]
    text = ~either if valid is None or padding_unknown else valid & ~either
    return Layout(Tokens(text, places, sizes, lengths, valid, padding_unknown), images, left_padded)


def _read(kind, ids, visual, counts, mask, tile):
    """(images, lengths, left_padded) of every row, from one copy to the host."""
    codes = sum(i * flags.long() for i, flags in enumerate(visual.values(), 1))
    if ids is None and kind == "tiles":
        raise UnsupportedError("pruneops: tiles are told apart by the tokens between them; give input_ids")
    rows = torch.stack([codes, codes if ids is None else ids, torch.ones_like(codes) if mask is None else mask.long()])
    rows = rows.cpu().numpy()
    _check(rows[0], rows[2], counts)
    names, queues = list(visual), {name: spans_of_sizes(name, own) for name, own in counts.items()}
    images, starts = [], dict.fromkeys(names, 0)
    for codes, words in rows[:2].swapaxes(0, 1):
        places, own = codes.nonzero()[0], []
        while sum(size for *_, size in own) < len(places):
            rest = places[sum(size for *_, size in own) :]
            name = names[codes[rest[0]] - 1]
            if kind == "image":
                size = queues[name].pop(0)[2] if queues[name] else 0
            else:
                size = run_length(rest) if kind == "run" else tiles_length(rest, words)
            whole = size and size <= len(rest) and (kind == "image" or size % tile == 0)
            if not whole or (codes[rest[:size]] != codes[rest[0]]).any():
                raise ValueError(
                    f"pruneops: the {len(places)} image tokens of prompt {len(images)} are not those of whole images; "
                    f"the encoder gave {counts}"
                )
            own.append((name, starts[name], size))
            starts[name] += size
        images.append(own)
    lengths = rows[2].astype(bool).sum(1).tolist()
    left_padded = all(valid[len(valid) - length :].all() for valid, length in zip(rows[2], lengths))
    return images, lengths, left_padded


def run_length(places):
    """Tokens of the first run of consecutive positions."""
    breaks = numpy.flatnonzero(numpy.diff(places) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(places)


def tiles_length(places, words):
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
        fake = words[following - 2]
        if words[end] == fake and following - end != 2:
            return size


def _check(visual, valid, counts):
    """Arrays [B, S]."""
    found, features = int((visual != 0).sum()), sum(map(sum, counts.values()))
    if found != features:
        raise ValueError(f"pruneops: {found} image tokens in the prompts for {features} image features")
    if not valid[visual != 0].all():
        raise UnsupportedError("pruneops: the attention mask hides tokens of an image; leave that image out")


def features_of(encoded, first, size):
    """Tokens first .. first + size - 1 of the encoder's tensors [.., n, D], end to end: [size, D]."""
    if isinstance(encoded, torch.Tensor):
        return encoded.flatten(0, -2)[first : first + size]
    parts, at = [], 0
    for own in encoded:
        start, end = max(first - at, 0), min(first + size - at, len(own))
        if start < end:
            parts.append(own[start:end] if end - start < len(own) else own)
        at += len(own)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def keep_tokens(tokens, chosen, again=False):
    """Drop visual tokens but the chosen ones, and padding.

    Parameters
    ----------
    tokens : Tokens
    chosen : list of lists of Tensor [k], int64
        For every row and image, ascending ranks within the image.
    again : bool
        Whether more may be dropped afterwards, so that `Kept.tokens` must say where what is left stands.

    Returns
    -------
    Kept
    """
    ranks = []
    for row, images, places in zip(chosen, tokens.images, tokens.places):
        own = [rank.to(places.device) + first if first else rank for rank, (first, _) in zip(row, images)]
        ranks.append(torch.cat(own) if len(own) > 1 else own[0] if own else places)
    return keep_ranks(tokens, ranks, [[len(rank) for rank in row] for row in chosen], again)


def keep_ranks(tokens, ranks, sizes, again=False):
    """The same for ranks [k] among all visual tokens of a row, so many of each image."""
    stays, kept = tokens.text.clone(), []
    for row, places, own in zip(stays, tokens.places, ranks):
        kept.append(places.index_select(0, own.to(places.device)))
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
    if tokens.padding_unknown:
        valid = tokens.valid.gather(1, index)
    else:
        valid = None if min(lengths, default=0) == longest else stays.gather(1, index)
    text = tokens.text.gather(1, index) if again else None
    places = [row.index_select(0, own) for row, own in zip(source, kept)] if again else None
    left = Tokens(text, places, sizes, lengths, valid, tokens.padding_unknown)
    return Kept(index, source.clamp_(min=0), left, ranks)


def spans_from_counts(counts):
    """(first, last + 1) of groups of so many."""
    ends = list(itertools.accumulate(counts))
    return [(end - count, end) for count, end in zip(counts, ends)]


def spans_of_sizes(name, sizes):
    return [(name, first, last - first) for first, last in spans_from_counts(sizes)]
