"""Model, config and training behave as transformers' own classes do: the same calls, equal numbers."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, config_of, encoder_config
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_mtpf import (
    AdapterHead,
    LoraSettings,
    MtpfConfig,
    MtpfForSequenceClassification,
    MtpfForTokenClassification,
    MtpfModel,
)
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.model.backbone_identity_mtpf import backbone_sha256
from modeling_mtpf.model.modeling_mtpf import mean_pool

TASK_CLASSES = [MtpfForTokenClassification, MtpfForSequenceClassification]
# Whose token classification is the encoder, dropout and a linear layer; ModernBERT has one more layer.
PLAIN = [name for name in ARCHITECTURES if name != "modernbert"]


class MeanPooled(torch.nn.Module):
    """Gives a stock sequence classifier the mean of the token vectors, as our class pools."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.encoder(input_ids, attention_mask=attention_mask, **kwargs)[0]
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=mean_pool(states, attention_mask)
        )


def both(folder, cls, architecture="bert", **kwargs):
    """Save a stock task model and load it as our class and as the stock one; all weights are equal."""
    torch.manual_seed(0)
    config = encoder_config(architecture, 300, **kwargs)
    if cls is MtpfForTokenClassification:
        stock = AutoModelForTokenClassification.from_config(config)
        stock.save_pretrained(folder)
        return cls.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder)
    stock = BertForSequenceClassification(config)
    stock.save_pretrained(folder)
    stock = BertForSequenceClassification.from_pretrained(folder)
    stock.bert = MeanPooled(stock.bert)
    return cls.from_pretrained(folder), stock


def inputs_of(rows=4, labels=None):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 8, dtype=torch.long)
    mask[0, 5:] = 0
    ids = torch.randint(5, 300, (rows, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, **({} if labels is None else {"labels": labels})}


# Loss


PROBLEMS = {
    "from one label": (None, 1, torch.tensor([0.5, -1, 2, 3])),
    "from one label, as a column": (None, 1, torch.tensor([[0.5], [-1], [2], [3]])),
    "from integers": (None, 3, torch.tensor([0, 2, 1, 1])),
    "from floats": (None, 3, torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0.0]])),
    "regression": ("regression", 1, torch.tensor([0.5, -1, 2, 3])),
    "regression of three numbers": ("regression", 3, torch.arange(12.0).view(4, 3)),
    "single_label": ("single_label_classification", 3, torch.tensor([0, 2, 1, 1])),
    "multi_label": (
        "multi_label_classification",
        3,
        torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0.0]]),
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_of_each_problem_type_is_that_of_the_stock_class(tmp_path, name):
    problem, number, labels = PROBLEMS[name]
    ours, stock = both(tmp_path, MtpfForSequenceClassification, problem_type=problem, num_labels=number)
    inputs = inputs_of(labels=labels)
    one, other = ours.eval()(**inputs), stock.eval()(**inputs)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
    assert ours.config.problem_type == stock.config.problem_type is not None
    ours.save_pretrained(tmp_path)
    assert MtpfConfig.from_pretrained(tmp_path).problem_type == stock.config.problem_type


def test_labels_that_do_not_fit_the_problem_are_refused_as_by_the_stock_class(tmp_path):
    for model in both(tmp_path, MtpfForSequenceClassification, num_labels=3):
        with pytest.raises(ValueError, match=r"Target size \(torch.Size\(\[4\]\)\)"):
            model(**inputs_of(labels=torch.rand(4)))


@pytest.mark.parametrize("architecture", PLAIN)
def test_the_loss_of_token_classification_is_that_of_the_stock_class(tmp_path, architecture):
    ours, stock = both(tmp_path, MtpfForTokenClassification, architecture, num_labels=3)
    labels = torch.randint(0, 3, (4, 8), generator=torch.Generator().manual_seed(0))
    labels[:, 6:] = -100
    for mode in (True, False):  # in training the dropout before the classifier counts, too
        losses = []
        for model in (ours, stock):
            torch.manual_seed(0)
            losses.append(model.train(mode)(**inputs_of(labels=labels)).loss)
        assert torch.equal(*losses)


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_the_loss_is_divided_by_the_number_of_items_that_the_trainer_counts(tmp_path, cls):
    ours, _ = both(tmp_path, cls, num_labels=3)
    labels = torch.randint(0, 3, (4, 8) if cls is MtpfForTokenClassification else (4,))
    labels.view(-1)[0] = -100
    inputs, count = inputs_of(labels=labels), int((labels != -100).sum())
    mean = ours.eval()(**inputs).loss
    for number in (count, torch.tensor(count)):
        assert torch.allclose(ours(**inputs, num_items_in_batch=number).loss, mean)
    assert torch.allclose(ours(**inputs, num_items_in_batch=2 * count).loss, mean / 2)


# Outputs


@pytest.mark.parametrize("flags", [{}, {"output_attentions": True}, {"output_hidden_states": True}])
@pytest.mark.parametrize("where", ["call", "config", "folder"])
def test_tuples_attentions_and_hidden_states_are_asked_for_as_in_transformers(
    tmp_path, where, flags, architecture
):
    torch.manual_seed(0)
    stock = AutoModel.from_config(encoder_config(architecture, 300, attn_implementation="eager"))
    flags = {**flags, "return_dict": False}
    if where == "folder":
        stock.config.update(flags)
    stock.save_pretrained(tmp_path)
    pair = [
        cls.from_pretrained(tmp_path, attn_implementation="eager").eval() for cls in (MtpfModel, AutoModel)
    ]
    if where == "config":
        for model in pair:
            model.config.update(flags)
    call = flags if where == "call" else {}
    ours, other = (model(**inputs_of(), **call) for model in pair)
    assert isinstance(ours, tuple) and len(ours) == len(other)
    for one, two in zip(ours, other, strict=True):
        for left, right in zip(*((x,) if torch.is_tensor(x) else x for x in (one, two)), strict=True):
            assert torch.equal(left, right)
    if where != "call":
        assert pair[0](**inputs_of(), return_dict=True)[0].equal(other[0])


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_task_classes_give_tuples_with_attentions_and_hidden_states(tmp_path, cls):
    ours, stock = both(tmp_path, cls, num_labels=3)
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    labels = torch.zeros((4, 8) if cls is MtpfForTokenClassification else 4, dtype=torch.long)
    loss, logits = ours.eval()(**inputs_of(labels=labels), return_dict=False)
    assert torch.is_tensor(loss) and logits.shape[-1] == 3
    ours.config.update({"return_dict": False, "output_hidden_states": True, "output_attentions": True})
    output = ours(**inputs_of(labels=labels))
    assert [len(part) for part in output[2:]] == [5, 4]
    assert torch.equal(output[1], stock.eval()(**inputs_of()).logits)


@pytest.mark.parametrize("architecture", ["distilbert", "modernbert"])
def test_token_types_are_ignored_by_encoders_without_them_as_in_transformers(architecture):
    model = MtpfModel(config_of(architecture)).eval()
    with torch.no_grad():
        types = model(**inputs_of(), token_type_ids=torch.ones(4, 8, dtype=torch.long))[0]
        assert torch.equal(types, model(**inputs_of())[0])


# Weights under stock names


@pytest.mark.parametrize("cls", [MtpfModel, *TASK_CLASSES])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_saved_state_loads_into_the_module(tmp_path, architecture, cls, with_lora):
    torch.manual_seed(0)
    source, target = (cls(config_of(architecture)).eval() for _ in range(2))
    source.save_pretrained(tmp_path)
    if with_lora:
        target.add_adapter("ner", LoraSettings(r=4))
        target.requires_grad_(False)
    state = load_file(tmp_path / "model.safetensors")
    result = target.load_state_dict(state, strict=not with_lora)
    assert not result.unexpected_keys and all(".lora_" in key for key in result.missing_keys)
    assert torch.equal(target(**inputs_of())[0], source(**inputs_of())[0])
    wrapped = torch.nn.ModuleDict(
        {"module": cls(config_of(architecture)).eval()}
    )  # as in DistributedDataParallel
    wrapped.load_state_dict({f"module.{key}": value for key, value in state.items()})
    assert torch.equal(wrapped["module"](**inputs_of())[0], source(**inputs_of())[0])


def test_a_state_in_several_files_loads_as_trainer_does(tmp_path):
    source, target = (MtpfForTokenClassification(config_of("bert")) for _ in range(2))
    source.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_sharded_checkpoint(target, tmp_path, strict=False)
    for (key, one), other in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_a_strict_load_names_what_is_missing_or_unknown(tmp_path):
    model = MtpfForTokenClassification(config_of("bert"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["embeddings.word_embeddings.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"backbone.embeddings.word_embeddings.weight"'):
        model.load_state_dict(state)
    state = load_file(tmp_path / "model.safetensors") | {"encoder.layer.9.x": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"encoder.layer.9.x"'):
        model.load_state_dict(state)


def test_a_state_that_the_caller_gathered_is_saved_under_stock_names(tmp_path):
    """Trainer does so under FSDP and DeepSpeed."""
    model = MtpfForTokenClassification(config_of("bert"))
    model.save_pretrained(tmp_path / "one")
    model.add_adapter("ner", LoraSettings(r=4), AdapterHead("token-classification", ["O", "B-X"], 32))
    model.save_pretrained(tmp_path / "two", state_dict=model.state_dict())
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


# Trainer


def rows(cls, number=8):
    generator = torch.Generator().manual_seed(0)
    shape = (8,) if cls is MtpfForTokenClassification else ()
    return [
        {
            "input_ids": torch.randint(5, 300, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "token_type_ids": torch.arange(8) // 4,
            "labels": torch.randint(0, 3, shape, generator=generator),
        }
        for _ in range(number)
    ]


def train(model, cls, folder, resume=None, **arguments):
    torch.manual_seed(1)
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, **arguments}
    settings = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, **arguments
    )
    data = rows(cls)
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_trainer_trains_exactly_as_with_the_stock_class(tmp_path, architecture):
    cls = MtpfForTokenClassification
    ours, stock = both(tmp_path / "start", cls, architecture, num_labels=3)
    logs = [train(model, cls, tmp_path / "run").state.log_history for model in (ours, stock)]
    losses = [[entry.get("loss") for entry in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    weights = ours.state_dict()
    for key, value in stock.state_dict().items():
        assert torch.equal(weights[key.replace(f"{architecture}.", "backbone.")], value), key


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path, cls):
    """Where the batches have different numbers of labels, too."""
    models = [
        both(tmp_path / "start", cls, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)[0]
        for _ in range(2)
    ]
    common = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
    train(models[0], cls, tmp_path, per_device_train_batch_size=4, **common)
    train(models[1], cls, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **common)
    for (key, one), other in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=key)


@pytest.mark.parametrize("cls", TASK_CLASSES)
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_resumed_training_and_the_best_model_are_restored_exactly(tmp_path, cls, architecture, caplog):
    def start():
        torch.manual_seed(0)
        return cls(MtpfConfig(encoder_config=encoder_config(architecture, 300), num_labels=3))

    whole = start()
    train(whole, cls, tmp_path / "whole")
    resumed = start()
    trainer = train(resumed, cls, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for (key, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), key

    best = start()  # the rate is so high that the first checkpoint is the best
    trainer = train(
        best,
        cls,
        tmp_path / "best",
        learning_rate=1.0,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="eval_loss",
        warmup_steps=3,
    )
    folder = trainer.state.best_model_checkpoint
    assert not folder.endswith("checkpoint-4")
    for (key, one), other in zip(
        best.state_dict().items(), cls.from_pretrained(folder).state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


DDP = """
import json, sys
import torch
sys.path.insert(0, {tests!r})
from conftest import config_of
import modeling_mtpf
torch.distributed.init_process_group("gloo", init_method="file://" + {file!r}, rank=0, world_size=1)
done = []
for architecture in {architectures!r}:
    for name in ("MtpfForTokenClassification", "MtpfForSequenceClassification"):
        first = getattr(modeling_mtpf, name)(config_of(architecture))
        first.save_pretrained({folder!r})
        for model in (first, type(first).from_pretrained({folder!r})):
            model.gradient_checkpointing_enable()
            wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
            for _ in range(3):
                labels = torch.zeros((2, 4) if "Token" in name else 2, dtype=torch.long)
                wrapped(input_ids=torch.ones(2, 4, dtype=torch.long) * 7, labels=labels).loss.backward()
            done.append(all(p.grad is not None for p in model.parameters() if p.requires_grad))
torch.distributed.destroy_process_group()
print(json.dumps(done))
"""


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_a_training_with_an_adapter_is_not_resumed_without_it(tmp_path, cls):
    """Checkpoints hold the backbone, and the adapter of another state would run on it."""

    def start():
        model = cls(MtpfConfig(encoder_config=encoder_config("bert", 300), num_labels=3))
        model.add_adapter("ner", LoraSettings(r=4))
        return model

    train(start(), cls, tmp_path)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    for arguments in ({"resume": str(tmp_path / "checkpoint-2")}, best):
        with pytest.raises(MtpfError, match="without the adapter in training 'ner': .*save_adapter"):
            train(start(), cls, tmp_path, **arguments)


def test_every_parameter_in_training_gets_a_gradient_with_an_app(tmp_path, cls=MtpfForTokenClassification):
    """DDP refuses the others; a task class runs its classifier, not the app's head."""
    source = MtpfModel(config_of("bert"))
    source.add_adapter("people", LoraSettings(r=4), AdapterHead("token-classification", ["O", "B-X"], 32))
    source.save_adapter(tmp_path, "people")
    model, plain = cls(config_of("bert")), MtpfModel(config_of("bert"))
    model.load_adapter(tmp_path, trainable=True, check_backbone=False)
    model.add_adapter("other", LoraSettings(r=4), AdapterHead("token-classification", ["O", "B-X"], 32))
    model(**inputs_of(labels=torch.zeros(4, 8, dtype=torch.long))).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(".other." in name and ".lora_" in name for name in without), without
    for trainable in (False, True):
        plain.load_adapter(tmp_path, f"app{trainable:d}", trainable=trainable, check_backbone=False)
        assert {p.requires_grad for p in plain.heads[f"app{trainable:d}"].parameters()} == {trainable}


@pytest.mark.slow
def test_task_classes_train_in_plain_ddp_and_with_checkpointing(tmp_path, fresh_process):
    """DDP refuses a second step where a parameter got no gradient in the first."""
    code = DDP.format(
        tests=str(Path(__file__).parent.parent),
        file=str(tmp_path / "store"),
        folder=str(tmp_path / "model"),
        architectures=list(ARCHITECTURES),
    )
    assert fresh_process(code) == [True] * 24


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_the_pooler_is_saved_and_keeps_the_backbone_what_it_is(tmp_path, encoders, cls):
    task, plain = (c.from_pretrained(encoders["bert"]) for c in (cls, MtpfModel))
    assert backbone_sha256(task.backbone) == backbone_sha256(plain.backbone)
    frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.pooler.dense.weight", "backbone.pooler.dense.bias"]
    assert all(parameter.requires_grad for parameter in plain.parameters())
    task.save_pretrained(tmp_path)
    again = MtpfModel.from_pretrained(tmp_path)
    assert backbone_sha256(again.backbone) == backbone_sha256(plain.backbone)


# Configs


@pytest.mark.parametrize(
    "way", ["from_json_file", "from_dict", "from_pretrained", "to_dict", "to_diff_dict", "full"]
)
def test_a_config_is_read_as_it_was_written(tmp_path, architecture, way):
    config = MtpfConfig(
        encoder_config=encoder_config(architecture, 300), num_labels=5, regime="tpl", num_tail_layers=3,
        problem_type="multi_label_classification", output_hidden_states=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    flat = json.loads((tmp_path / "config.json").read_text())
    read = {
        "from_json_file": lambda: MtpfConfig.from_json_file(tmp_path / "config.json"),
        "from_dict": lambda: MtpfConfig.from_dict(flat),
        "from_pretrained": lambda: MtpfConfig.from_pretrained(tmp_path),
        "to_dict": lambda: MtpfConfig(**config.to_dict()),
        "to_diff_dict": lambda: MtpfConfig.from_dict(config.to_diff_dict()),
        "full": lambda: MtpfConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    }[way]()
    assert read.to_dict() == config.to_dict()
    assert read.encoder_config.model_type == architecture and flat["model_type"] == architecture


def test_a_stock_config_is_read_from_its_dict_and_file(tmp_path, architecture):
    stock = encoder_config(architecture, 300, num_labels=5)
    stock.save_pretrained(tmp_path)
    for config in (
        MtpfConfig.from_dict(stock.to_dict()),
        MtpfConfig.from_json_file(tmp_path / "config.json"),
    ):
        assert (config.hidden_size, config.num_labels) == (32, 5)
        assert config.encoder_config.model_type == architecture


def test_the_encoders_settings_as_arguments_are_the_encoders(tmp_path, encoders):
    assert MtpfConfig(hidden_size=24).encoder_config.hidden_size == 24
    model = MtpfModel.from_pretrained(encoders["bert"], hidden_dropout_prob=0.5)
    assert model.backbone.embeddings.dropout.p == 0.5
    with pytest.raises(MtpfError, match="encoder_config=.*MtpfConfig.from_dict"):
        MtpfConfig(**encoder_config("modernbert", 300).to_dict())


# Arguments


@pytest.mark.parametrize("cls", [MtpfModel, *TASK_CLASSES])
def test_a_model_without_pooler_is_refused(encoders, cls):
    for call in (lambda: cls.from_pretrained(encoders["bert"], add_pooling_layer=False),
                 lambda: cls(config_of("bert"), add_pooling_layer=False)):  # fmt: skip
        with pytest.raises(MtpfError, match="has no add_pooling_layer=False: .*leave the argument out"):
            call()
    cls.from_pretrained(encoders["bert"], add_pooling_layer=True)


@pytest.mark.parametrize("value", [True, False])
def test_both_formats_are_the_stock_names(tmp_path, value):
    model = MtpfModel(config_of("bert"))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "formatted", save_original_format=value)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "formatted"))
    assert one == two


@pytest.mark.parametrize("cls", [MtpfModel, *TASK_CLASSES])
def test_only_the_main_process_writes_files(tmp_path, encoders, cls):
    cls.from_pretrained(encoders["bert"]).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_subfolder_is_read_with_its_tokenizer(folders):
    model = MtpfModel.from_pretrained(folders, subfolder="backbone")
    model.load_adapter(folders / "intent", "intent")
    expected = MtpfModel.from_pretrained(folders / "backbone")
    expected.load_adapter(folders / "intent", "intent")
    assert model.predict(["hi"], adapters=["intent"]) == expected.predict(["hi"], adapters=["intent"])
    assert MtpfConfig.from_pretrained(folders, subfolder="backbone").to_dict()["regime"] == "tpl"
