"""Methods that choose visual tokens, over the operators: settings (JSON) and pure functions, no model.

Each prunes an image after the projector (`select`) or a prompt at the input of decoder layers (`at_layer`); ToDRE
does both.
"""

from .base import Image, Method, Row, from_json
from .dart import DART, dart_budget, dart_select
from .divprune import DivPrune, divprune_select, divprune_start
from .fastervlm import FasterVLM, cls_attention, fastervlm_select, mean_attention
from .fastv import FastV, fastv_scores, fastv_select
from .random import Random, random_select
from .todre import ToDRE, todre_pivot, todre_ratios, todre_select, todre_select_varlen
from .uniform import Uniform, uniform_select
from .vtw import VTW, vtw_layer

__all__ = [
    "DART",
    "VTW",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Image",
    "Method",
    "Random",
    "Row",
    "ToDRE",
    "Uniform",
    "cls_attention",
    "dart_budget",
    "dart_select",
    "divprune_select",
    "divprune_start",
    "fastervlm_select",
    "fastv_scores",
    "fastv_select",
    "from_json",
    "mean_attention",
    "random_select",
    "todre_pivot",
    "todre_ratios",
    "todre_select",
    "todre_select_varlen",
    "uniform_select",
    "vtw_layer",
]
