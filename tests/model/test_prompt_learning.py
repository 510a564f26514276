"""PEFT's methods that learn a prompt instead of changing layers do on our class what they do on the stock one."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModel

from modeling_mtpf import MtpfConfig, MtpfModel

SHAPE = {"num_virtual_tokens": 3, "task_type": "FEATURE_EXTRACTION"}
CONFIGS = {
    "prefix": PrefixTuningConfig(**SHAPE),
    "prefix projected": PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **SHAPE),
    "prompt": PromptTuningConfig(**SHAPE),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=8, **SHAPE),
}


NO_CACHE = ("distilbert", "modernbert")
"""Encoders that take no keys and values of earlier tokens, as which PEFT hands over a prefix."""


def adapted(cls, folder, method):
    """Put a fresh prompt on an encoder; PEFT cannot read its width from the stock config of DistilBERT."""
    config = copy.deepcopy(CONFIGS[method])
    if cls is AutoModel and "distilbert" in str(folder):
        config.token_dim, config.num_attention_heads = 32, 2
    torch.manual_seed(0)
    return get_peft_model(cls.from_pretrained(folder), config).eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_learned_prompt_gives_the_stock_numbers(encoders, batch, architecture, method, tmp_path):
    inputs, results = batch(architecture), []
    if "prefix" in method and architecture in NO_CACHE:
        with pytest.raises(TypeError, match="'past_key_values', which .*BertModel does not take"):
            adapted(MtpfModel, encoders[architecture], method)(**inputs)
        return
    for cls in (AutoModel, MtpfModel):
        model = adapted(cls, encoders[architecture], method)
        if architecture == "electra" and "prefix" not in method:
            # PEFT gives a prompt the width of the layers, not that of ELECTRA's narrower embeddings.
            with pytest.raises(RuntimeError, match="Expected size 32 but got size 16"):
                model(**inputs)
            continue
        states = model(**inputs).last_hidden_state
        states.square().sum().backward()
        trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        assert trained and all("prompt_encoder" in key and grad.any() for key, grad in trained.items())
        model.save_pretrained(tmp_path / cls.__name__)
        base = cls.from_pretrained(encoders[architecture])
        again = PeftModel.from_pretrained(base, tmp_path / cls.__name__).eval()
        torch.testing.assert_close(again(**inputs).last_hidden_state, states)
        results.append({"states": states, **trained})
    stock, ours = results or ({}, {})
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], value) for key, value in stock.items())


def test_the_shape_for_prompts_is_only_written(architecture, encoders):
    config = MtpfConfig.from_pretrained(encoders[architecture])
    written = config.to_dict()
    assert written["text_config"] == {"hidden_size": 32, "num_attention_heads": 2}
    written["text_config"]["hidden_size"] = 99
    again = MtpfConfig(**written)
    assert again.hidden_size == 32 and not hasattr(again, "text_config")
    assert "text_config" not in config.to_json_string(use_diff=False)
