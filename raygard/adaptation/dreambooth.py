"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): a rare word for the subject, and its class kept in mind."""

from __future__ import annotations

from raygard.adaptation.task import Adaptation, Task
from raygard.adaptation.training import AdaptResult


@Adaptation
def dreambooth(task: Task) -> AdaptResult:
    """Fine-tune every tensor of the denoiser that is not frozen on the class's pictures under a rare word.

    With `config.class_prompt`, pictures that the release draws for it are learned along (prior preservation).
    Raises RaygardError also without `release`.
    """
    prior = task.prior(task.release.embed)
    return task.train(task.learned(), prior=prior)
