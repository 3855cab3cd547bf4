"""One fault at every request of a push: survived, or said with the command that goes on."""

from __future__ import annotations

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub import Fault, Hub
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import close_session
from pushed import TOKEN, contents, on_the_hub, planned, point_to

from hf_lingudistill.hub.manifest import PublishError, command_for
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish


def test_the_hub_is_as_strict_as_the_real_one(hub: Hub, model: Path) -> None:
    """Controls: the checks above could not fail if this Hub took everything."""
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    session, oid = hub_http.get_session(), hashlib.sha256(b"right").hexdigest()
    assert session.put(f"{hub.storage_url}/storage/{oid}", content=b"wrong").status_code == 400
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    assert session.put(f"{hub.storage_url}/storage/{oid}", content=b"right", headers=with_token).status_code == 400
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "x.bin", "oid": oid, "size": 5}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer = session.post(f"{hub.url}/api/models/ann/model/commit/main", content=body, headers=with_token)
    assert answer.status_code == 400  # never uploaded
    assert session.post(f"{hub.url}/api/models/ann/model/commit/main", content=body).status_code == 401
    ranged = session.get(f"{hub.url}/ann/model/resolve/main/config.json", headers={"Range": "bytes=1-3"})
    assert (ranged.status_code, ranged.content) == (206, (model / "config.json").read_bytes()[1:4])


STEPS = (
    "whoami",
    "create_repo",
    "repo_info",
    "tree",
    "validate_yaml",
    "preupload",
    "lfs_batch",
    "lfs_put",
    "lfs_verify",
    "commit",
    "create_tag",
)
FAULTS = {
    "500": Fault(status=500),
    "429": Fault(status=429, retry_after=7),
    "cut before": Fault(cut="before"),
    "cut after": Fault(cut="after"),
    "cut in the answer": Fault(cut="middle"),
    "slow": Fault(slow=0.02),
}


def test_the_steps_below_are_all_that_a_push_takes(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert set(hub.steps()) - {"agents"} == set(STEPS)


# Which step is tried again does not depend on the kind of fault, nor the other way round. So: every step suffers one kind, and every kind
# hits one step that we try again and one that huggingface_hub does. A lost answer is apart: the step may have been done.
ONCE = [(step, "500") for step in STEPS]
ONCE += [(step, kind) for step in ("commit", "lfs_put") for kind in FAULTS if kind != "500"]
ONCE += [(step, "cut after") for step in ("create_repo", "create_tag")]


@pytest.mark.parametrize(("step", "kind"), ONCE)
def test_one_fault_is_survived(hub: Hub, model: Path, waits: list[float], step: str, kind: str) -> None:
    hub.fail(step, FAULTS[kind])
    manifest = model_manifest(model, "ann/model")
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert hub.faults[step] == []  # control: it did happen
    if kind == "429":
        assert waits == [8.0]  # what the Hub asked for, and a second more
    # a slow answer is waited for, and so is one without a body that is "cut in the middle"
    assert waits or kind == "slow" or (step, kind) == ("lfs_put", "cut in the answer")


DONE_ALREADY = [("lfs_put", "cut after"), ("commit", "cut after"), ("create_tag", "cut after"), ("lfs_verify", "500")]


@pytest.mark.parametrize(("step", "kind"), DONE_ALREADY)
def test_what_was_done_before_the_answer_was_lost_is_not_done_again(
    hub: Hub, model: Path, waits: list[float], step: str, kind: str
) -> None:
    """However often the answer is lost: the work is there, and the next attempt finds it."""
    fault = FAULTS[kind]
    hub.fail(step, Fault(fault.status, fault.retry_after, fault.cut, times=1000))
    manifest = model_manifest(model, "ann/model")
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert len(hub.repos["model", "ann/model"].commits) == 2  # the Hub's own first one, and ours, once


FOR_GOOD = [(step, "500") for step in STEPS if step != "lfs_verify"]
FOR_GOOD += [("commit", "429"), ("commit", "cut before"), ("lfs_put", "cut before"), ("create_repo", "cut after")]


@pytest.mark.parametrize(("step", "kind"), FOR_GOOD)
def test_after_a_failure_the_same_command_goes_on(
    hub: Hub, model: Path, waits: list[float], step: str, kind: str
) -> None:
    fault, before = FAULTS[kind], contents(model)
    hub.fail(step, Fault(fault.status, fault.retry_after, fault.cut, times=1000))
    manifest = model_manifest(model, "ann/model")
    with pytest.raises(PublishError) as failure:
        publish(manifest, token=TOKEN)
    assert str(failure.value).endswith(f"The local files are whole. To go on: {command_for(model, 'ann/model')}")
    assert "\n" not in str(failure.value) and contents(model) == before
    hub.heal()
    already = list(hub.uploads)
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert not set(hub.uploads[len(already) :]) & set(already)  # what had arrived is not sent again


def test_a_second_push_uploads_nothing(hub: Hub, model: Path) -> None:
    manifest = model_manifest(model, "ann/model")
    first = publish(manifest, token=TOKEN)
    uploads = list(hub.uploads)
    hub.requests.clear()
    second = publish(manifest, token=TOKEN)
    assert hub.uploads == uploads and not {"lfs_put", "commit"} & set(hub.steps())
    assert (second.commit, second.tag, second.sent) == (first.commit, first.tag, ())
    # control: one changed file makes a commit of that file, and the weights are not sent again
    (model / "generation_config.json").write_text('{"do_sample": true}')
    third = publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert third.sent == ("generation_config.json",) and third.commit != first.commit and hub.uploads == uploads


def test_what_arrived_is_compared_with_what_was_sent(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_commit = HfApi.create_commit

    def lossy(self: HfApi, *args: Any, operations: list[Any], **kwargs: Any) -> Any:
        kept = [operation for operation in operations if operation.path_in_repo != "config.json"]
        return create_commit(self, *args, operations=kept, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", lossy)
    with pytest.raises(PublishError, match="config.json on ann/model is not what was sent \\(1 files differ\\)"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_large_files_go_in_parts(model: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    with Hub(multipart_bytes=50_000) as hub:
        hub.add_user("ann", token=TOKEN)
        point_to(hub, monkeypatch)
        hub.fail("lfs_put", Fault(status=500))
        publish(model_manifest(model, "ann/model"), token=TOKEN)
        assert "lfs_complete" in hub.steps()
        assert hub.files("ann/model")["model.safetensors"] == (model / "model.safetensors").read_bytes()
        close_session()


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    monkeypatch.setattr(huggingface_hub.file_download, "time", types.SimpleNamespace(sleep=lambda _: None))
    hub.fail("storage_get", Fault(cut="middle"))
    path = hf_hub_download("ann/model", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (model / "model.safetensors").read_bytes()
    assert hub.steps().count("storage_get") == 2
