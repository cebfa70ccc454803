"""An engine over HTTP: what it samples is what is sampled here, and whatever it is not, it is refused or measured."""

from __future__ import annotations

import functools
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import gpt2, shifted, word_count, word_tokenizer

from lmgym.errors import LmGymError
from lmgym.models.policy import CausalPolicy, Responder
from lmgym.models.sampling import Sampler
from lmgym.remote.__main__ import main
from lmgym.remote.client import Client
from lmgym.remote.protocol import EngineError, make_request, read_completions
from lmgym.remote.served import ServedModel, Wrong
from lmgym.remote.server import Server
from lmgym.rollout import collect

CASES: dict[str, tuple[Sampler, dict[str, Any]]] = {
    "plain": (Sampler(), {}),
    "sharp": (Sampler(temperature=0.7, top_p=0.9), {}),
    "few": (Sampler(top_k=5), {"min_new_tokens": 3, "temperature": 1.4}),
}


@pytest.fixture(scope="module")
def served(model_dir: str) -> Iterator[Server]:
    with Server(ServedModel(model_dir)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def client(served: Server) -> Client:
    return Client(served.url)


class Remote:
    """A client as a `Responder`."""

    def __init__(self, client: Client) -> None:
        self.device = torch.device("cpu")
        self.complete = client.complete


@functools.cache
def make_envs(model_dir: str, **changes: Any) -> Any:
    parts = {"model": model_dir, "reward": word_count, "max_new_tokens": 8, "kl_coef": 0.2}
    parts["prompts"] = ["the film was", "a book", "it", "we liked the meal and"]
    return gym.make_vec("lmgym/RLHF-v0", num_envs=1, autoreset_mode="SameStep", **{**parts, **changes}).unwrapped


@pytest.mark.parametrize(("sampler", "changes"), CASES.values(), ids=CASES)
def test_an_engine_draws_what_is_drawn_here(
    model_dir: str, client: Client, sampler: Sampler, changes: dict[str, Any]
) -> None:
    envs = make_envs(model_dir, **changes)
    remote = Remote(client)
    assert isinstance(remote, Responder)
    assert not isinstance(CausalPolicy(envs.engine.lm), Responder)
    prompts = [envs.engine.prompts[i % 4] for i in range(24)]
    drawn = [
        collect(envs, policy, prompts, sampler, torch.Generator().manual_seed(shifted()))
        for policy in (CausalPolicy(envs.engine.lm), remote)
    ]
    for name in ("response_ids", "response_mask", "scores", "terminated"):
        assert torch.equal(getattr(drawn[0], name), getattr(drawn[1], name)), name
    assert torch.allclose(drawn[0].log_probs, drawn[1].log_probs, atol=1e-5)
    assert changes or drawn[1].lengths.unique().numel() > 1


def test_tokens_without_uniforms_are_of_the_engine(model_dir: str, served: Server) -> None:
    client = Client(served.url)
    client.is_ours = False  # as for vLLM, which has randomness of its own
    envs = make_envs(model_dir)
    prompts = [list(envs.engine.prompts[0].ids)] * 400
    uniforms = torch.zeros((400, envs.engine.horizon), dtype=torch.float64)
    response_ids, log_probs = client.complete(envs.engine.lm, prompts, Sampler(), uniforms, envs.engine.end_rule)
    state = CausalPolicy(envs.engine.lm).begin(*envs.engine.pad_prompts([envs.engine.prompts[0]]), envs.engine.horizon)
    expected = state.logits.log_softmax(-1)[0]
    assert torch.allclose(log_probs[:, 0], expected[response_ids[:, 0]], atol=1e-5)
    shares = torch.bincount(response_ids[:, 0], minlength=len(expected)) / 400
    assert (shares - expected.exp()).abs().max() < 0.1  # four standard deviations
    assert response_ids[:, 0].max() < envs.engine.lm.vocab_size  # the model embeds more


def test_weights_are_taken(model_dir: str, tmp_path: Path, client: Client, served: Server) -> None:
    prompt = {"prompt": [[5, 6, 7]], "max_tokens": 4, "uniforms": [[0.3] * 4], "ignore_eos": True}
    before = served.served.complete(prompt)
    gpt2(len(word_tokenizer()) + 3, seed=7).save_pretrained(tmp_path / "other")
    client.load_weights(tmp_path / "other")
    assert served.served.complete(prompt) != before
    gpt2(len(word_tokenizer()), seed=7).save_pretrained(tmp_path / "smaller")
    with pytest.raises(EngineError, match="400, `weights_path` must hold weights of the shapes of"):
        client.load_weights(tmp_path / "smaller")
    with pytest.raises(EngineError, match="400, `weights_path` must be a directory that is there"):
        client.load_weights(tmp_path / "none")
    client.load_weights(Path(model_dir))
    assert served.served.complete(prompt) == before


def test_an_engine_can_be_wrong_on_purpose(model_dir: str, served: Server, tmp_path: Path) -> None:
    prompt = {"prompt": [[5, 6, 7]], "max_tokens": 4, "uniforms": [[0.3] * 4], "ignore_eos": True}

    def log_probs(model: ServedModel) -> torch.Tensor:
        return torch.tensor(model.complete(prompt)[0]["logprobs"]["token_logprobs"])

    gpt2(len(word_tokenizer()) + 3, seed=7).save_pretrained(tmp_path)
    right = log_probs(served.served)
    assert 1e-5 < (log_probs(ServedModel(model_dir, Wrong(dtype="bfloat16"))) - right).abs().max() < 0.1
    model = ServedModel(model_dir, Wrong(stale=1))
    for _ in range(2):  # the weights that it had first, and those that it was sent first
        assert torch.equal(log_probs(model), right)
        model.load_weights(tmp_path)
    assert not torch.allclose(log_probs(model), right, atol=0.1)
    fresh = ServedModel(model_dir, Wrong(temperature=1.5))
    assert (log_probs(fresh) - right).abs().max() > 0.1


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"prompt": "the film"}, "`prompt` must be lists of token ids"),
    "token": ({"prompt": [[5, 999]]}, "Token id 999 is out of vocabulary"),
    "length": ({"prompt": [[5]], "max_tokens": 48}, "`max_tokens` must be at most 47 here"),
    "field": ({"prompt": [[5]], "max_tokens": 2, "n": 2}, "`field`"),
    "uniforms": ({"prompt": [[5]], "max_tokens": 2, "uniforms": [[0.5]]}, "`uniforms` must be"),
    "model": ({"prompt": [[5]], "model": "other"}, "`model` must be"),
}


@pytest.mark.parametrize(("body", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_answered_with_what_is_wrong(served: Server, body: dict[str, Any], message: str) -> None:
    request = urllib.request.Request(f"{served.url}/v1/completions", json.dumps(body).encode())
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    assert message in json.loads(caught.value.read())["error"]["message"]


def test_a_call_that_there_is_not_says_how_to_get_it(client: Client) -> None:
    with pytest.raises(EngineError, match="has no /nothing. Do this."):
        client._call("/nothing", {}, if_missing="Do this.")
    with pytest.raises(EngineError, match="refused /nothing: 404"):
        client._call("/nothing")


def test_what_does_not_answer_is_named() -> None:
    with pytest.raises(EngineError, match=r"No engine answers at http://127.0.0.1:9/health: .*refused"):
        Client("http://127.0.0.1:9")


def choice(index: int = 0, ids: Any = (1, 2), log_probs: Any = (-0.5, -1.0)) -> dict[str, Any]:
    return {"index": index, "token_ids": list(ids), "logprobs": {"token_logprobs": list(log_probs)}}


def test_completions_come_in_the_order_of_their_prompts() -> None:
    found = read_completions({"choices": [choice(1, [3], [-2.0]), choice(0)]}, 2, 4, 9)
    assert [completion.token_ids for completion in found] == [[1, 2], [3]]


BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "`choices`"),
    "no ids": ({"choices": [{"index": 0, "text": "a"}]}, "token_ids"),
    "no log-probs": ({"choices": [{"index": 0, "token_ids": [1], "logprobs": None}]}, "logprobs"),
    "too long": ({"choices": [choice(ids=[1] * 5, log_probs=[-1.0] * 5)]}, "a response of 5 tokens"),
    "empty": ({"choices": [choice(ids=[], log_probs=[])]}, "a response of 0 tokens"),
    "fewer": ({"choices": [choice(log_probs=[-1.0])]}, "1 log-probs of 2 tokens"),
    "strange": ({"choices": [choice(ids=[1, 9])]}, "token 9 of 9 that there are"),
    "not finite": ({"choices": [choice(log_probs=[-1.0, float("nan")])]}, "log-probs such as"),
    "positive": ({"choices": [choice(log_probs=[-1.0, 2.0])]}, "log-probs such as 2.0"),
    "one of two": ({"choices": [choice()] * 2}, "one response to each of 1 prompts, got 2"),
}


@pytest.mark.parametrize(("answer", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_must_hold_what_was_asked_for(answer: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        read_completions(answer, 1, 4, 9)


def test_a_response_must_have_ended(model_dir: str, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = make_envs(model_dir)
    monkeypatch.setattr(client, "_call", lambda *args, **named: {"choices": [choice(ids=[5, 6])]})
    with pytest.raises(EngineError, match="must end a response with an EOS or its token 8, got one of 2 tokens"):
        client.complete(envs.engine.lm, [[5]], Sampler(), torch.zeros((1, 8)), envs.engine.end_rule)


def test_ids_that_the_tokenizer_lacks_are_forbidden(model_dir: str) -> None:
    lm = make_envs(model_dir).engine.lm
    request = make_request(lm, [[5]], 4, Sampler(temperature=0.5))
    assert request["logit_bias"] == {str(token): -100.0 for token in range(lm.vocab_size, lm.embedded)}
    assert request["stop_token_ids"] == sorted(lm.eos_token_ids)
    assert (request["temperature"], request["ignore_eos"]) == (0.5, True)
    assert make_request(lm, [[5]], 4, Sampler(), stops=False)["stop_token_ids"] == []


def test_a_wrong_engine_must_be_one_that_there_can_be() -> None:
    with pytest.raises(LmGymError, match="`dtype`"):
        Wrong(dtype="int8")
    with pytest.raises(LmGymError, match="`stale`"):
        Wrong(stale=-1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "`MODEL` must be a local directory or a hub name, and there is no './nowhere'"),
        (["echo-4"], "`MODEL` must have weights in a directory, and the reference of echo-4 is a table"),
        (["reviews", "dtyp=bfloat16"], "Did you mean 'dtype'?"),
        (["reviews", "port=70000"], "`port` must be an int >= 0 and <= 65535"),
    ],
)
def test_a_wrong_command_ends_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert message in str(ended.value.code)
