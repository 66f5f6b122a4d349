"""The model, whole and checked, on the host; and those before it off it again."""

from __future__ import annotations

from pyinfra.api import deploy
from pyinfra.operations import files

from tasks import probe as at
from tasks.llama_cpp import worker
from tasks.operations import model_file
from tasks.rules.plan import Plan


@deploy("Model")
def fetch(plan: Plan) -> None:
    """All files of the model that the settings name, each with the SHA-256 that it should have."""
    model = plan.model
    if model is None:
        return
    if model.on_host:
        if not model.stored:
            model_file.verified(name=f"Check {model.name}", model=model, settings=plan.settings)
        return
    if model.missing:
        worker(at.WORKER_USER)
        files.directory(name="Make the model store", path=at.STATE, mode="755")
        files.directory(
            name="Make the download folder",
            path=at.INCOMING,
            user=at.WORKER_USER,
            group=at.WORKER_USER,
            mode="755",
        )
    if any(file.url for file in model.missing):
        model_file.fetched(name=f"Fetch {model.name}", model=model, settings=plan.settings)
    if any(file.original for file in model.missing):
        model_file.copied(name=f"Copy {model.name}", model=model)
    if not model.stored:
        model_file.stored(name=f"Store {model.name}", model=model)


@deploy("Clean up")
def clean(plan: Plan) -> None:
    """Models that nobody wants to go back to are removed, now that the wanted one serves."""
    model = plan.model
    if model is None or model.record is None:
        return
    if not (model.has_served and plan.server and plan.server.converged):
        model_file.served(name=f"Note that {model.name} serves", model=model)
    if model.removal:
        model_file.removed(name="Remove models of before", removal=model.removal)
