"""The bytes of a registered model in MLflow: up and down."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.tracking.client import uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLMODEL = "MLmodel"


def upload(client: MlflowClient, model_id: str, folder: Path) -> None:
    """Log a model's files, and the `MLmodel` file in which MLflow's pages look for a signature: no flavour, no code."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    columns = {"image": "binary", "question": "string"}
    signature = ModelSignature(
        inputs=Schema([ColSpec(kind, name) for name, kind in columns.items()]),
        outputs=Schema([ColSpec("string", "answer"), ColSpec("string", "value", required=False)]),
    )
    client.log_model_artifacts(model_id, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        Model(signature=signature, model_id=model_id).save(f"{scratch}/{MLMODEL}")
        client.log_model_artifact(model_id, f"{scratch}/{MLMODEL}")


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
