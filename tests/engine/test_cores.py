"""OpenMP that would give wrong numbers or wait for ever is refused, in one line that says what to do."""

import pytest

from bivec import Encoder
from bivec.engine import cores as engine

AFTER_A_FORK = """
import json, os, signal, sys, torch
from bivec import Encoder
encoder = Encoder.from_pretrained(sys.argv[1], dtype="float32")
vector = encoder.encode("the quick brown fox" * 9)

def ask(question):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            found = question()
        except RuntimeError as error:
            found = str(error)
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    return json.loads(os.read(reading, 10000) or '"it hangs"')

def on_one_core():
    torch.set_num_threads(1)
    return (encoder.encode("the quick brown fox" * 9) == vector).all().item()

print(json.dumps([
    ask(lambda: encoder.encode("fox").tolist()),
    ask(lambda: Encoder.from_pretrained(sys.argv[1], dtype="float32").encode("fox").tolist()),
    ask(on_one_core),
]))
"""


def test_a_fork_of_a_process_with_threads_is_told_what_to_do(python, tiny_llama_folder):
    from_encode, from_load, on_one_core = python(AFTER_A_FORK, tiny_llama_folder, OMP_NUM_THREADS="2")
    assert "this process was forked from one that computes with OpenMP's threads" in from_encode
    assert "multiprocessing's spawn method, or call torch.set_num_threads(1)" in from_encode
    assert from_load == from_encode
    assert on_one_core is True


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OMP_DYNAMIC", "TRUE", "OMP_DYNAMIC must be false or unset, got true"),
        ("OMP_THREAD_LIMIT", "2", r"OMP_THREAD_LIMIT must be at least 4, the number of threads .*, got 2"),
    ],
)
def test_an_environment_in_which_products_come_out_wrong(
    tiny_llama_folder, monkeypatch, cores, variable, value, message
):
    monkeypatch.setattr(engine, "_process", None)
    monkeypatch.setenv(variable, value)
    cores(4)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tiny_llama_folder)
    cores(1)
    assert Encoder.from_pretrained(tiny_llama_folder).encode("fox").any()


@pytest.mark.parametrize(("variable", "value"), [("OMP_DYNAMIC", "false"), ("OMP_THREAD_LIMIT", "4")])
def test_the_same_variables_with_harmless_values(tiny_llama_folder, monkeypatch, cores, variable, value):
    monkeypatch.setattr(engine, "_process", None)
    monkeypatch.setenv(variable, value)
    cores(4)
    assert Encoder.from_pretrained(tiny_llama_folder).encode("fox").any()
