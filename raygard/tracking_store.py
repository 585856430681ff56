"""Two questions to an MLflow store: does it answer, and where is a run to be seen."""

from __future__ import annotations

import os
from pathlib import Path

from raygard.redaction import redact


def store_trouble(uri: str) -> str | None:
    """Why the MLflow store at `uri` cannot be used from here, in one line without credentials; None if it can.

    Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as MLflow reads them.
    """
    from raygard.tracking import ENVIRONMENT

    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        return redact(str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]
    return None


def run_address(uri: str | None, database: Path, experiment_id: str, run_id: str) -> str:
    """A run's page on an MLflow server; of a store without pages, the store and the run's id.

    uri: without credentials; None for the sqlite store `database` of a run directory.
    """
    if uri is not None and uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{uri or f'sqlite:///{database}'} (run {run_id})"
