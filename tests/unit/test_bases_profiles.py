"""The profiles of published bases, on small models of their families: two steps, stopped and gone on with, a second
stage on top, evaluated and asked through the server's engine. One always, both under `make test-families`."""

import asyncio
import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest

from facemllm import settings
from facemllm.annotate.annotator import caption
from facemllm.core import digests
from facemllm.evaluate.run import evaluate
from facemllm.ingest.run import RENDER, ingest
from facemllm.model.inference import Predictor, Query
from facemllm.reformat.run import reformat
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.protocol import Prepared
from facemllm.tables import FACES, TableWriter, open_table
from facemllm.train.stage import prepare_run
from facemllm.train.worker import train_worker
from tests.families import SIDES, missing, small

OTHERWISE = ["train.use_gpu=false", "train.precision=fp32", "train.threads=1", "train.checkpoint_every=1"]
OTHERWISE += ["evaluate.bootstrap=100", "evaluate.generated_faces=1", "evaluate.disturbed_faces=1"]
OTHERWISE += ["ingest.identities=10", "ingest.images_per_identity=1", "ingest.test_share=0.3", "ingest.image_size=64"]
OTHERWISE += ["ingest.workers=1", "evaluate.max_new_tokens=4"]
PROFILES = [("qwen-vl-3b", "qwen2_5_vl"), pytest.param("smolvlm-500m", "smolvlm", marks=pytest.mark.families)]


def conversations(chosen, folder):
    """What is asked about a few drawn heads."""
    ingest(chosen, folder / "bare", [RENDER])
    with TableWriter(folder / "faces", FACES) as writer:
        for batch in open_table(folder / "bare", FACES).batches():
            writer.write(row | {"caption": caption(row)} for row in pa.RecordBatch.to_pylist(batch))
    reformat(chosen, folder / "faces", folder / "conversations")
    return folder / "conversations"


@pytest.mark.parametrize(("profile", "family"), PROFILES)
def test_a_profile_trains_goes_on_and_answers(profile, family, tmp_path):
    if package := missing(family):
        pytest.skip(f"its processor needs {package}")
    base, side = small(family, tmp_path / "base"), SIDES[family]
    few = [f"train.stages.{name}.{key}" for name in ("align", "instruct") for key in ("steps=2", "batch_images=2")]
    sets = [f"model.base={json.dumps(str(base))}", f"model.image_size={side}", *OTHERWISE, *few]
    chosen = settings.load(profile, sets)
    table, whole, tuned = conversations(chosen, tmp_path), tmp_path / "whole", tmp_path / "tuned"

    def trained(stage, before, out, work, on_log=None):
        run = prepare_run(stage, chosen, table, before, out, tmp_path / work, tmp_path / "cache")
        return train_worker(run, on_log)

    def stop(step, metrics):
        raise KeyboardInterrupt

    trained("align", None, whole, "work")
    with suppress(KeyboardInterrupt):
        trained("align", None, tmp_path / "aligned", "stopped", stop)
    assert trained("align", None, tmp_path / "aligned", "stopped").resumed_from == 1
    assert digests.of_tree(tmp_path / "aligned") == digests.of_tree(whole)
    trained("instruct", whole, tuned, "next")
    assert (tuned / "adapter" / "adapter_model.safetensors").exists()

    found = evaluate(chosen, tuned, "digest", table, tmp_path / "evaluation")
    assert set(found["tasks"]) >= {"attributes", "head_pose", "caption"}
    predictor = Predictor.load(tuned, threads=1)
    assert predictor.prepared == (side, side, 3)
    picture = np.random.default_rng(0).integers(0, 255, predictor.prepared, np.uint8)
    query, engine = Query("Is the person wearing a hat?", ("yes", "no")), OwnEngine(predictor, max_new_tokens=4)
    answered = asyncio.run(engine.answer(Prepared(picture, None, ("face",)), [query], [[("user", "Age?")]]))
    engine.close()
    assert answered.scored[0].probabilities == pytest.approx(predictor.score([picture], [[query]])[0][0].probabilities)
    assert answered.texts == (predictor.generate(picture, "Age?", 4),)
