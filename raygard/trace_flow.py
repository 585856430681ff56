"""Traces of a release: the publisher's own users of every class it knows, and of handfuls of general pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

from raygard.adaptation.prompts import renamed
from raygard.cluster.traces import TraceUser, run_users
from raygard.diffusion.cache import LatentSet, load_cache
from raygard.diffusion.model import load_denoiser
from raygard.errors import RaygardError
from raygard.files import write_text
from raygard.flow import Flow
from raygard.mask import FreezeMask
from raygard.traces import Sketcher, Traces, handful, share_of_pictures, steps_of
from raygard.traces.artifact import new_secret, release_fingerprint
from raygard.values.names import pseudoword

SECRET = "secret"


class TraceFlow(Flow):
    """One set of traces in one run directory, as `traces/`."""

    def trace(self, runs: int, handfuls: int, mask: Path | None = None) -> Traces:
        """Train the users (what is finished is not trained again), and save what they left as `traces/`.

        Traces of other arguments in the same directory are replaced.

        runs: users of each illegal and legal class, on halves of its pictures in turn; every second under a name that
        means nothing, half of them for half the steps. handfuls: sets of as many general pictures, two users each, so
        that what every fine-tuning does is known. mask: one whose values the release carries.
        Raises RaygardError for too few of them, or if the domain has no general classes.
        """
        if runs < 2 or handfuls < 2:
            raise RaygardError("traces need at least two users of each class and two handfuls of general pictures")
        domain = self.config.domain
        if not domain.general:
            raise RaygardError("traces need general pictures to compare with; name some classes in domain.general")
        released = FreezeMask.load(mask) if mask is not None else None
        target = self.dir / "traces"
        cache = self._cache("traces", [*self.domain.learn_parts, *self.domain.general_parts])
        inputs = {**self._inputs("adapt"), "cache": cache.name, "runs": runs, "handfuls": handfuls}
        inputs |= {"mask": released.sha256 if released is not None else None}
        with self.parent, self.dir.stage("trace", inputs) as (folder, done):
            if not done or not target.exists():
                denoiser = load_denoiser(self.config.model)
                if released is not None:
                    released.apply(denoiser)
                release = {name: tensor.detach() for name, tensor in denoiser.named_parameters()}
                sketcher = Sketcher(_secret(folder))
                users = self._users(load_cache(cache), runs, handfuls)
                with self.progress.bar("the publisher's own users", len(users)) as bar:
                    references = run_users(
                        self.config,
                        users,
                        cache,
                        mask.resolve() if mask is not None else None,
                        sketcher,
                        folder,
                        on_done=lambda user: bar.advance(1, user.cls),
                    )
                found = Traces(
                    base_model=self.config.model.pretrained_model_name_or_path,
                    fingerprint=release_fingerprint(release),
                    domain=domain.name,
                    shapes={name: tuple(tensor.shape) for name, tensor in release.items()},
                    sketcher=sketcher,
                    references=references,
                )
                if target.exists():
                    shutil.rmtree(target)
                found.save(target)
        return Traces.load(target)

    def _users(self, data: LatentSet, runs: int, handfuls: int) -> list[TraceUser]:
        config, steps = self.config, self.config.adapt.max_train_steps
        named = config.adapt.learn_as is None and config.adapt.instance_prompt is None
        users: list[TraceUser] = []
        sizes = []
        for role in ("illegal", "legal"):
            for cls in getattr(config.domain, role):
                rows = data.rows(cls).tolist()
                sizes.append(len(rows))
                renamable = named and all(renamed(data.captions[row], cls, "") is not None for row in rows)
                for run in range(runs):
                    own, group = share_of_pictures(rows, run)
                    word = pseudoword(config.seed, cls, run) if renamable and run % 2 else None
                    # Equal seeds would draw equal noise, which makes updates alike that have nothing else in common.
                    seed = config.seed + 1000 + len(users)
                    long = steps_of(steps, run)
                    users.append(TraceUser(cls, role == "illegal", tuple(own), word, long, seed, group))
        general = [found for cls in config.domain.general if len(found := data.rows(cls))]
        for number in range(handfuls):
            known = general[number % len(general)]
            chosen = tuple(handful(known, min(sizes), config.seed, number).tolist())
            for _ in range(2):
                seed = config.seed + 1000 + len(users)
                users.append(TraceUser(f"handful {number}", False, chosen, None, steps, seed))
        return users


def _secret(folder: Path) -> bytes:
    """The secret of this stage's sketches: kept beside them, so that a stage that was cut off goes on with it."""
    file = folder / SECRET
    if not file.exists():
        folder.chmod(0o700)
        write_text(file, new_secret().hex())
    return bytes.fromhex(file.read_text(encoding="utf-8"))
