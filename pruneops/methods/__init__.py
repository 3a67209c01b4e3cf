"""Methods that choose visual tokens, over the operators: settings (JSON) and pure functions, no model.

Each prunes an image after the projector (`select`) or a prompt at the input of decoder layers (`at_layer`); ToDRE
does both.
"""

from .base import Image, Method, Row, Step, from_json
from .dart import DART, dart_budget, dart_select
from .divprune import DivPrune, divprune_select, divprune_start
from .dtr import DTR, dtr_logits, dtr_ranked, dtr_select
from .dyrate import DyRate, dyrate_compact_, dyrate_distribution, dyrate_keep
from .fastervlm import FasterVLM, cls_attention, fastervlm_select, mean_attention
from .fastv import FastV, fastv_scores, fastv_select
from .random import Random, random_select
from .selector import Selector, selector_mask, selector_scores
from .todre import ToDRE, todre_pivot, todre_ratios, todre_select, todre_select_varlen
from .uniform import Uniform, uniform_select
from .vtw import VTW, vtw_layer

__all__ = [
    "DART",
    "DTR",
    "VTW",
    "DivPrune",
    "DyRate",
    "FastV",
    "FasterVLM",
    "Image",
    "Method",
    "Random",
    "Row",
    "Selector",
    "Step",
    "ToDRE",
    "Uniform",
    "cls_attention",
    "dart_budget",
    "dart_select",
    "divprune_select",
    "divprune_start",
    "dtr_logits",
    "dtr_ranked",
    "dtr_select",
    "dyrate_compact_",
    "dyrate_distribution",
    "dyrate_keep",
    "fastervlm_select",
    "fastv_scores",
    "fastv_select",
    "from_json",
    "mean_attention",
    "random_select",
    "selector_mask",
    "selector_scores",
    "todre_pivot",
    "todre_ratios",
    "todre_select",
    "todre_select_varlen",
    "uniform_select",
    "vtw_layer",
]
