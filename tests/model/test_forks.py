"""Processes that fork after loading a model, while other threads use it: in real processes."""

import sys

import pytest

PRELUDE = """
import json, multiprocessing, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
torch.set_num_threads(2)
from modeling_mtpf import MtpfModel

root = {root!r}
model = MtpfModel.from_pretrained(root + "/backbone").eval()
model.load_adapter(root + "/entities")
texts = ["Call Ada in Lisbon at 5pm"] * 8

def predict(name="entities"):
    (1 + torch.ones(1 << 20)).sum()  # takes both threads, as the batches of larger encoders do
    return model.predict(texts, adapters=[name])[name]

def forked(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # ends a child that hangs, also in native code
        try:
            os._exit(0 if work() else 3)
        finally:
            os._exit(4)
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

AFTER_USE = """
expected = predict()
threads = torch.get_num_threads()

def server():  # a worker that answers several requests at once
    with ThreadPoolExecutor(4) as pool:
        return all(future.result() == expected for future in [pool.submit(predict) for _ in range(8)])

def child():
    signal.alarm(60)
    sys.exit(0 if predict() == expected else 3)

results = [status(pid) for pid in [forked(lambda: predict() == expected), forked(server), forked(server)]]
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
results.append(process.exitcode)
results.append(0 if predict() == expected and torch.get_num_threads() == threads else 5)  # the parent continues
print(json.dumps(results))
"""

DURING_LOADING = """
old = predict()
model.load_adapter(root + "/other", adapter_name="entities", replace=True)
new = predict()
assert old != new
stop = threading.Event()

def load():
    while not stop.is_set():
        for folder in ("/entities", "/other"):
            model.load_adapter(root + folder, adapter_name="entities", replace=True)
            model.load_adapter(root + folder, adapter_name="more")
            model.delete_adapter("more")

def child():
    whole = predict() in (old, new)
    model.load_adapter(root + "/intent")
    return whole and len(predict("intent")) == len(texts)

thread = threading.Thread(target=load)
thread.start()
results = []
for number in range(8):
    stop.wait(0.003 * number)
    results.append(status(forked(child)))
stop.set()
thread.join()
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("code", [AFTER_USE, DURING_LOADING], ids=["after use", "during loading"])
def test_children_of_a_process_with_a_loaded_model_predict(code, folders, tmp_path, fresh_process):
    from modeling_mtpf import MtpfModel

    model = MtpfModel.from_pretrained(folders / "backbone")
    model.load_adapter(folders / "entities")
    for parameter in model.heads["entities"].parameters():
        parameter.data.neg_()
    root = tmp_path / "run"
    root.mkdir()
    for name in ("backbone", "entities", "intent"):
        (root / name).symlink_to(folders / name)
    model.save_adapter(root / "other", "entities")
    # Waiting threads sleep: workers of the tests have one core each, where spinning takes minutes.
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"}
    results = fresh_process(PRELUDE.format(root=str(root)) + code, **threads)
    assert set(results) == {0}, results
