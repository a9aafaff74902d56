"""An audit bundle: what it holds, that every change is found, its signature, and verdicts that can be reproduced."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from harness import TINIEST, sculpt
from huggingface_hub import ModelCard

from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.run.audit import write_audit
from sculpt_dist.run.audit_files import check_signature
from sculpt_dist.run.rescore import rescore
from sculpt_dist.run.verify import verify_place

ATTACKS = ["evaluate.attacks=[leak, noise]", "attack.options.noise={etas: [1.0], scales: [1.0]}", "attack.cases=1"]


@pytest.fixture(scope="module")
def run(finished_run, canvas_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(finished_run, folder)
    sculpt("unlearn", canvas_config, *TINIEST, *ATTACKS, f"run.folder={folder}")
    return folder


def test_a_bundle_holds_the_claims_and_what_checks_them(run, tmp_path):
    bundle = write_audit(run, tmp_path / "bundle")
    names = {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()}
    assert {"README.md", "config.yaml", "manifest.json", "report/report.html", "model/CHECKSUMS", "SHA256SUMS"} <= names
    assert {"evaluation/before/scores.json", "evaluation/after-00/images.csv", "attacks/attacks.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(bundle / "README.md")
    metrics = {result.metric_type for result in card.data.eval_results}
    assert {"UA", "IRA", "ASR_noise", "ASR_plain"} <= metrics and "ASR_leak" not in metrics
    assert "others, or more of the same, may succeed" in card.text
    assert verify_place(bundle).num_files == len(names) - 1 and check_signature(bundle, None) is None


def test_every_change_to_a_bundle_is_found(run, tmp_path):
    bundle = write_audit(run, tmp_path / "bundle")
    scores = bundle / "evaluation" / "after-00" / "scores.json"
    text = scores.read_text()
    scores.write_text(text.replace("0.", "1.", 1))
    with pytest.raises(RunFolderError, match="scores.json: differs"):
        verify_place(bundle)
    scores.unlink()
    with pytest.raises(RunFolderError, match="scores.json: is missing"):
        verify_place(bundle)
    scores.write_text(text)
    (bundle / "extra.txt").write_text("")
    with pytest.raises(RunFolderError, match="extra.txt: is not in SHA256SUMS"):
        verify_place(bundle)


def test_a_zip_is_the_same_every_time_and_a_broken_one_is_refused(run, tmp_path):
    place = write_audit(run, tmp_path / "bundle.zip")
    first = place.read_bytes()
    assert write_audit(run, place).read_bytes() == first and verify_place(place).num_files > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.zip"]
    with zipfile.ZipFile(place, "a") as packed:
        packed.writestr("../outside", "")
    with pytest.raises(RunFolderError, match="is not in SHA256SUMS"):
        verify_place(place)
    place.write_bytes(first[:-200] + bytes(100) + first[-100:])
    with pytest.raises(RunFolderError):
        verify_place(place)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_signature_names_who_signed(run, tmp_path):
    for name in ("key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    bundle = write_audit(run, tmp_path / "bundle.zip", tmp_path / "key")
    signers = tmp_path / "signers"
    signers.write_text(f"audit@lab {(tmp_path / 'key.pub').read_text()}")
    assert "audit@lab" in sculpt("verify", str(bundle), "--signers", str(signers))
    assert "ED25519" in check_signature(bundle, None)
    signers.write_text(f"audit@lab {(tmp_path / 'other.pub').read_text()}")
    with pytest.raises(RunFolderError, match="signed by nobody"):
        check_signature(bundle, signers)
    folder = tmp_path / "folder"
    with zipfile.ZipFile(bundle) as packed:
        packed.extractall(folder)
    (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text() + f"{'0' * 64}  README.md\n")
    with pytest.raises(RunFolderError, match="signature is wrong"):
        check_signature(folder, None)
    with pytest.raises(ConfigError, match="could not sign"):
        write_audit(run, tmp_path / "bundle.zip", tmp_path / "signers")
    assert "ED25519" in check_signature(bundle, None), "the earlier bundle stays"


def test_verdicts_are_reproduced_or_the_bundle_is_refused(run, tmp_path):
    bundle = write_audit(run, tmp_path / "bundle.zip")
    assert "2 of 2 images drawn again are judged as recorded" in sculpt(
        "verify", str(bundle), "--images", "5", "--model", str(run / "model")
    )
    changed = tmp_path / "changed"
    with zipfile.ZipFile(bundle) as packed:
        packed.extractall(changed)
    answers = changed / "evaluation" / "after-00" / "answers.json"
    content = json.loads(answers.read_text())
    answers.write_text(json.dumps(content | {"object_seen": [7] * len(content["object_seen"])}))
    with pytest.raises(RunFolderError, match="judged as recorded"):
        rescore(changed, run / "model", 5)
    other = tmp_path / "other"
    shutil.copytree(run / "model", other)
    (other / "CHECKSUMS").write_text("")
    with pytest.raises(ConfigError, match="not those of the bundle"):
        rescore(bundle, other, 1)


def test_what_is_no_finished_run_or_no_bundle_is_refused(run, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "model")
    with pytest.raises(RunFolderError, match="is not finished, or its model is gone"):
        write_audit(unfinished)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="is no audit bundle"):
        write_audit(run, tmp_path / "taken")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    scores = damaged / "evaluation" / "after-00" / "scores.json"
    scores.write_text(scores.read_text().replace("0.", "1.", 1))
    with pytest.raises(RunFolderError, match="scores.json"):
        write_audit(damaged)
