"""PEFT's own common tests, from the source distribution of the installed version, on our model."""

import pytest
from conftest import ARCHITECTURES
from distributions import fetch, run_suite
from peft import LoraConfig, get_peft_model

from modeling_mtpf import MtpfModel


@pytest.mark.slow
def test_all_that_the_stock_class_passes_passes(tmp_path):
    """With LoRA, IA3 and prompts all of them, with PEFT's other methods those of merging and saving."""
    result = run_suite("peft_suite.py", fetch("peft"), tmp_path, ARCHITECTURES)
    assert [row for row in result["rows"] if row[4] == "passed"] == []
    assert result["passed"] > 350 and result["failed"] < 20


def test_targets_must_be_named(encoders):
    """PEFT's own lists of default targets know the stock encoders alone."""
    model = MtpfModel.from_pretrained(encoders["bert"])
    with pytest.raises(ValueError, match="^Please specify `target_modules`"):
        get_peft_model(model, LoraConfig(task_type="FEATURE_EXTRACTION"))
