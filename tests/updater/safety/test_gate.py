"""The gate: fails closed, on exactly the bytes that would be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moorline.events import Decision, Verdict
from moorline.settings import BoundSettings, GateSettings
from moorline.store import ArtifactStore
from updater.learning.policy import AdapterState, Policy
from updater.safety import Gate, ProbesInvalid, load_probes
from updater.safety.trust_region import TrustRegion

CANARIES = [
    {"prompt": "What is two plus two?", "reply": "Four."},
    {"prompt": "Name a color.", "reply": "Blue is a color."},
    {"text": "Water boils at one hundred degrees at sea level, as everybody learns in school."},
]


class Judged:
    """A gate with everything it needs, on the tiny model."""

    def __init__(self, model_dir: Path, root: Path, **limits: float) -> None:
        path = root / "probes.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in CANARIES))
        probes = load_probes(path, model_dir)
        self.policy = Policy(model_dir, rank=4, alpha=8, seed=0)
        self.live = self.policy.state()
        self.store = ArtifactStore(root / "store")
        self.region = TrustRegion(self.policy, probes.sequences, BoundSettings(), 256)
        self.gate = Gate(self.policy, probes, self.region, self.store, GateSettings(**limits))

    def judge(self, adapter: AdapterState) -> Verdict:
        digest, files = self.store.put(self.policy.adapter_files(adapter))
        return self.gate.judge(digest, files, self.live)

    def moved(self, size: float) -> AdapterState:
        generator = torch.Generator().manual_seed(5)
        return {
            name: tensor + size * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self.live.items()
        }


@pytest.fixture
def judged(tiny_model_dir: Path, tmp_path: Path) -> Judged:
    return Judged(tiny_model_dir, tmp_path)


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_a_policy_that_did_not_move_passes_on_its_own_bytes(judged: Judged) -> None:
    digest, files = judged.store.put(judged.policy.adapter_files(judged.live))
    verdict = judged.gate.judge(digest, files, judged.live)
    assert verdict.decision is Decision.PASS
    assert verdict.artifact_digest == digest
    assert all(check.passed for check in verdict.checks)
    assert {"hash", "finite", "kl_live_mean_nats", "perplexity_rise_from_anchor"} <= {
        check.name for check in verdict.checks
    }


def test_a_policy_that_jumped_is_blocked_by_what_it_exceeds(judged: Judged) -> None:
    verdict = judged.judge(judged.moved(0.3))
    assert verdict.decision is Decision.BLOCK
    assert {"kl_live_mean_nats", "kl_anchor_mean_nats"} <= failed(verdict)
    for check in verdict.checks:
        if check.measured is not None and check.limit is not None:
            assert check.passed == (check.measured <= check.limit)


def test_perplexity_alone_can_block(tiny_model_dir: Path, tmp_path: Path) -> None:
    generous = dict.fromkeys(
        (
            "live_kl_mean_nats",
            "live_kl_max_prompt_nats",
            "anchor_kl_mean_nats",
            "anchor_kl_max_prompt_nats",
        ),
        1e9,
    )
    judged = Judged(tiny_model_dir, tmp_path, **generous, perplexity_rise_share=1e-9)
    for seed in range(1, 6):  # some direction makes the text less likely
        moved = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.manual_seed(seed))
            for name, tensor in judged.live.items()
        }
        verdict = judged.judge(moved)
        if verdict.decision is Decision.BLOCK:
            assert "perplexity_rise_from_live" in failed(verdict)
            return
    pytest.fail("no direction raised the perplexity")


def test_nan_weights_are_blocked(judged: Judged) -> None:
    adapter = judged.moved(0.0)
    next(iter(adapter.values())).view(-1)[0] = float("nan")
    verdict = judged.judge(adapter)
    assert verdict.decision is Decision.BLOCK
    assert failed(verdict) == {"finite"}


def test_a_changed_byte_is_held_not_passed(judged: Judged) -> None:
    digest, files = judged.store.put(judged.policy.adapter_files(judged.live))
    weights = judged.store.open(digest, files) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(bytes(content))
    verdict = judged.gate.judge(digest, files, judged.live)
    assert verdict.decision is Decision.HOLD
    assert failed(verdict) == {"completed"}


def test_an_adapter_of_another_shape_is_blocked(judged: Judged) -> None:
    adapter = dict(list(judged.live.items())[:-1])
    assert judged.judge(adapter).decision is Decision.BLOCK


def test_the_policy_is_left_as_it_was(judged: Judged) -> None:
    before = judged.policy.state()
    judged.judge(judged.moved(0.3))
    assert all(torch.equal(before[n], tensor) for n, tensor in judged.policy.state().items())


def test_the_own_probe_set_is_usable(tiny_model_dir: Path) -> None:
    probes = load_probes(None, tiny_model_dir)
    assert len(probes.chats) >= 8
    assert len(probes.texts) >= 3
    assert all(s.prompt_token_ids and s.completion_token_ids for s in probes.sequences)


@pytest.mark.parametrize(
    "content",
    ["{not json}", '{"prompt": "only a prompt"}', '["a list"]', '{"text": ""}', ""],
)
def test_bad_probes_are_refused_with_what_is_expected(
    tiny_model_dir: Path, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(content)
    with pytest.raises(ProbesInvalid, match="probe"):
        load_probes(path, tiny_model_dir)


def test_a_missing_probe_file_is_one_clear_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbesInvalid, match=r"gate\.probes"):
        load_probes(tmp_path / "none.jsonl", tiny_model_dir)
