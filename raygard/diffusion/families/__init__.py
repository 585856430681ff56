"""Model families: what differs between Stable Diffusion, SDXL, SD3 and Flux. One file and one line here for each."""

from __future__ import annotations

from raygard.diffusion.families.base import Family, LossSettings
from raygard.diffusion.families.flux import Flux
from raygard.diffusion.families.sd3 import StableDiffusion3
from raygard.diffusion.families.sdxl import SDXL
from raygard.diffusion.families.stable_diffusion import StableDiffusion
from raygard.errors import RaygardError

__all__ = ["FAMILIES", "Family", "LossSettings", "StableDiffusion", "denoiser_folder", "family_of_pipeline", "register"]

# By the class in model_index.json.
FAMILIES: dict[str, Family] = {}
# Pipelines of the same models that begin with a picture or a part of one; their denoisers may take other inputs.
OTHER_TASKS = ("Img2Img", "Inpaint", "ControlNet", "Fill", "Kontext", "Upscale", "Pix2Pix", "Depth")


def register(family: Family) -> None:
    """Add a family. Raises RaygardError if its pipeline has one."""
    if family.pipeline in FAMILIES:
        raise RaygardError(f"family of {family.pipeline} is registered twice")
    FAMILIES[family.pipeline] = family


def family_of_pipeline(name: object, where: object) -> Family:
    """The family that diffusers' pipeline class `name` belongs to. Raises RaygardError that says what `where` holds."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    task = isinstance(name, str) and any(word in name for word in OTHER_TASKS)
    mend = "; convert it to the text-to-image pipeline of its family" if task else ""
    raise RaygardError(f"{where} holds a {name}; raygard reads {', '.join(FAMILIES)}{mend}")


def denoiser_folder(denoiser: object) -> str:
    """Sub-folder and pipeline attribute of a denoiser of a known family. Raises RaygardError for another module."""
    name = type(denoiser).__name__
    for family in FAMILIES.values():
        if family.denoiser_class == name:
            return family.denoiser
    raise RaygardError(f"a {name} is the denoiser of no family that raygard knows")


register(StableDiffusion())
register(SDXL())
register(StableDiffusion3())
register(Flux())
