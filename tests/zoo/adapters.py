"""Every method of the installed peft, on a small classifier of each kind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import transformers as hf
from torch import Tensor, nn

from tests.zoo.families import FLOAT32, WIDTH, small
from tests.zoo.subjects import LABELS, PAD, Subject


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model to adapt, and the names of its parts.

    Attributes:
        family: as transformers calls it.
        targets: linear layers of the attention.
        forward: the layer that ends a block.
        embedding: the table of words.
        norm: a normalisation.
        parameter: the weights of one linear layer.
        task: as peft calls it.
    """

    family: str
    targets: list[str]
    forward: list[str]
    embedding: str
    norm: list[str]
    parameter: str
    task: str = "SEQ_CLS"

    def model(self) -> nn.Module:
        config = small(hf.CONFIG_MAPPING[self.family], num_labels=LABELS, pad_token_id=PAD)
        kind = "SequenceClassification" if self.task == "SEQ_CLS" else "CausalLM"
        return getattr(hf, f"AutoModelFor{kind}").from_config(config)

    @property
    def usual(self) -> dict[str, Any]:
        """What most methods are given."""
        return {"task_type": self.task, "target_modules": self.targets}


BASES = {
    "BERT": Base(
        family="bert",
        targets=["query", "value"],
        forward=["output.dense"],
        embedding="word_embeddings",
        norm=["output.LayerNorm"],
        parameter="intermediate.dense.weight",
    ),
    "GPT-2": Base(
        family="gpt2",
        targets=["c_attn"],
        forward=["mlp.c_proj"],
        embedding="wte",
        norm=["ln_1"],
        parameter="c_fc.weight",
    ),
    "Llama": Base(
        family="llama",
        targets=["q_proj", "v_proj"],
        forward=["down_proj"],
        embedding="embed_tokens",
        norm=["input_layernorm"],
        parameter="gate_proj.weight",
    ),
}

Method = Callable[[Base], nn.Module]


def _adapted(base: Base, config: peft.PeftConfig) -> nn.Module:
    return peft.get_peft_model(base.model(), config, autocast_adapter_dtype=False)


def _lora(**settings: Any) -> Method:
    """LoRA; settings that begin with "@" are attributes of the base."""
    return _on(peft.LoraConfig, **{"r": 2} | settings)


def _on(make: Callable[..., peft.PeftConfig], **settings: Any) -> Method:
    """A method on the linear layers of the attention, unless the settings say otherwise."""

    def adapt(base: Base) -> nn.Module:
        return _adapted(base, make(**base.usual | _filled(settings, base)))

    return adapt


def _before(make: Callable[..., peft.PeftConfig], **settings: Any) -> Method:
    """A method that puts learned tokens before the text, as many as there may be examples."""

    def adapt(base: Base) -> nn.Module:
        usual = {"task_type": base.task, "num_virtual_tokens": 4}
        return _adapted(base, make(**usual | _filled(settings, base)))

    return adapt


def _filled(settings: dict[str, Any], base: Base) -> dict[str, Any]:
    """The settings, with functions of the base called."""
    return {name: v(base) if callable(v) else v for name, v in settings.items()}


def _several(*methods: dict[str, Any]) -> Method:
    """LoRA adapters with these settings, all of them active; the head is not trained."""

    def adapt(base: Base) -> nn.Module:
        configs = [peft.LoraConfig(target_modules=base.targets, **more) for more in methods]
        model = peft.get_peft_model(base.model(), configs[0], autocast_adapter_dtype=False)
        for number, config in enumerate(configs[1:]):
            model.add_adapter(f"more{number}", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(list(model.peft_config))
        return model

    return adapt


def _mixture(**settings: Any) -> Method:
    """X-LoRA: adapters from disk, weighted by what a first pass makes of the text."""

    def adapt(base: Base) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            names = ("0", "1")  # the only ones it takes
            for name in names:
                _several({"r": 2})(base).save_pretrained(f"{folder}/{name}")
            adapters = {name: f"{folder}/{name}" for name in names}
            config = peft.XLoraConfig(
                task_type=base.task, hidden_size=WIDTH, xlora_size=8, adapters=adapters, **settings
            )
            model = base.model()
            model.config.use_cache = False
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    return adapt


def _embedding(base: Base) -> list[str]:
    return [*base.targets, base.embedding]


LORA: dict[str, Method] = {
    "LoRA": _lora(),
    "LoRA, rank-stabilised": _lora(use_rslora=True),
    "LoRA, all linear layers": _lora(target_modules="all-linear"),
    "LoRA with bias": _lora(lora_bias=True),
    "LoRA, biases trained": _lora(bias="all"),
    "LoRA, ranks by pattern": _lora(rank_pattern={"query": 4, "c_attn": 4, "q_proj": 4}),
    "LoRA on embeddings": _lora(target_modules=_embedding),
    "LoRA, embeddings trained": _lora(modules_to_save=lambda base: [base.embedding]),
    "LoRA and new tokens": _lora(trainable_token_indices=lambda base: {base.embedding: [1, 2, 9]}),
    "LoRA on a parameter": _lora(target_modules=[], target_parameters=lambda b: [b.parameter]),
    "LoRA, layers repeated": _lora(layer_replication=[[0, 2], [1, 2]]),
    "LoRA, two at once": _several({"r": 2}, {"r": 3}),
    "LoRA, PiSSA": _lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": _lora(init_lora_weights="olora"),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "DoRA": _lora(use_dora=True),
    "DoRA on embeddings": _lora(use_dora=True, target_modules=_embedding),
    "DoRA, two at once": _several({"r": 2, "use_dora": True}, {"r": 3, "use_dora": True}),
    "aLoRA": _lora(alora_invocation_tokens=[2]),
    "BD-LoRA": _lora(
        use_bdlora=lambda base: peft.BdLoraConfig(target_modules_bd_b=base.targets, nblocks=2)
    ),
    "KaSA": _lora(kasa_config=peft.KasaConfig()),
    # It draws anew, and so the same again, for every forward pass.
    "MonteCLoRA": _lora(monteclora_config=peft.MontecloraConfig(buffer_size=1)),
    "VeLoRA": _lora(velora_config=peft.VeloraConfig(num_groups=4)),
    "VeLoRA, random": _lora(velora_config=peft.VeloraConfig(num_groups=4, init_type="random")),
}

OTHERS: dict[str, Method] = {
    "AdaLoRA": _on(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "AdaMSS": _on(peft.AdamssConfig, r=4, num_subspaces=2),
    "BEFT": _on(peft.BeftConfig),
    "BOFT": _on(peft.BOFTConfig, boft_block_size=4),
    "BOFT, butterfly": _on(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=2),
    "C3A": _on(peft.C3AConfig, block_size=8),
    "DEFT": _on(peft.DeftConfig, r=2),
    "DeLoRA": _on(peft.DeloraConfig, r=2),
    "FourierFT": _on(peft.FourierFTConfig, n_frequency=10),
    "FRoD": _on(peft.FrodConfig, progressbar=False, sparse_rate=0.1),
    "GLoRA": _on(peft.GloraConfig, r=2),
    "GraLoRA": _on(peft.GraloraConfig, r=4),
    "GraLoRA, hybrid": _on(peft.GraloraConfig, r=4, hybrid_r=2),
    "HiRA": _on(peft.HiraConfig, r=2),
    "HRA": _on(peft.HRAConfig, r=2),
    "HRA, Gram-Schmidt": _on(peft.HRAConfig, r=2, apply_GS=True),
    "IA³": _on(
        peft.IA3Config,
        target_modules=lambda base: base.targets + base.forward,
        feedforward_modules=lambda base: base.forward,
    ),
    "Lily": _on(peft.LilyConfig, r=2),
    "LN tuning": _on(peft.LNTuningConfig, target_modules=lambda base: base.norm),
    "LoHa": _on(peft.LoHaConfig, r=2),
    "LoKr": _on(peft.LoKrConfig, r=2, decompose_factor=4),
    "LoKr, both factors": _on(peft.LoKrConfig, r=1, decompose_both=True, decompose_factor=4),
    "MiSS": _on(peft.MissConfig, r=4),
    "MiSS, bat": _on(peft.MissConfig, r=4, init_weights="bat"),
    "OFT": _on(peft.OFTConfig, oft_block_size=4),
    "OFT, exact Cayley": _on(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    "OFT, shared, constrained": _on(peft.OFTConfig, oft_block_size=4, block_share=True, coft=True),
    "OSF": _on(peft.OSFConfig, effective_rank=4),
    "PEANuT": _on(peft.PeanutConfig, r=2, depth=1),
    "Poly": _on(peft.PolyConfig, r=2, n_tasks=3, n_skills=2),
    "PSOFT": _on(peft.PsoftConfig, r=4),
    "PVeRA": _on(peft.PveraConfig, r=4),
    "RandLoRA": _on(peft.RandLoraConfig, r=2),
    "RoAd 1": _on(peft.RoadConfig, group_size=4),
    "RoAd 2": _on(peft.RoadConfig, group_size=4, variant="road_2"),
    "RoAd 4": _on(peft.RoadConfig, group_size=4, variant="road_4"),
    "SHiRA": _on(peft.ShiraConfig, r=2, random_seed=0),
    "Supertuning": _on(peft.SupertuningConfig, sparsity=0.5),
    "TinyLoRA": _on(peft.TinyLoraConfig, u=4),
    "Trainable tokens": _on(
        peft.TrainableTokensConfig,
        target_modules=lambda base: [base.embedding],
        token_indices=[1, 2, 9],
    ),
    "Uni-LoRA": _on(peft.UniLoraConfig, r=2, theta_d_length=16),
    "VB-LoRA": _on(peft.VBLoRAConfig, r=2, num_vectors=8, vector_length=8),
    "VeRA": _on(peft.VeraConfig, r=4),
    "WaveFT": _on(peft.WaveFTConfig, n_frequency=10),
    "Prompt tuning": _before(peft.PromptTuningConfig),
    "Prompt tuning, several tasks": _before(peft.MultitaskPromptTuningConfig, num_tasks=3),
    "P-tuning": _before(peft.PromptEncoderConfig, encoder_hidden_size=12),
    "P-tuning, LSTM": _before(
        peft.PromptEncoderConfig, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "Prefix tuning": _before(peft.PrefixTuningConfig),
    "Prefix tuning, projected": _before(
        peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=12
    ),
    "Cartridge": _before(peft.CartridgeConfig),
    "Shadow": lambda base: _adapted(base, peft.ShadowConfig(task_type=base.task, r=2)),
    "X-LoRA": _mixture(),
    "X-LoRA, by layer": _mixture(layerwise_scalings=True, use_trainable_adapters=True),
}

# What there is for language models alone.
LANGUAGE: dict[str, Method] = {
    "Adaption prompt": lambda base: _adapted(
        base, peft.AdaptionPromptConfig(task_type=base.task, adapter_len=4, adapter_layers=2)
    ),
    "CPT": lambda base: _adapted(
        base,
        peft.CPTConfig(
            task_type=base.task,
            cpt_token_ids=[5, 6, 7, 8],
            cpt_mask=[1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3, 4],
        ),
    ),
}

# What else the model is to be given.
_MORE: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "Poly": lambda ids: {"task_ids": ids.sum(1) % 3},
    "Prompt tuning, several tasks": lambda ids: {"task_ids": ids.sum(1) % 3},
}


# They make tensors of their own in float32, which cannot be converted.
_IN_FLOAT32 = ("AdaMSS", "FourierFT")


def subjects() -> list[Subject]:
    """One for each method and base."""
    found = [
        Subject(
            row=row,
            column=name,
            task="texts",
            build=partial(method, base),
            more=_MORE.get(row, lambda ids: {}),
            **FLOAT32 if row in _IN_FLOAT32 else {},
        )
        for row, method in (LORA | OTHERS).items()
        for name, base in BASES.items()
    ]
    found += [
        Subject(
            row=row,
            column=name,
            task="language",
            build=partial(method, replace(BASES[name], task="CAUSAL_LM")),
        )
        for row, method in LANGUAGE.items()
        for name in ("GPT-2", "Llama")
    ]
    return found
