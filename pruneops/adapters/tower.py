"""What methods may know of images beside their features."""

import functools
import inspect
import itertools

import torch

from ..methods import cls_attention

# Families whose `get_image_features` gives one tensor an image; that of others may give one a tile.
ONE_EACH = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


class Tower:
    """What methods may know of images beside their features: attention from [CLS], where a CLIP tower has one.

    The queries and keys of the tower's last layer, and how many tokens each image has, are remembered from its last
    run.
    """

    def __init__(self, model):
        self.model, self.image_sizes, self.lengths, self.seen, self.hooks = model, None, [], {}, []
        config = getattr(model.config, "vision_config", None)
        self.has_cls = getattr(config, "model_type", None) == "clip_vision_model"
        if self.has_cls:
            attention = [m for name, m in model.named_modules() if "vision_tower" in name and hasattr(m, "q_proj")][-1]
            self.heads = config.num_attention_heads
            for name in ("q_proj", "k_proj"):
                self.hooks.append(getattr(attention, name).register_forward_hook(self._remember(name)))
        self.base = model.base_model if model.config.model_type in ONE_EACH else None
        if self.base is not None:  # only this method of the model is told which tiles and which features are whose
            encode = self.base.get_image_features

            @functools.wraps(encode)
            def get_image_features(*args, **kwargs):
                self.image_sizes = inspect.signature(encode).bind(*args, **kwargs).arguments.get("image_sizes")
                encoded = encode(*args, **kwargs)
                features = getattr(encoded, "pooler_output", None)
                self.lengths = [] if features is None else [len(own) for own in features]
                return encoded

            self.base.get_image_features = get_image_features

    def forget(self):
        """Take all hooks away."""
        for hook in self.hooks:
            hook.remove()
        self.seen.clear()
        if self.base is not None:
            vars(self.base).pop("get_image_features", None)
            self.base = None

    def _remember(self, name):
        def hook(module, args, output):
            self.seen[name] = output.detach()

        return hook

    def cut(self, rows):
        """Runs [(first, last + 1), ..] of visual tokens of every row, cut where one image follows another directly."""
        lengths, self.lengths = self.lengths, []
        tokens, total = sum(end - first for row in rows for first, end in row), sum(lengths)
        if not total or tokens % total or not all(lengths):
            return rows
        copies, images, begin, at = tokens // total, [], 0, 0
        for b, row in enumerate(rows):
            if b % copies:  # a beam of the row before
                at = begin
            begin, own = at, []
            for first, end in row:
                while first < end:
                    if at == len(lengths) or first + lengths[at] > end:
                        return rows
                    own.append((first, first + lengths[at]))
                    first, at = first + lengths[at], at + 1
            images.append(own)
        return images

    def images(self, sizes):
        """For every row and image a dictionary of `Image`'s optional fields; sizes: tokens of each."""
        if not self.has_cls or len(self.seen) < 2:
            return [[{} for _ in row] for row in sizes]
        query, key = (
            self.seen.pop(name).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj")
        )
        attention = cls_attention(query, key)  # [tiles, n]
        tiles, total = self._tiles(), sum(map(len, sizes))
        if tiles is None:
            tiles = [1] * len(attention)
        copies = total // len(tiles) if len(tiles) and total % len(tiles) == 0 else 0  # beams of one prompt
        if not copies or sum(tiles) != len(attention):
            return [[{} for _ in row] for row in sizes]
        starts = [end - count for end, count in zip(itertools.accumulate(tiles), tiles)]
        fields, image = [], 0
        for b, row in enumerate(sizes):
            if b % copies == 0:
                own = [self._image(attention[starts[image + j]], size) for j, size in enumerate(row)]
                image += len(row)
            fields.append(own)
        return fields

    def _image(self, attention, size):
        """AnyRes: the first tile is the thumbnail, whose tokens come first; the others' attention is not used."""
        n = len(attention)
        if size == n + 1 and self.model.config.vision_feature_select_strategy == "full":
            return {"cls_attention": torch.nn.functional.pad(attention, (1, 0))}
        if size == n:
            return {"cls_attention": attention}
        return {"cls_attention": torch.nn.functional.pad(attention, (0, size - n)), "thumbnail": (0, n)}

    def _tiles(self):
        """Tiles of every image, None where each image is one."""
        if self.model.config.model_type != "llava_next" or self.image_sizes is None:
            return None
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in self.image_sizes]
