"""Families of vision-language models, one module each; `FAMILIES` maps a checkpoint's model type to its class."""

from trainers.families.base import Family, Grid, Prepared
from trainers.families.idefics3 import Idefics3, SmolVlm
from trainers.families.llava import Llava
from trainers.families.paligemma import PaliGemma
from trainers.families.qwen2_vl import Qwen2Vl, Qwen25Vl
from trainers.families.qwen3_vl import Qwen3Vl, Qwen3VlMoe
from trainers.families.scattered import Scattered

FAMILIES: dict[str, type[Family]] = {
    family.model_type: family
    for family in (Llava, Idefics3, SmolVlm, PaliGemma, Qwen2Vl, Qwen25Vl, Qwen3Vl, Qwen3VlMoe)
}

__all__ = ["FAMILIES", "Family", "Grid", "Prepared", "Scattered"]
