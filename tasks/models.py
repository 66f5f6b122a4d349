"""The models, whole and checked, on the host; and those before them off it again."""

from __future__ import annotations

from pyinfra.api import deploy
from pyinfra.operations import files

from tasks import probe as at
from tasks.llama_cpp import worker
from tasks.operations import made_model, model_file
from tasks.rules import model as model_rules
from tasks.rules.making import UPLOADS, WORK, Making
from tasks.rules.model import ModelFile, ModelPlan
from tasks.rules.plan import Plan
from tasks.settings import Settings


@deploy("Model")
def fetch(plan: Plan) -> None:
    """All files of the models that the settings name, each with the SHA-256 it should have."""
    if model_rules.missing(plan.models) or any(model.to_make for model in plan.models):
        worker(at.WORKER_USER)
        files.directory(name="Make the model store", path=at.STATE, mode="755")
        files.directory(
            name="Make the download folder",
            path=at.INCOMING,
            user=at.WORKER_USER,
            group=at.WORKER_USER,
            mode="755",
        )
    begun: set[str | None] = set()
    for model in plan.models:
        if model.making is not None:
            _make(plan, model, model.making)
            continue
        missing = tuple(file for file in model.missing if file.sha256 not in begun)
        begun |= {file.sha256 for file in missing}
        _fetch(model, missing, plan.settings)


def _make(plan: Plan, model: ModelPlan, making: Making) -> None:
    """Bring what it is made from, and make it; what was brought is gone afterwards."""
    build, settings, missing = plan.build, plan.settings, model.missing
    if not model.to_make or build is None:
        return
    if making.converts and not making.worked:
        # First: it knows whether it can convert the model before that is downloaded.
        _converter(plan, making)
    fetched = tuple(file for file in missing if file.url)
    copied = tuple(file for file in missing if file.original)
    if fetched:
        model_file.fetched(
            name=f"Fetch what {model.name} is made from",
            files=fetched,
            from_hub=any(each.url and settings.hf_endpoint in each.url for each in fetched),
            settings=settings,
        )
    if copied:
        model_file.copied(name=f"Copy what {model.name} is made from", files=copied, folder=UPLOADS)
    made_model.made(name=f"Make {model.name}", model=model, build=build, settings=settings)


def _fetch(model: ModelPlan, missing: tuple[ModelFile, ...], settings: Settings) -> None:
    if model.stored:
        return
    if model.on_host:
        model_file.verified(name=f"Check {model.name}", model=model, settings=settings)
        return
    if any(file.url for file in missing):
        from_hub = model.hub is not None
        model_file.fetched(
            name=f"Fetch {model.name}", files=missing, from_hub=from_hub, settings=settings
        )
    if any(file.original for file in missing):
        model_file.copied(name=f"Copy {model.name}", files=missing)
    model_file.stored(name=f"Store {model.name}", model=model)


def _converter(plan: Plan, making: Making) -> None:
    """What converts, and knows what it can."""
    assert plan.build is not None
    files.put(
        name="Write the converter's requirements",
        src=str(made_model.LOCK),
        dest=made_model.LOCK_ON_HOST,
        user="root",
        group="root",
        mode="644",
        create_remote_dir=True,
    )
    files.directory(name="Make the cache folder", path=at.CACHE, mode="755")
    files.directory(
        name="Make the converter's folder",
        path=WORK,
        user=at.WORKER_USER,
        group=at.WORKER_USER,
        mode="755",
    )
    made_model.prepared(
        name="Prepare the conversion", making=making, build=plan.build, settings=plan.settings
    )


@deploy("Clean up")
def clean(plan: Plan) -> None:
    """Models that nobody wants to go back to are removed, now that the wanted ones serve."""
    for instance in plan.instances:
        runs = instance.server is not None and instance.server.converged
        for model in instance.model.everything if instance.model else ():
            if model.record is not None and not (model.has_served and runs):
                model_file.served(name=f"Note that {model.name} serves", model=model)
    if plan.removal:
        model_file.removed(name="Remove models of before", removal=plan.removal)
