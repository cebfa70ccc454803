"""What `from_pretrained` returns is not trusted: damaged, incomplete and unfit models are refused before an episode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gpt2, word_tokenizer
from extras import needs_peft
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2ForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
)

from agents.policies.actor_critic import ActorCritic
from agents.policies.lora import LoRAPolicy
from lmgym.errors import InvalidArgumentError, LmGymError, NotFiniteError
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.models.probes import check_log_probs
from lmgym.models.sharing import load_causal_lm
from lmgym.rewards.classifier import load_reward_model
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import make_task

TOKENIZER = word_tokenizer()
V = len(TOKENIZER)
WIDE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": V,
    "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CAUSAL: dict[str, PretrainedConfig] = {
    "GPT-2": gpt2(V).config,
    "Llama": LlamaConfig(**WIDE, num_key_value_heads=1, tie_word_embeddings=False),
    "OPT": OPTConfig(**WIDE, ffn_dim=24, word_embed_proj_dim=16),
    "RoBERTa": RobertaConfig(**WIDE, is_decoder=True),
}
CLASSIFIERS: dict[str, PretrainedConfig] = {
    "GPT-2": gpt2(V, cls=GPT2ForSequenceClassification, num_labels=1).config,
    "Llama": LlamaConfig(**WIDE, num_key_value_heads=1, num_labels=1),
    "RoBERTa": RobertaConfig(**WIDE, num_labels=1),
}


def save(model: Any, directory: Path, tokenizer: Any = TOKENIZER) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def built(auto: Any, config: PretrainedConfig) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config)


@pytest.fixture(scope="module", params=CAUSAL)
def causal_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = built(AutoModelForCausalLM, CAUSAL[request.param])
    return save(model, tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = built(AutoModelForSequenceClassification, CLASSIFIERS[request.param])
    return save(model, tmp_path_factory.mktemp("classifier"))


# -- files -----------------------------------------------------------------------------------------------------------


def keep_half(directory: Path, file: str) -> None:
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: len(content) // 2])


def write(text: str) -> Callable[[Path, str], None]:
    return lambda directory, file: (directory / file).write_text(text) and None


def change_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, str], None]:
    def damage(directory: Path, file: str) -> None:
        weights = load_file(directory / file)
        change(weights)
        save_file(weights, directory / file, {"format": "pt"})

    return damage


def drop_a_layer(weights: dict[str, Any]) -> None:
    for name in [name for name in weights if ".1." in name]:
        del weights[name]


def add_a_layer(weights: dict[str, Any]) -> None:
    for name in [name for name in weights if ".1." in name]:
        weights[name.replace(".1.", ".2.")] = weights[name].clone()


def change_a_shape(weights: dict[str, Any]) -> None:
    name = next(name for name in weights if ".1." in name and weights[name].dim() == 1)
    weights[name] = torch.zeros(3)


def spoil(weights: dict[str, Any]) -> None:
    weights[next(name for name in weights if ".1." in name)].fill_(torch.nan)


def double(weights: dict[str, Any]) -> None:
    for weight in weights.values():
        weight.mul_(2)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
DAMAGES: list[tuple[str, Callable[[Path, str], None], str]] = [
    ("model.safetensors", write(POINTER), r"git-lfs pointer in place of model.safetensors: run .*git lfs pull"),
    ("tokenizer.json", write(POINTER), r"git-lfs pointer in place of tokenizer.json"),
    ("model.safetensors", keep_half, r"model.safetensors is damaged .*copy or download it again"),
    ("model.safetensors", write(""), r"model.safetensors is empty"),
    ("tokenizer.json", keep_half, r"tokenizer.json is not JSON .*download it again"),
    ("tokenizer.json", write("{}"), r"could not be loaded|has no tokenizer"),
    ("tokenizer_config.json", keep_half, r"tokenizer_config.json is not JSON"),
    ("config.json", keep_half, r"config.json is not JSON"),
    ("config.json", write("[]"), r"config.json must hold a JSON object, and holds \[\]"),
    ("config.json", write("[" * 10**5), r"config.json is not JSON"),
    ("generation_config.json", write("{"), r"generation_config.json is not JSON"),
    ("model.safetensors", change_weights(drop_a_layer), r"lacks weights of \w+, which would be drawn at random"),
    ("model.safetensors", change_weights(add_a_layer), r"has weights of more layers than its config.json says"),
    ("model.safetensors", change_weights(change_a_shape), r"has weights of other shapes .* is \(3,\)"),
    ("model.safetensors", change_weights(spoil), r"has weights that are not finite numbers: .*1\."),
    ("tokenizer.json", lambda directory, file: (directory / file).unlink(), r"has no tokenizer|could not be loaded"),
    ("model.safetensors", lambda directory, file: (directory / file).unlink(), r"could not be loaded"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_a_damaged_model_is_one_error(
    causal_dir: Path, file: str, damage: Callable[[Path, str], None], message: str, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(causal_dir, tmp_path / "own"))
    damage(own, file)
    with pytest.raises(LmGymError, match=message) as caught:
        gym.make(
            "lmgym/RLHF-v0", task="keyword-8", model=str(own), prompts=["the film"], max_new_tokens=2, device="cpu"
        )
    assert str(caught.value).startswith(f"`model` {str(own)!r} ")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("file", "damage", "message"), [d for d in DAMAGES if d[0] != "generation_config.json"])
def test_a_damaged_reward_model_is_one_error(
    classifier_dir: Path, file: str, damage: Callable[[Path, str], None], message: str, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(classifier_dir, tmp_path / "own"))
    damage(own, file)
    with pytest.raises(LmGymError, match=message) as caught:
        load_reward_model(str(own), "cpu")
    assert str(caught.value).startswith(f"`reward` {str(own)!r} ")


def remove_a_part(directory: Path) -> None:
    next(iter(sorted(directory.glob("model-*.safetensors")))).unlink()


def change_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        change(index)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


NO_MAP = r"model.safetensors.index.json does not say which file a weight is in \(`weight_map`\)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove_a_part,
            r"model.safetensors.index.json names model-00001-of-.*, which is not there: copy or",
        ),
        (lambda directory: sorted(directory.glob("model-*"))[1].write_bytes(b""), r"model-00002-of-.* is empty"),
        (change_index(lambda index: index.pop("weight_map")), NO_MAP),
        (change_index(lambda index: index["weight_map"].update({"lm_head.weight": 3})), NO_MAP),
    ],
)
def test_a_model_in_parts_that_lacks_one_is_one_error(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save(gpt2(V), tmp_path)
    gpt2(V).save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    load_causal_lm(str(tmp_path), "cpu")
    damage(tmp_path)
    with pytest.raises(LmGymError, match=f"`model` '{tmp_path}' .*{message}"):
        load_causal_lm(str(tmp_path), "cpu")


def test_a_whole_model_loads_without_a_word(causal_dir: Path, recwarn: pytest.WarningsRecorder) -> None:
    lm = load_causal_lm(str(causal_dir), "cpu")
    assert lm.vocab_size == V
    assert not [w for w in recwarn if "lmgym" in w.filename or "has weights" in str(w.message)]


def test_weights_that_the_model_lacks_are_named(causal_dir: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(causal_dir, tmp_path / "own"))
    change_weights(lambda weights: weights.update({"v_head.summary.weight": torch.zeros(1, 16)}))(
        own, "model.safetensors"
    )
    with pytest.warns(UserWarning, match="does not have, and they are left out: v_head.summary.weight"):
        load_causal_lm(str(own), "cpu")


def test_a_name_that_is_nearly_right_is_told(causal_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(causal_dir, tmp_path / "checkpoint-5")
    with pytest.raises(InvalidArgumentError, match=r"has none. Did you mean '.*checkpoint-5'\?"):
        load_causal_lm(str(tmp_path), "cpu")
    with pytest.raises(InvalidArgumentError, match=r"must be a directory .*, got the file '.*model.safetensors'"):
        load_causal_lm(str(tmp_path / "checkpoint-5" / "model.safetensors"), "cpu")


def test_a_directory_that_is_written_anew_is_read_anew(causal_dir: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(causal_dir, tmp_path / "own"))
    before = load_causal_lm(str(own), "cpu")
    assert load_causal_lm(str(own), "cpu") is before
    change_weights(double)(own, "model.safetensors")
    assert load_causal_lm(str(own), "cpu") is not before


# -- what a model is -------------------------------------------------------------------------------------------------


def test_a_model_that_sees_what_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    config = BertConfig(**WIDE)
    own = save(built(AutoModelForCausalLM, config), tmp_path / "bert")
    with pytest.raises(
        LmGymError, match="`model` '.*' must be a causal language model, and this BertLMHeadModel is not"
    ):
        load_causal_lm(str(own), "cpu")
    masked = save(BertForMaskedLM(config), tmp_path / "masked")
    with pytest.raises(LmGymError, match="must be a causal language model"):
        load_causal_lm(str(masked), "cpu")
    config.is_decoder = True
    assert load_causal_lm(str(save(built(AutoModelForCausalLM, config), tmp_path / "decoder")), "cpu").vocab_size == V


def test_one_that_is_handed_over_live_is_refused_as_well() -> None:
    lm = CausalLM(freeze(built(AutoModelForCausalLM, BertConfig(**WIDE))), TOKENIZER)
    with pytest.raises(LmGymError, match="must be a causal language model"):
        gym.make("lmgym/RLHF-v0", task="keyword-8", model=lm, prompts=["the film"], max_new_tokens=2, device="cpu")


@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model])
def test_a_tokenizer_with_more_tokens_says_resize(load: Any, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    cls = {} if load is load_causal_lm else {"cls": GPT2ForSequenceClassification, "num_labels": 1}
    own = save(gpt2(V, **cls), tmp_path / "own", tokenizer)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=rf"embeds {V} tokens .* up to {V + 1}.*resize_token_embeddings"):
        load(str(own), "cpu")


def test_float16_that_overflows_names_the_dtype(tmp_path: Path) -> None:
    model = gpt2(V)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3e4)  # type: ignore[union-attr, operator]
    own = str(save(model, tmp_path / "own"))
    with pytest.raises(InvalidArgumentError, match=r"`dtype` must be .*'float16'.*65,504.*dtype='bfloat16'"):
        load_causal_lm(own, "cpu", "float16")
    assert load_causal_lm(own, "cpu", "bfloat16").dtype == torch.bfloat16


def test_float16_that_overflows_on_a_prompt_alone_names_the_dtype(tmp_path: Path) -> None:
    model = gpt2(V)
    word = TOKENIZER.convert_tokens_to_ids("hated")
    with torch.no_grad():
        model.transformer.wte.weight[word] = 6e4  # type: ignore[union-attr, index]
    own = str(save(model, tmp_path / "own"))
    kwargs = {"task": "keyword-8", "model": own, "max_new_tokens": 2, "device": "cpu", "kl_coef": 0.0}
    gym.make("lmgym/RLHF-v0", prompts=["the hated"], **kwargs)
    with pytest.raises(InvalidArgumentError, match="`dtype` must be"):
        gym.make("lmgym/RLHF-v0", prompts=["the hated"], dtype="float16", **kwargs)


def overflow(model: Any) -> None:
    """Makes the logits larger than float16 has numbers, as training might."""
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(6e4)


@pytest.mark.parametrize("dense_kl", [True, False])
def test_a_reference_that_overflows_later_names_the_dtype(dense_kl: bool, tmp_path: Path) -> None:
    """Probes read the prompts; the rewards of a response come from logits that nothing has read before."""
    settings = {
        "model": str(save(gpt2(V), tmp_path / "own")),
        "dtype": "float16",
        "dense_kl": dense_kl,
        "prompts": ["the hated"],
    }
    env = gym.make("lmgym/RLHF-v0", task="keyword-8", max_new_tokens=2, device="cpu", **settings)
    engine = env.unwrapped.engine  # type: ignore[attr-defined]
    env.reset(seed=0)
    overflow(engine.lm.model)
    try:
        with pytest.raises(InvalidArgumentError, match="`dtype` must be .*'float16'.*65,504.*dtype='bfloat16'"):
            for _ in range(2):
                env.step(4)
        with pytest.raises(gym.error.ResetNeeded):
            env.step(4)
        with pytest.raises(InvalidArgumentError, match="`dtype` must be"):
            engine.replay([engine.prompts[0]], np.array([[4, 4]]))
    finally:
        with torch.no_grad():  # the model is shared
            engine.lm.model.transformer.ln_f.weight.div_(6e4)


def test_what_a_table_leaves_out_is_at_minus_infinity_by_right() -> None:
    table = make_task("keyword-8").reference("cpu")
    check_log_probs(table, np.array([-np.inf, -1.0]))
    with pytest.raises(LmGymError, match="must give finite logits, and does not in float32"):
        check_log_probs(table, np.array([np.nan, -1.0]))


def test_a_policy_that_overflows_names_the_dtype(tmp_path: Path) -> None:
    own = str(save(gpt2(V), tmp_path / "own"))
    settings: dict[str, Any] = {"max_new_tokens": 3, "device": "cpu", "kl_coef": 0.0, "model": own}
    settings |= {"prompts": ["the hated"], "reward": lambda prompts, completions, **_: [0.0] * len(completions)}
    for dtype, message in (("float16", r"overflow \(the largest number of float16 is 65,504"), ("bfloat16", None)):
        envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=2, dtype=dtype, autoreset_mode="SameStep", **settings)
        policy = ActorCritic(envs.unwrapped.engine.lm)
        overflow(policy.actor)
        for draw in (collect, collect_steps):
            if message is None:
                assert len(draw(envs, policy, 2)) == 2
                continue
            with pytest.raises(NotFiniteError, match=message):
                draw(envs, policy, 2)


@pytest.mark.slow
def test_a_model_that_transformers_does_not_have_is_named_shortly(tmp_path: Path) -> None:
    own = save(gpt2(V), tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "distilbert"}))
    with pytest.raises(LmGymError, match="transformers has no such model of DistilBertConfig"):
        load_causal_lm(str(own), "cpu")
    foreign = config | {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (own / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(LmGymError, match="none is run from a model's directory"):
        load_causal_lm(str(own), "cpu")


# -- adapters --------------------------------------------------------------------------------------------------------


def adapted(base: Path, directory: Path, modules: str = "all-linear") -> LoRAPolicy:
    """A LoRA policy that has moved from the base, and its checkpoint in `directory`."""
    policy = LoRAPolicy(load_causal_lm(str(base), "cpu"), rank=2, modules=modules)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.adapter:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    directory.mkdir()
    policy.save(directory)
    return policy


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None]).logits


@needs_peft
@pytest.mark.parametrize("modules", ["all-linear", "embeddings"])
def test_a_checkpoint_of_lora_loads_as_one_whole_model(causal_dir: Path, modules: str, tmp_path: Path) -> None:
    if modules == "embeddings":
        model = load_causal_lm(str(causal_dir), "cpu").model
        embeddings = model.get_input_embeddings()
        modules = next(path for path, module in model.named_modules() if module is embeddings)
    state = torch.random.get_rng_state()
    policy = adapted(causal_dir, tmp_path / "first", modules)
    lm = load_causal_lm(str(tmp_path / "first"), "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(logits_of(lm.model), logits_of(policy.actor), rtol=0, atol=1e-4)
    base = load_causal_lm(str(causal_dir), "cpu").model
    assert (logits_of(lm.model) - logits_of(base)).abs().max() > 1e-3
    assert not hasattr(lm.model, "peft_config")
    ActorCritic(lm).save(tmp_path)  # a policy that starts from it is a whole model again
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again), logits_of(lm.model), rtol=0, atol=1e-5)


@needs_peft
def test_an_adapter_on_an_adapter_finds_both(model_dir: str, tmp_path: Path) -> None:
    adapted(Path(model_dir), tmp_path / "first")
    policy = adapted(tmp_path / "first", tmp_path / "second")
    lm = load_causal_lm(str(tmp_path / "second"), "cpu")
    torch.testing.assert_close(logits_of(lm.model), logits_of(policy.actor), rtol=0, atol=1e-4)
    env = gym.make("lmgym/RLHF-v0", task="keyword-8", model=lm, prompts=["the film"], max_new_tokens=2, device="cpu")
    env.reset(seed=0)
    assert CausalPolicy(lm).device.type == "cpu"


@needs_peft
def test_an_adapter_of_a_reward_model_brings_its_head(model_dir: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    peft = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    peft.save_pretrained(tmp_path / "reward")  # no tokenizer: it is the base's
    reward = load_reward_model(str(tmp_path / "reward"), "cpu")
    torch.testing.assert_close(logits_of(reward.model), logits_of(peft), rtol=0, atol=1e-5)
    with pytest.raises(LmGymError, match=r"`model` .* is an adapter of another kind of model \(SEQ_CLS\)"):
        load_causal_lm(str(tmp_path / "reward"), "cpu")


def break_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def drop_a_weight(directory: Path) -> None:
    change_weights(lambda weights: weights.__delitem__(min(weights)))(directory, "adapter_model.safetensors")


@needs_peft
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_config(base_model_name_or_path=None), "adapter was trained on, and names none"),
        (break_config(base_model_name_or_path="/gone/away"), "there is no '/gone/away'"),
        (break_config(base_model_name_or_path="."), "names itself"),
        (break_config(peft_type="NO_SUCH_TYPE"), "could not be loaded with peft"),
        (lambda own: keep_half(own, "adapter_config.json"), "adapter_config.json is not JSON"),
        (lambda own: keep_half(own, "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (drop_a_weight, "lacks weights of its adapter"),
    ],
)
def test_a_damaged_adapter_is_one_error(
    change: Callable[[Path], None], message: str, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(Path(model_dir), tmp_path / "own")
    change(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    with pytest.raises(LmGymError, match=message):
        load_causal_lm(str(tmp_path / "own"), "cpu")


@needs_peft
def test_an_adapter_on_another_model_is_refused(model_dir: str, tmp_path: Path) -> None:
    adapted(Path(model_dir), tmp_path / "own")
    other = save(gpt2(V, n_embd=16), tmp_path / "other")
    break_config(base_model_name_or_path=str(other))(tmp_path / "own")
    with pytest.raises(LmGymError, match="could not be loaded with peft"):
        load_causal_lm(str(tmp_path / "own"), "cpu")


def test_an_adapter_without_peft_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match="is an adapter, which needs the package peft: pip install peft"):
        load_causal_lm(str(tmp_path), "cpu")
