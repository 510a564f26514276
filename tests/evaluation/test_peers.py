"""Equal numbers to the libraries that `eval/speed/run.py` compares with."""

import pytest
import torch
from transformers import AutoModelForTokenClassification

from modeling_mtpf import MtpfModel
from modeling_mtpf.data.words import IGNORE, load_word_tokenizer
from modeling_mtpf.pretraining.chunks import ChunkShape, plan_chunks
from modeling_mtpf.pretraining.families.base import FamilyBatch, RunContext
from modeling_mtpf.pretraining.families.ner import NerFamily, NerSettings
from modeling_mtpf.pretraining.families.tc import TcFamily, TcSettings
from modeling_mtpf.pretraining.joint import JointModel

PAIRS = [
    ("Ada met Charles in London", "where did Ada meet Charles?"),
    ("Noor's train leaves at 7:30pm", "when does the train leave?"),
    ("buy three tickets for the concert tomorrow, please", "tickets"),
    ("don't be late", "be on time"),
]


@pytest.mark.parametrize("negatives", [False, True])
def test_contrastive_loss_of_equal_batches_equals_sentence_transformers(encoders, tmp_path, negatives):
    import json

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    rows = [{"anchor": a, "positive": p} | ({"negative": f"not {p}"} if negatives else {}) for a, p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    family = TcFamily("tc", TcSettings(pairs=[str(tmp_path / "pairs.jsonl")], batch_size=4, max_length=64))
    family.prepare(RunContext(load_word_tokenizer(str(encoders["bert"])), 0, tmp_path))
    joint = JointModel(MtpfModel.from_pretrained(encoders["bert"]).eval(), [family], False).eval()
    batch = family.batch(0)
    loss = joint(plan_chunks({"tc": batch}, ChunkShape(max_length=64), 0)).losses["tc"]

    peer = SentenceTransformer(str(encoders["bert"]), device="cpu").eval()
    order = [number - 1 for number in batch.row_numbers[:4]]
    columns = [[rows[i][name] for i in order] for name in rows[0]]
    features = [peer.tokenize(texts) for texts in columns]
    expected = MultipleNegativesRankingLoss(peer)(features, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cluster_loss_of_equal_batches_equals_transformers(encoders):
    torch.manual_seed(0)
    peer = AutoModelForTokenClassification.from_pretrained(encoders["bert"], num_labels=5).eval()
    family = NerFamily("ner", NerSettings())
    family.num_clusters = 5
    joint = JointModel(MtpfModel.from_pretrained(encoders["bert"]).eval(), [family], False).eval()
    with torch.no_grad():
        joint.objectives["ner"].head.weight.copy_(peer.classifier.weight)
        joint.objectives["ner"].head.bias.copy_(peer.classifier.bias)
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    encoding = tokenizer([text for text, _ in PAIRS], padding=True, return_tensors="pt")
    labels = torch.randint(0, 5, encoding["input_ids"].shape)
    labels[encoding["attention_mask"] == 0] = IGNORE
    expected = peer(**encoding, labels=labels).loss
    sizes = encoding["attention_mask"].sum(1).tolist()
    rows = [row[:size].numpy() for row, size in zip(encoding["input_ids"], sizes, strict=True)]
    targets = [row[:size].numpy() for row, size in zip(labels, sizes, strict=True)]
    batch = FamilyBatch(rows, targets, {"labelled_words": torch.tensor(sum(sizes))})
    loss = joint(plan_chunks({"ner": batch}, ChunkShape(max_length=64), 0)).losses["ner"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
