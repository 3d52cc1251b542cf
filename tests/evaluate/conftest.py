"""One tiny checkpoint for all that answers benchmarks, so that its programs compile once."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def answering(tmp_path_factory) -> Path:
    """A random LLaVA whose answers are short: many tokens end them. Its context is a usual one."""
    from tests.hf_models import write_llava

    path = tmp_path_factory.mktemp("answering") / "model"
    write_llava(path, "llava")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (path / "config.json").write_text(json.dumps(config))
    stops = {"eos_token_id": list(range(2, 320, 7))}
    (path / "generation_config.json").write_text(json.dumps(stops))
    return path
