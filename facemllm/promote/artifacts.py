"""The bytes of a registered model in MLflow: up and down."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from facemllm.core import progress
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.tracking.client import uri, wait_for

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLMODEL = "MLmodel"
ATTEMPTS = 3
"""At each file: MLflow's client sends the parts of a large one to S3 itself, and tries none of them again."""


def upload(client: MlflowClient, model_id: str, folder: Path) -> None:
    """Log a model's files, and the `MLmodel` file in which MLflow's pages look for a signature: no flavour, no code."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    columns = {"image": "binary", "question": "string"}
    signature = ModelSignature(
        inputs=Schema([ColSpec(kind, name) for name, kind in columns.items()]),
        outputs=Schema([ColSpec("string", "answer"), ColSpec("string", "value", required=False)]),
    )
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _upload(client, model_id, file, file.relative_to(folder).parent)
    with tempfile.TemporaryDirectory() as scratch:
        Model(signature=signature, model_id=model_id).save(f"{scratch}/{MLMODEL}")
        client.log_model_artifact(model_id, f"{scratch}/{MLMODEL}")


def _upload(client: MlflowClient, model_id: str, file: Path, into: Path) -> None:
    from mlflow.exceptions import MlflowException

    for attempt in range(1, ATTEMPTS + 1):
        try:
            client.log_model_artifact(model_id, str(file), None if into == Path() else into.as_posix())
            return
        except MlflowException as error:  # what the server refused has another code
            if attempt == ATTEMPTS or error.error_code != "INTERNAL_ERROR":
                raise
            progress.event(note=f"{file.name} did not reach MLflow's store ({one_line(error, 200)}); sending it again")
            wait_for(client.tracking_uri)


def download(settings: Settings, client: MlflowClient, model_id: str, into: Path) -> Path:
    """Download a LoggedModel's files, without `MLmodel`, and return the folder they are in."""
    from mlflow.artifacts import download_artifacts

    # by its location: a `models:/` address would be looked up on mlflow's global server, not on this one
    location = client.get_logged_model(model_id).artifact_location
    folder = into / "model"
    folder.mkdir()
    try:
        found = Path(download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=uri(settings)))
    except (ValueError, OSError) as error:  # whoever wrote to MLflow chose the location
        raise UserError(f"MLflow keeps the files of {model_id} at {location!r}: {one_line(error)}") from None
    (found / MLMODEL).unlink(missing_ok=True)
    return found
