"""Many apps in one model: threads, adding and removing while it runs, memory."""

import gc
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from conftest import assert_close, randomize

from modeling_mtpf import AdapterError, AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.model import adapters_mtpf
from modeling_mtpf.model.adapters_mtpf import inject_lora, lora_config
from modeling_mtpf.model.backbone_identity_mtpf import backbone_sha256, bits_digest
from modeling_mtpf.model.trunk_mtpf import lora_modules, run_layers, run_trunk, tail_views

TEXTS = ["Ada met Noor in London.", "Hi", "can you remind me to buy 3 tickets?", "café 東京 🙂 " * 12]


@pytest.fixture
def model(folders):
    """The backbone of `folders` with its two apps."""
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name in ("entities", "intent"):
        model.load_adapter(folders / name)
    return model


@pytest.fixture(scope="session")
def sixteen(folders, tmp_path_factory):
    """Folders of 16 apps of different weights, kinds and depths."""
    root = tmp_path_factory.mktemp("apps")
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for number in range(16):
        name = f"app-{number}"
        model.add_adapter(name, LoraSettings(r=2, layers=1 + number % 3))
        randomize(model, number, 0.3, within=f".{name}.")
        kind = ("token-classification", "text-classification")[number % 2]
        torch.manual_seed(number)
        model.heads[name] = AdapterHead(kind, ["O", "B-A", "I-A"], 32, 16 + number)
        with torch.no_grad():
            model.heads[name].weight.mul_(6)
        model.save_adapter(root / name, name)
    return root


@pytest.mark.slow
def test_sixteen_threads_with_different_apps_give_what_one_gives(folders, sixteen):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    names = [model.load_adapter(sixteen / f"app-{number}") for number in range(16)]
    pairs = [[name, names[(number + 5) % 16]] for number, name in enumerate(names)]

    def both(number: int) -> tuple:
        mixed = [pairs[number][row % 2] for row in range(len(TEXTS))]
        return model.predict(TEXTS, adapters=pairs[number]), model.predict(TEXTS, adapter_names=mixed)

    expected = [both(number) for number in range(16)]
    assert len({str(result) for result in expected}) >= 14
    model.train()  # neither dropout nor another thread's mode may be seen
    together = threading.Barrier(16)

    def work(number: int) -> bool:
        together.wait()
        return all(both(number) == expected[number] for _ in range(6))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    assert all(module.training for module in model.modules())


class _Watcher:
    """Predicts again and again with two apps that stay and one that comes and goes."""

    def __init__(self, model, expected, guests):
        self.model, self.expected, self.guests = model, expected, guests
        self.stop, self.failures, self.seen = threading.Event(), [], [0, 0]

    def run(self) -> None:
        while not self.stop.is_set() and not self.failures:
            try:
                self.look()
            except BaseException as error:  # noqa: BLE001
                self.failures.append(error)

    def look(self) -> None:
        assert self.model.predict(TEXTS, adapters=["entities", "intent"]) == self.expected, "others changed"
        try:
            guest = self.model.predict(TEXTS, adapters=["guest"])["guest"]
        except AdapterError as error:
            assert "no adapter 'guest'" in str(error)
            self.seen[1] += 1
        else:
            assert guest in self.guests, "half an app"
            self.seen[0] += 1


def test_apps_come_go_and_change_while_others_predict(model, folders, sixteen):
    expected = model.predict(TEXTS, adapters=["entities", "intent"])
    swapped = {}
    for number in (1, 3):
        model.load_adapter(sixteen / f"app-{number}", adapter_name="guest")
        swapped[number] = model.predict(TEXTS, adapters=["guest"])["guest"]
        model.delete_adapter("guest")
    watcher = _Watcher(model, expected, list(swapped.values()))
    threads = [threading.Thread(target=watcher.run) for _ in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    for round_ in range(200):
        model.load_adapter(sixteen / "app-1", adapter_name="guest")
        model.load_adapter(sixteen / "app-3", adapter_name="guest", replace=True)
        if round_ % 3 == 0:
            time.sleep(0.01)
        model.delete_adapter("guest")
        if (round_ >= 25 and min(watcher.seen) > 3) or time.monotonic() > until:
            break
    watcher.stop.set()
    for thread in threads:
        thread.join()
    assert watcher.failures == [] and min(watcher.seen) > 0, watcher.seen
    assert model.predict(TEXTS, adapters=["entities", "intent"]) == expected


@pytest.mark.parametrize("training", [False, True])
def test_tails_that_were_taken_outlive_the_adapter(model, batch, training):
    """With gradients, too: another thread may delete an adapter while the trunk runs."""
    model.train(training)
    inputs = batch("bert")
    with torch.no_grad():
        trunk = run_trunk(model.backbone, 2, **inputs)
        layers = tail_views(model.backbone, 2, "entities")
        torch.manual_seed(0)
        expected = run_layers(model.backbone, trunk, layers)
        model.delete_adapter("entities")
        torch.manual_seed(0)
        states = run_layers(model.backbone, trunk, layers)
        torch.manual_seed(0)
        bare = run_layers(model.backbone, trunk, tail_views(model.backbone, 2, None))
    assert torch.equal(states, expected) and not torch.allclose(states, bare, atol=1e-3)


def test_several_threads_load_and_delete(model, sixteen):
    failures = []

    def work(number: int) -> None:
        try:
            for _ in range(25):
                model.load_adapter(sixteen / f"app-{number}", adapter_name=f"guest-{number}")
                model.delete_adapter(f"guest-{number}")
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


@pytest.mark.parametrize("change", ["rows", "element"])
def test_a_digest_of_weights_sees_changes(change):
    weight = torch.randn(6, 8)
    other = weight.flip(0) if change == "rows" else weight.clone()
    if change == "element":
        other[2, 3] += 1e-7
    assert bits_digest(weight) == bits_digest(weight.clone()) != bits_digest(other)
    assert bits_digest(weight[:, 0]) != bits_digest(other[:, 1])


def test_a_stream_keeps_the_app_that_it_began_with(model, sixteen):
    expected = model.predict(TEXTS, adapters=["entities"])["entities"]
    stream = model.predict_stream(iter(TEXTS), ["entities"], portion=1)
    results = [next(stream)["entities"]]
    model.load_adapter(sixteen / "app-0", adapter_name="entities", replace=True)
    results.append(next(stream)["entities"])
    model.delete_adapter("entities")
    results += [row["entities"] for row in stream]
    assert_close(results, expected)


def test_adding_leaves_the_others_bit_for_bit(model, sixteen, batch):
    inputs = batch("bert")
    with torch.no_grad():
        before = model.encode_adapters(["entities", "intent", None], **inputs)
        for number in range(4):  # depths 1, 2, 3: layers with and without LoRA before
            model.load_adapter(sixteen / f"app-{number}")
            after = model.encode_adapters(["entities", "intent", None], **inputs)
            assert all(torch.equal(before[name], after[name]) for name in before)
        with model.use_adapter("entities"):
            assert torch.equal(model(**inputs)[0], before["entities"])
        for number in range(4):
            model.delete_adapter(f"app-{number}")
        after = model.encode_adapters(["entities", "intent", None], **inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.adapters == ["entities", "intent"]


def test_adding_to_layers_with_lora_gives_what_peft_gives(folders, sixteen, batch):
    """The short way, used from the second adapter on, and PEFT's own way, used for the first."""
    inputs, states, gradients = batch("bert"), [], []
    for first in ("app-3", "app-2", None):
        model = MtpfModel.from_pretrained(folders / "backbone").eval()
        if first:
            model.load_adapter(sixteen / first)
        model.load_adapter(sixteen / "app-1", trainable=True)
        with torch.no_grad():
            states.append(model.encode_adapters(["app-1"], **inputs)["app-1"])
        gradients.append({n for n, p in model.named_parameters() if p.requires_grad and "lora" in n})
        assert all(not module.training for module in model.backbone.modules())
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[2])
    assert gradients[0] == gradients[1] == gradients[2] and all("app-1" in name for name in gradients[0])


def _through_update_layer(encoder, carriers, name, config):
    """The simple way to add an adapter to layers with LoRA, which visits all adapters there."""
    for module in (module for path, module in carriers.items() if path in config.target_modules):
        before = {id(parameter): parameter.requires_grad for parameter in module.parameters()}
        module.update_layer(name, r=config.r, lora_alpha=config.lora_alpha, config=config)
        for parameter in module.parameters():
            parameter.requires_grad_(before.get(id(parameter), False))
    encoder.peft_config[name] = config


def _lora_state(model):
    """Everything that PEFT's layers hold, in order."""
    state = [torch.random.get_rng_state().tolist()]
    for path, module in lora_modules(model.backbone):
        tables = {k: dict(v) for k, v in module.__dict__.items() if isinstance(v, dict) and k[0] != "_"}
        parts = [(n, str(p), p.training) for n, p in module.named_modules() if not n.startswith("base_layer")]
        values = [(n, p.requires_grad, p.dtype, p.tolist()) for n, p in module.named_parameters()]
        state.append((path, str(tables), parts, values, module.active_adapters, module.disable_adapters))
    return state


@pytest.mark.parametrize("trainable", [False, True])
def test_layers_with_lora_end_as_after_update_layer(folders, sixteen, trainable, monkeypatch):
    states = []
    for way in (None, _through_update_layer):
        if way:
            monkeypatch.setattr(adapters_mtpf, "_extend_layers", way)
        model = MtpfModel.from_pretrained(folders / "backbone").eval()
        torch.manual_seed(0)
        model.load_adapter(sixteen / "app-2", trainable=True)
        model.load_adapter(sixteen / "app-1", trainable=trainable)
        model.add_adapter("fresh", LoraSettings(r=3, layers=2, dropout=0.1))
        model.load_adapter(sixteen / "app-4", activate=False)
        model.load_adapter(sixteen / "app-1", replace=True, trainable=trainable)
        states.append([_lora_state(model)])
        for name in ("app-2", "fresh"):
            model.delete_adapter(name)
        model.backbone.encoder.layer[-1].output.dense.set_adapter("app-4")  # PEFT's own
        states[-1].append(_lora_state(model))
    assert states[0] == states[1]


def test_a_fresh_lora_is_the_same_next_to_other_apps(folders, sixteen):
    made = []
    for first in (None, "app-1"):
        model = MtpfModel.from_pretrained(folders / "backbone").eval()
        if first:
            model.load_adapter(sixteen / first)
        torch.manual_seed(0)
        model.add_adapter("fresh", LoraSettings(r=3, layers=2))
        made.append({n: p for n, p in model.named_parameters() if ".fresh." in n})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_ranks_by_module_are_those_that_peft_gives(folders, sixteen, monkeypatch):
    shapes = []
    for first in (None, "app-1"):
        model = MtpfModel.from_pretrained(folders / "backbone").eval()
        config = lora_config(model.backbone, LoraSettings(r=4, layers=2))
        names = sorted(config.target_modules)
        config.rank_pattern, config.alpha_pattern = {names[0]: 1, names[1]: 3}, {names[1]: 5, names[2]: 7}
        if first:
            model.load_adapter(sixteen / first)
            monkeypatch.setattr(adapters_mtpf, "_inject", None)
        inject_lora(model.backbone, "ranks", config, trainable=True)
        carriers = [(path, m) for path, m in lora_modules(model.backbone) if "ranks" in m.lora_A]
        shapes.append(
            [(p, m.r["ranks"], m.scaling["ranks"], m.lora_A["ranks"].weight.shape) for p, m in carriers]
        )
    assert shapes[0] == shapes[1] and len({rank for _, rank, *_ in shapes[0]}) == 3


def test_adding_takes_the_same_steps_however_many_apps_there_are(model, sixteen):
    steps = []
    for number in range(40):
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            model.load_adapter(sixteen / "app-1", adapter_name=f"guest-{number}", activate=False)
            if number % 2:
                model.delete_adapter(f"guest-{number}")
        finally:
            sys.setprofile(None)
        steps.append(calls)
    assert steps[38] < 1.02 * steps[4] and steps[39] < 1.02 * steps[5], steps


def test_replacing_is_all_or_nothing(model, folders, sixteen, tmp_path, monkeypatch):
    before = model.predict(TEXTS, adapters=["entities", "intent"])
    damaged = shutil.copytree(sixteen / "app-0", tmp_path / "damaged")
    (damaged / "head.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(AdapterError, match="head"):
        model.load_adapter(damaged, adapter_name="entities", replace=True)
    failures = iter([RuntimeError("no memory")])

    def inject(*arguments):
        if (error := next(failures, None)) is not None:
            raise error
        inject_lora(*arguments)

    monkeypatch.setattr("modeling_mtpf.model.adapter_files_mtpf.inject_lora", inject)  # after removal
    with pytest.raises(AdapterError, match="cannot be loaded"):
        model.load_adapter(sixteen / "app-0", adapter_name="entities", replace=True)
    assert model.predict(TEXTS, adapters=["entities", "intent"]) == before
    with pytest.raises(AdapterError, match="already loaded"):
        model.load_adapter(sixteen / "app-0", adapter_name="entities")
    model.load_adapter(sixteen / "app-0", adapter_name="entities", replace=True)
    after = model.predict(TEXTS, adapters=["entities", "intent"])
    assert after["entities"] != before["entities"]
    assert_close(after["intent"], before["intent"])
    fresh = MtpfModel.from_pretrained(folders / "backbone").eval()
    fresh.load_adapter(sixteen / "app-0", adapter_name="new", replace=True)  # nothing there to replace
    assert_close(fresh.predict(TEXTS, adapters=["new"])["new"], after["entities"])


def test_an_app_of_another_backbone_is_refused_although_the_right_one_is_known(model, folders, sixteen):
    """What is remembered about the weights ends with any change of them, also one that torch does not count."""
    with torch.no_grad():
        weight = model.backbone.embeddings.word_embeddings.weight
        version = weight._version
        weight.data[3, 5] += 1e-6  # too small for a sum of floats
        assert weight._version == version
    with pytest.raises(AdapterError, match="another backbone"):
        model.load_adapter(sixteen / "app-0")
    weight.data[3, 5] -= 1e-6
    assert model.predict(TEXTS, adapters=["intent"])["intent"]


def test_the_hash_of_a_backbone_does_not_depend_on_its_adapters(model, folders):
    bare = MtpfModel.from_pretrained(folders / "backbone")
    assert backbone_sha256(model.backbone) == backbone_sha256(bare.backbone)


def test_memory_by_app_is_reported(model):
    lora, head = 2 * 4 * 4 * (2 * (32 + 32) + (32 + 64) + (64 + 32)), 4 * (3 * 32 + 3)
    assert model.adapter_memory()["entities"] == {"lora": lora, "head": head, "total": lora + head}


def test_views_follow_a_model_whose_modules_are_replaced(model, batch):
    inputs = batch("bert")
    with torch.no_grad():
        model.encode_adapters(["entities"], **inputs)
        model.resize_token_embeddings(model.config.vocab_size + 8)
        model.backbone.encoder.layer[0].output.dropout = torch.nn.Identity()
        states = model.encode_adapters(["entities"], **inputs)["entities"]
        with model.use_adapter("entities"):
            assert torch.equal(model(**inputs)[0], states)


def test_views_keep_no_model_alive(folders):
    import weakref

    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(folders / "entities")
    model.predict(TEXTS, adapters=["entities"])
    gone = weakref.ref(model.backbone)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_memory_stays_flat_over_add_and_remove(folders, sixteen):
    """``MTPF_CYCLES`` says how often (default 80)."""
    cycles = int(os.environ.get("MTPF_CYCLES", "80"))
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(folders / "entities")
    expected = model.predict(TEXTS, adapters=["entities"])
    process, sizes, objects = psutil.Process(), [], []
    for cycle in range(cycles):
        name = model.load_adapter(sixteen / f"app-{cycle % 4}", adapter_name="guest")
        if cycle % 5 == 0:
            model.predict(TEXTS[:2], adapters=[name, "entities"])
        model.delete_adapter(name)
        if cycle % max(1, cycles // 10) == max(1, cycles // 10) - 1:
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
            objects.append(len(gc.get_objects()))
    print(f"\n{cycles} cycles: {[round(size) for size in sizes]} MB, {objects} objects")  # noqa: T201
    assert sizes[-1] - sizes[2] < 8 and abs(objects[-1] - objects[2]) < 300
    assert model.predict(TEXTS, adapters=["entities"]) == expected
