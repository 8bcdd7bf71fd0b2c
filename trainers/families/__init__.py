"""Families of vision-language models, one module each; `FAMILIES` maps a checkpoint's model type to its class."""

from trainers.families.base import Family, Grid, Prepared
from trainers.families.llava import Llava

FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in (Llava,)}

__all__ = ["FAMILIES", "Family", "Grid", "Prepared"]
