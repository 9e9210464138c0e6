"""LLM2Vec's models give the vectors that LLM2Vec's own code gives, which `llm2vec_vectors.py` has run."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from bivec import Encoder

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "llm2vec_vectors.json").read_text())

# the tests are no package, so what stands beside them is loaded by its path
_specification = importlib.util.spec_from_file_location("llm2vec_vectors", HERE / "llm2vec_vectors.py")
reference = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(reference)


@pytest.mark.parametrize("stage", reference.STAGES)
@pytest.mark.parametrize("stack", reference.BASES)
def test_the_vectors_are_llm2vecs_own(tmp_path, stack, stage):
    reference.write_stack(tmp_path, stack)
    encoder = Encoder.from_pretrained(tmp_path / f"{stack}-{stage}", dtype="float32", device="cpu")
    for instruction in ("", reference.INSTRUCTION):
        expected = np.array(VECTORS[f"{stack}-{stage} {instruction}".strip()])
        found = encoder.encode([[instruction, text] for text in reference.TEXTS])
        assert np.linalg.norm(found - expected, axis=1).max() < 1e-5 * np.linalg.norm(expected, axis=1).min()
