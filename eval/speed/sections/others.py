"""Short texts a second of two apps, entities of four types and 5, 20 or 60 intents, against other kinds of models.

``gliner2`` reads the labels with every text: a GLiNER2 with random heads on the same encoder. ``model2vec`` is the
floor: means of static vectors of the same vocabulary, and logistic regression; it finds no entities. Each runs in an
environment of its own, with `datasets`, which ``--python gliner2=PATH`` names; those without one are left out. ``--text`` is as in
``predict``. Loading is not timed.
"""  # noqa: E501

from eval.speed import clock

LABELS = (5, 20, 60)
CONTESTANTS = {f"{who}_{count}": 99 for who in ("mtpf", "gliner2") for count in LABELS} | {"model2vec": 99}
ENVIRONMENTS = ("gliner2", "model2vec")
LONGEST = 32
"""The most words of a text."""
TYPES = ["person", "place", "time", "organization"]


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Find entities and the intent of each text."""
    import torch

    from eval.speed.app_inputs import mixed_texts

    torch.set_num_threads(options["threads"])
    texts = [text for text in mixed_texts(options["text"]) if len(text.split()) <= LONGEST]
    who, _, count = contestant.partition("_")
    intents = [f"intent number {number}" for number in range(int(count or LABELS[-1]))]
    run = {"mtpf": _ours, "gliner2": _gliner2, "model2vec": _model2vec}[who](intents, texts)
    run(texts[:16])
    started = clock.seconds()
    run(texts)
    return {"texts": len(texts), "texts_per_second": round(len(texts) / (clock.seconds() - started), 2)}


def _ours(intents: list[str], texts: list[str]):
    from eval.speed.app_inputs import add_app, wrapped_model
    from modeling_mtpf import AdapterHead

    model = wrapped_model()
    add_app(model, "entities", "token-classification", 0, texts[:64])
    add_app(model, "intents", "text-classification", 1)
    model.heads["intents"] = AdapterHead("text-classification", intents, model.config.hidden_size, 256).eval()
    return lambda batch: model.predict(batch, adapters=["entities", "intents"])


def _gliner2(intents: list[str], texts: list[str]):
    from gliner2 import ExtractorConfig, GLiNER2  # type: ignore[import-not-found]

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    model = GLiNER2(ExtractorConfig(model_name=str(packaged_encoder()), max_width=8)).eval()
    schema = model.create_schema().entities(TYPES).classification("intent", intents)
    return lambda batch: model.batch_extract(batch, schema, batch_size=8)


def _model2vec(intents: list[str], texts: list[str]):
    import numpy as np
    from model2vec import StaticModel  # type: ignore[import-not-found]
    from tokenizers import Tokenizer

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    tokenizer = Tokenizer.from_file(str(packaged_encoder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    random = np.random.default_rng(0)
    vectors = random.normal(size=(tokenizer.get_vocab_size(), 256)).astype(np.float32)
    model, weights = StaticModel(vectors, tokenizer), random.normal(size=(256, len(intents)))
    return lambda batch: (model.encode(batch) @ weights).argmax(1)


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Texts per second of ours over those of GLiNER2, and of the floor over ours."""
    rate = "texts_per_second"
    found = {}
    for count in LABELS:
        if f"gliner2_{count}" in medians:
            ratio = medians[f"mtpf_{count}"][rate] / medians[f"gliner2_{count}"][rate]
            found[f"over GLiNER2 with {count} intents"] = (ratio, ">=", 15.0 if count == 60 else 1.0)
    if "model2vec" in medians:
        floor = medians["model2vec"][rate] / medians["mtpf_60"][rate]
        found["model2vec over ours"] = (floor, ">=", 1.0)
    return found
