"""Tokens, names, visibility, branches: who may, and what nobody may see."""

from __future__ import annotations

import io
import logging
import traceback
from pathlib import Path

import pytest
from hub import Fault, Hub
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session
from pushed import OLD_TOKEN, READ_TOKEN, TOKEN, on_the_hub, planned, point_to

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub import publish as publishing
from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish


@pytest.mark.parametrize(
    ("token", "repo_id", "sentence"),
    [
        (
            OLD_TOKEN,
            "ann/model",
            "Could not sign in: the Hub does not accept the token (expired, revoked or mistyped)",
        ),
        (READ_TOKEN, "ann/model", "The token of ann can read only: make one that may write"),
        (None, "ann/model", "Could not sign in: there is no Hub token; run `hf auth login`, or set HF_TOKEN."),
        (TOKEN, "bob/model", "Could not create the repository: the token may not write to bob/model"),
    ],
)
def test_a_token_that_does_not_do_is_said_in_one_sentence(
    hub: Hub, model: Path, token: str | None, repo_id: str, sentence: str
) -> None:
    with pytest.raises(PublishError) as failure:
        publish(model_manifest(model, repo_id), token=token)
    assert sentence in str(failure.value) and "\n" not in str(failure.value)
    assert "lingudistill publish" in str(failure.value)
    assert hub.repos == {}


def test_a_name_of_another_type_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(shared_names=True) as hub:
        hub.add_user("ann", token=TOKEN)
        point_to(hub, monkeypatch)
        HfApi(token=TOKEN).create_repo("ann/model", repo_type="space", space_sdk="gradio")
        with pytest.raises(PublishError, match="the Hub has no model ann/model .* a repository of another type"):
            publish(model_manifest(model, "ann/model"), token=TOKEN)
        assert list(hub.repos) == [("space", "ann/model")]
        close_session()


def test_private_is_not_made_public_by_accident(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/public"), token=TOKEN)
    with pytest.raises(PublishError, match="ann/public exists and is public: make it private in its settings"):
        publish(model_manifest(model, "ann/public", private=True), token=TOKEN)
    publish(model_manifest(model, "ann/private", private=True), token=TOKEN)
    assert hub.repos["model", "ann/private"].private and not hub.repos["model", "ann/public"].private


def test_a_branch_is_made_and_main_stays(hub: Hub, model: Path) -> None:
    manifest = model_manifest(model, "ann/model", revision="dev")
    published = publish(manifest, token=TOKEN)
    assert hub.repos["model", "ann/model"].branches["dev"] == published.commit
    assert hub.files("ann/model", revision="dev").keys() - {".gitattributes"} == planned(manifest).keys()
    assert on_the_hub(hub) == {}  # main
    assert publish(manifest, token=TOKEN).sent == ()


def test_a_tag_is_not_moved(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model", tag="v1"), token=TOKEN)
    (model / "generation_config.json").write_text('{"do_sample": true}')
    with pytest.raises(PublishError, match="its tag 'v1' names another commit"):
        publish(model_manifest(model, "ann/model", tag="v1"), token=TOKEN)
    assert publish(model_manifest(model, "ann/model", tag="v2"), token=TOKEN).tag == "v2"


def test_offline_by_choice_is_said(model: Path) -> None:
    with pytest.raises(PublishError, match="Could not sign in: HF_HUB_OFFLINE is set; unset it"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_an_interruption_says_how_to_go_on(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)  # where Ctrl-C would come: an upload takes long
    with pytest.raises(PublishError, match="Interrupted at: send the files. To go on: .*lingudistill publish"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_the_token_is_in_no_log_and_no_traceback(
    hub: Hub, model: Path, waits: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2", "httpcore2", "httpx", "httpcore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    hub.fail("commit", Fault(status=500, times=1000))
    shown = ""
    try:
        publish(model_manifest(model, "ann/model"), token=TOKEN)
    except PublishError:
        shown = traceback.format_exc()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)
    told = capsys.readouterr()
    assert "PublishError" in shown and "commit" in stream.getvalue()
    for text in (shown, stream.getvalue(), caplog.text, told.out, told.err):
        assert TOKEN not in text
    assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)  # control: it was used
    # a server that echoes it is not repeated either
    echo = publishing._Steps("ann/model", "model", "lingudistill publish", TOKEN)._sentence(
        "x", ValueError(f"bad {TOKEN}")
    )
    assert TOKEN not in echo and "hf_***" in echo
    # nor is one of another shape than the Hub's
    other = publishing._Steps("ann/model", "model", "lingudistill publish", "a-secret-of-ours")
    assert "a-secret-of-ours" not in other._sentence("x", ValueError("bad a-secret-of-ours"))


@pytest.mark.parametrize(("private", "gated"), [(True, False), (False, True), (False, False)])
def test_a_repository_that_may_not_be_read_is_one_line(
    hub: Hub,
    saved_pair: tuple[Path, Path],
    model: Path,
    capsys: pytest.CaptureFixture[str],
    private: bool,
    gated: bool,
) -> None:
    if private or gated:
        publish(model_manifest(model, "ann/model", private=private), token=TOKEN)
        hub.repos["model", "ann/model"].gated = gated
    capsys.readouterr()
    assert cli(["check", "ann/model", str(saved_pair[1])]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("lingudistill: ") and "\n" not in told and "ann/model" in told
