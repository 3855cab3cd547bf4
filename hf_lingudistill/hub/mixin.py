"""What a distilling trainer saves beside its model and sends to the Hub, as a mixin for any such trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import HfApi, get_token

from ..checkpoints import set_aside_other_kind
from ..folders import write_whole
from .card import render_card, usage_of
from .edits import UnreadableCard, merged
from .manifest import PublishError, check_repo_id, command_for
from .model import model_manifest
from .publish import Published, publish, whole_name
from .run_facts import RunFacts, dataset_fact, gather_run_facts, read_run_facts, write_run_facts

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = (
        object  # at run time a trainer class stands behind the mixin: `class MyTrainer(PublishingMixin, SFTTrainer)`
    )

logger = logging.getLogger(__name__)


class PublishingMixin(_Trainer):
    """`Trainer`'s saving and pushing, with the run's facts, our model card and one checked publication.

    Mixed in before a trainer class of transformers or TRL. Beyond `Trainer` itself it relies on the two names without a default
    below. Those with a default are for whoever knows more: the trainer that measures, the script that read the data.

    Attributes:
        teacher_name_or_path: Hub id or folder of the frozen LM.
        teacher: has `footprint`, its size in bytes.
        recipe: the run's arguments as a YAML recipe names them; left out, those of `args` that differ from their defaults.
        dataset_facts: `dataset_fact` of each data source.
        has_distill_column, distill_share: whether rows are marked for distillation, and which share of them is.
        teacher_quantization_kl: KL(full-precision teacher || quantised teacher) in nats per token.
        teacher_arithmetic: what the teacher's products are computed in.
        teacher_part: of a teacher that is a VLM, "text half" or "whole"; None of an LM.
    """

    # TRL's, for cards and trackers
    _name = "LinguDistill"
    _paper = {"title": "LinguDistill", "id": "2604.00829"}

    teacher_name_or_path: str
    teacher: Any
    model: Any  # narrower than transformers' declarations, which admit None
    hub_model_id: Any
    recipe: Mapping[str, Any] | None = None
    dataset_facts: Sequence[RunFacts] = ()
    has_distill_column: bool | None = False
    distill_share: float | None = None
    teacher_quantization_kl: float | None = None
    teacher_arithmetic: str | None = None
    teacher_part: Any = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, with the run's facts (`lingudistill.json`) beside the model.

        With `push_to_hub=True` the model is published as well; if that fails, it is logged, with what goes on.
        """
        readme = Path(output_dir or str(self.args.output_dir)) / "README.md"
        card = readme.read_bytes() if readme.is_file() else None
        super().save_model(output_dir, _internal_call=True)
        if self.is_world_process_zero():
            # PEFT writes the base model's folder into the card that is there, or a card of its own
            if is_peft_model(self.model) and card is not None:
                readme.write_bytes(card)
            elif is_peft_model(self.model):
                readme.unlink(missing_ok=True)
            folder = output_dir or str(self.args.output_dir)
            set_aside_other_kind(folder, adapter=is_peft_model(self.model))
            run_facts = gather_run_facts(self, recipe=self.recipe, datasets=self.dataset_facts)
            write_run_facts(run_facts, folder)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            except PublishError as error:
                logger.error("Saved, but not published. %s", error)

    def create_model_card(  # type: ignore[override]  # SFTTrainer's own signature
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` to `output_dir`, rendered from the run's facts in place of TRL's automatic card. What somebody edited in
        an earlier one stays."""
        if not self.is_world_process_zero():
            return
        run_facts = gather_run_facts(self, recipe=self.recipe, datasets=self._dataset_facts(dataset_name))
        processor, student = self.processing_class, run_facts["student"]
        usage = usage_of(
            self.hub_model_id,
            adapter=is_peft_model(self.model),
            base=student["id"],
            chat=getattr(processor, "chat_template", None) is not None,
        )
        card = render_card(run_facts, {}, repo_id=self.hub_model_id, name=model_name, tags=_as_list(tags), usage=usage)
        readme = Path(str(self.args.output_dir)) / "README.md"
        try:
            text = merged(str(card), readme.read_text(encoding="utf-8"))[0] if readme.is_file() else str(card)
        except UnreadableCard as error:
            logger.error("%s is left as it is: %s.", readme, error)
            return
        readme.parent.mkdir(parents=True, exist_ok=True)
        write_whole(readme, text)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Name the repository. It is made when there is something to publish: no Hub, no reason not to train."""
        self.hub_model_id = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        self.push_in_progress = None
        try:
            check_repo_id(self.hub_model_id)
        except PublishError as error:
            raise ValueError(f"hub_model_id (default: the name of output_dir): {error}") from None
        if (
            self.args.push_to_hub
            and self.is_world_process_zero()
            and not (token or self.args.hub_token or get_token())
        ):
            raise ValueError(
                "push_to_hub: nobody is signed in to the Hub. Run `hf auth login`, or set HF_TOKEN, or leave it out: "
                f"`{command_for(str(self.args.output_dir), self.hub_model_id)}` publishes the finished model later."
            )

    def push_to_hub(  # type: ignore[override]  # says more than a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        save: bool = True,
        **kwargs: Any,
    ) -> Published | Future[Published] | None:
        """Save to `output_dir` and publish what is there: the model, its processor, card, run facts and recipe, no more.

        The arguments are those of `Trainer.push_to_hub`; kwargs those of `create_model_card`. With `save=False` the folder is
        taken as it is: it may hold more than this trainer knows, such as merged weights. Returns where it is now, a
        future of that with `blocking=False`, and None on any process but the first.

        Raises:
            PublishError: if it could not be published. The saved model is whole; the message names the command that goes on.
        """
        if save:
            self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo()
        if not self.is_world_process_zero():
            return None
        args, out = self.args, str(self.args.output_dir)
        token = token or args.hub_token
        private = bool(args.hub_private_repo if private is None else private)
        command = command_for(out, self.hub_model_id, private=private)
        self.hub_model_id = whole_name(self.hub_model_id, command, token=token)
        self.create_model_card(**kwargs)
        run_facts = {**read_run_facts(out)}
        run_facts["datasets"] = run_facts.get("datasets") or self._dataset_facts(kwargs.get("dataset_name"))
        manifest = model_manifest(
            out,
            self.hub_model_id,
            private=private,
            run_facts=run_facts,
            tags=_as_list(kwargs.get("tags")),
            revision=revision or args.hub_revision,
            message=commit_message,
        )
        if blocking:
            return publish(manifest, token=token)
        return HfApi().run_as_future(publish, manifest, token=token)

    def _dataset_facts(self, dataset_name: str | None) -> list[RunFacts]:
        """What the script said about the data, or the name that the caller of a push gave."""
        return list(self.dataset_facts) or ([dataset_fact(dataset_name)] if dataset_name else [])


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
