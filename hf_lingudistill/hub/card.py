"""The model card: rendered from a training record and an evaluation report, with no network and no model in memory.

What neither holds is shown as "not evaluated" or "not recorded". Names, titles and texts in them may be anybody's: they are put
into metadata only where they are what the field asks for (a Hub id, a licence code), and into the page only with their Markdown
and HTML escaped.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from .results import Facts, Score, Task, is_finite, number, overlaid, record_of_demo, record_of_models, tasks_of

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
PAPER = "https://arxiv.org/abs/2604.00829"
TAGS = ("lingudistill", "trl", "sft", "distillation")
NOT_RECORDED = "not recorded"

# Names of models in a report, as readers know them. Any other arm is left out of the card: its report has it.
COLUMNS = {
    "original": "original LM",
    "before": "VLM before",
    "ce_only": "same steps, CE only",
    "ce": "same steps, CE only",
}

# Plots that lie beside a report, in the order in which a card shows them: {file name without its suffix: caption}.
PLOTS = {
    "scores": "Before and after, with 95 % intervals",
    "trade_off": "Language against vision",
    "training": "Training",
    "report": "Held-out perplexity and vision accuracy, before and after, with 95 % intervals",
}

# Datasets on the Hub that the built-in tasks are made of, for `.eval_results`.
HUB_DATASETS = {
    "xsum": "EdinburghNLP/xsum",
    "imdb": "stanfordnlp/imdb",
    "pubmedqa": "qiaojin/PubMedQA",
    "wikitext": "Salesforce/wikitext",
    "lambada": "EleutherAI/lambada_openai",
    "hellaswag": "Rowan/hellaswag",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "scienceqa": "lmms-lab/ScienceQA",
    "docvqa_val": "lmms-lab/DocVQA",
    "mmstar": "Lin-Chen/MMStar",
    "commonsenseqa_local": "tau/commonsense_qa",
}


# --------------------------------------------------------------------------------------------------------------------
# Anybody's text
# --------------------------------------------------------------------------------------------------------------------
def plain(text: Any, limit: int = 200) -> str:
    """One line without control, direction or other invisible characters, cut at `limit` characters."""
    line = " ".join(str(text).split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: Any, limit: int = 200) -> str:
    """Text as Markdown shows it letter by letter: no emphasis, link, image, table cell, HTML or heading of its own."""
    escaped = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", plain(text, limit))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def repo_or_none(name: Any) -> str | None:
    """The name, if it is a valid `ORG/NAME` (or a legacy `NAME`)."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if isinstance(name, str) else None


def _linked(fact: Facts, fallback: str) -> str:
    """A model or dataset as a link to the Hub where it has an id, else its escaped name."""
    if identity := repo_or_none(fact.get("id")):  # a Hub id counts more than any description
        prefix = "datasets/" if fact.get("kind") == "dataset" else ""
        return f"[{markdown(identity)}](https://huggingface.co/{prefix}{identity})"
    if prose := fact.get("prose"):
        return markdown(prose)
    name = fact.get("name")
    return f"the unpublished model {markdown(name)}" if name else fallback


# --------------------------------------------------------------------------------------------------------------------
# Metadata
# --------------------------------------------------------------------------------------------------------------------
def card_data(
    record: Facts,
    report: Facts,
    *,
    name: str,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    main: str | None = None,
    adapter: bool = False,
) -> ModelCardData:
    """The card's metadata block. The teacher is a tag: a second `base_model` would read as a merge."""
    student, teacher = record.get("student") or {}, record.get("teacher") or {}
    base = repo_or_none(base_model or student.get("id"))
    teacher_id = repo_or_none(teacher.get("id"))
    datasets = [identity for fact in record.get("datasets") or [] if (identity := repo_or_none(fact.get("id")))]
    code, licence_name, licence_link = licence_of(student, license)
    all_tags = [*TAGS, *([f"teacher:{teacher_id}"] if teacher_id else []), *tags]
    results = eval_results(tasks_of(report, main))
    extra: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    return ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        language=_languages(student.get("language")),
        library_name="peft" if adapter else "transformers",
        license=code,
        license_name=licence_name,
        license_link=licence_link,
        pipeline_tag="image-text-to-text",
        tags=[tag for tag in all_tags if re.fullmatch(r"[\w.:/-]{1,120}", tag)],
        model_name=plain(name, 96) if results else None,
        eval_results=results or None,
        **extra,
    )


def licence_of(student: Facts, chosen: str | None = None) -> tuple[str | None, str | None, str | None]:
    """(licence code, name, link): the chosen one, else the base model's. Names and links go with `other` alone."""
    code = chosen or student.get("license")
    if not isinstance(code, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", code):
        return None, None, None
    if chosen or code != "other":
        return code, None, None
    name, link = student.get("license_name"), student.get("license_link")
    named = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,60}", name)
    linked = isinstance(link, str) and re.fullmatch(r"https://[\w./%#?=&~+-]{1,200}", link)
    return code, name if named else None, link if linked else None


def _languages(found: Any) -> list[str] | None:
    codes = [found] if isinstance(found, str) else list(found or [])
    known = [code for code in codes if isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}|code|multilingual", code)]
    return known or None


def eval_results(tasks: Sequence[Task]) -> list[EvalResult]:
    """This model's scores for the card's `model-index`, one a task."""
    return [
        EvalResult(
            task_type="image-text-to-text" if task.group in ("vision", "grounded") else "text-generation",
            dataset_type=HUB_DATASETS.get(_slug(task), _slug(task)),
            dataset_name=plain(task.title, 120),
            dataset_config=_form(task),  # tells entries on the same data apart
            metric_type=_identifier(task.metric),
            metric_name=plain(task.unit or task.metric, 60),
            metric_value=task.scores["after"].value,
            metric_args=_interval(task),
        )
        for task in tasks
    ]


def eval_result_file(tasks: Sequence[Task], *, date: str | None = None) -> str | None:
    """`.eval_results/lingudistill.yaml`: the scores on datasets that the Hub has. None if there are none.

    date: ISO 8601; left out, the Hub takes the commit's.
    """
    entries = [
        EvalResultEntry(
            dataset_id=HUB_DATASETS[_slug(task)],
            task_id=_identifier(task.name.replace("/", "_") or task.metric),
            value=task.scores["after"].value,
            date=date,
            notes=f"{plain(task.unit or task.metric, 60)}, {task.n or 'an unknown number of'} items, hf_lingudistill",
        )
        for task in tasks
        if _slug(task) in HUB_DATASETS
    ]
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def _slug(task: Task) -> str:
    """The data that a task is made of: the second part of names such as `bits_per_byte/xsum/plain`."""
    parts = [part for part in task.name.split("/") if part]
    return _identifier(parts[1] if len(parts) > 1 else parts[0] if parts else task.title)


def _form(task: Task) -> str | None:
    """How the data is used: the third part of `bits_per_byte/xsum/plain`."""
    parts = [part for part in task.name.split("/") if part]
    return _identifier(parts[2]) if len(parts) > 2 else None


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")[:80] or "unnamed"


def _interval(task: Task) -> dict[str, Any] | None:
    after = task.scores["after"]
    known = {"low95": after.low, "high95": after.high, "items": task.n}
    return {name: value for name, value in known.items() if value is not None} or None


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------
def render_card(
    record: Facts,
    report: Facts,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    plots: Mapping[str, str] | None = None,
    command: str | None = None,
    main: str | None = None,
    adapter: bool = False,
) -> ModelCard:
    """Render the card of a distilled model.

    Args:
        record: `record.read_record`, or empty; the embedded demo's report holds one of its own.
        report: of `lingudistill evaluate` or of the demo, or empty.
        repo_id: where the model is or will be.
        name: the title; left out, the repository's name.
        base_model: Hub id of the VLM before, where the record has none.
        license: a licence code of the Hub; left out, the base model's.
        plots: {caption: path or URL in the repository}.
        command: what makes this model anew; left out, the recipe beside the card.
        main: the model of the report that this is; left out, `main_model`.
        adapter: a LoRA adapter and not whole weights.

    Raises:
        ValueError: if `huggingface_hub` finds the metadata invalid.
    """
    record = overlaid(record_of_demo(report) if "language" in report else record_of_models(report), record)
    tasks = tasks_of(report, main)
    title = name or (repo_id or "").split("/")[-1] or "This model"
    student = {**(record.get("student") or {}), **({"id": base_model} if base_model else {})}
    teacher = record.get("teacher") or {}
    data = card_data(
        record, report, name=title, base_model=base_model, license=license, tags=tags, main=main, adapter=adapter
    )
    before = _linked(student, "the VLM before")
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=markdown(title, 96),
        paper_url=PAPER,
        before=before,
        teacher=_linked(teacher, "its original language model"),
        same_model=_same_model(student),
        headline=_headline(tasks),
        snippet=_snippet(repo_id, adapter=adapter),
        adapter=adapter,
        language_table=_language_table(tasks),
        reading=_reading(report, tasks),
        plots=_plots(plots or {}),
        prompts=_prompts(report.get("prompts") or []),
        vision_table=_vision_table(tasks),
        vision_reading=_vision_reading(tasks),
        training=_training_rows(record),
        method=_method(record),
        limits=_limits(record, report, tasks),
        licence=_licence_text(student, teacher, license),
        **_reproduce(record, report, repo_id, command),
        versions=", ".join(f"{markdown(k)} {markdown(v)}" for k, v in (record.get("versions") or {}).items()),
    )
    return card


def _same_model(student: Facts) -> str:
    size = student.get("parameters")
    count = ""
    if size and is_finite(size):
        count = f" ({size / 1e6:,.1f}M parameters)" if size >= 1e6 else f" ({size:,} parameters)"
    return (
        f"It has the same architecture{count} and costs the same to run as before; it loads in plain transformers, without "
        "`hf_lingudistill`."
    )


def _headline(tasks: Sequence[Task]) -> str:
    """The first language benchmark in one sentence."""
    task = next((task for task in tasks if task.group == "language" and "before" in task.scores), None)
    if task is None:
        return ""
    unit = task.unit or task.metric.replace("_", " ")
    text = f"On {markdown(task.title)}: {number(task.scores['before'].value)} {markdown(unit)} before, "
    text += f"**{number(task.scores['after'].value)}** now"
    if "original" in task.scores:
        text += f", {number(task.scores['original'].value)} in the original language model"
    if isinstance(task.recovered, Score):
        text += f"; {task.recovered.value:.0%} of what was lost came back"
        if task.unit == "perplexity":
            text += " (in log-perplexity)"
    return text + "."


SNIPPET = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

repo = "{repo}"
processor = AutoProcessor.from_pretrained(repo)
model = AutoModelForImageTextToText.from_pretrained(repo)

picture = Image.open("picture.jpg")
question = [{{"type": "image"}}, {{"type": "text", "text": "What is in this picture?"}}]
messages = [{{"role": "user", "content": question}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[picture], return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def _snippet(repo_id: str | None, *, adapter: bool) -> str:
    return SNIPPET.format(repo=repo_or_none(repo_id) or "ORG/NAME")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _columns(tasks: Sequence[Task], wanted: Sequence[str]) -> dict[str, str]:
    """{model: heading} of those that some task has, this model's in bold."""
    headings = {**COLUMNS, "after": "**this model**"}
    return {model: headings[model] for model in wanted if any(model in task.scores for task in tasks)}


def _language_table(tasks: Sequence[Task]) -> str:
    rows = [task for task in tasks if task.group == "language"]
    if not rows:
        return ""
    columns = _columns(rows, ("original", "before", "after", "ce_only", "ce"))
    body = []
    for task in rows:
        scores = [str(task.scores[model]) if model in task.scores else "-" for model in columns]
        scores = [f"**{text}**" if model == "after" else text for model, text in zip(columns, scores, strict=True)]
        body.append([_label(task), str(task.n or "-"), *scores, _share(task.recovered)])
    return _table(["benchmark", "items", *columns.values(), "recovered"], body)


def _label(task: Task) -> str:
    direction = "higher" if task.higher_is_better else "lower"
    unit = task.unit or task.metric.replace("_", " ")
    return f"{markdown(task.title)} ({markdown(unit)}, {direction} is better)"


def _share(recovered: Score | str | None) -> str:
    if recovered is None:
        return "not evaluated"
    if isinstance(recovered, str):
        return markdown(recovered)
    if recovered.low is None or recovered.high is None:
        return f"{recovered.value:.0%}"
    return f"{recovered.value:.0%} [{recovered.low:.0%}, {recovered.high:.0%}]"


def _reading(report: Facts, tasks: Sequence[Task]) -> str:
    text = (
        "In brackets: 95 % bootstrap intervals over items. *Recovered*: the share of what the original language model had and "
        "the VLM before had lost that came back"
    )
    text += "; of a perplexity, of its logarithm." if any(t.unit == "perplexity" for t in tasks) else "."
    suite, config = report.get("suite") or {}, report.get("config") or {}
    if isinstance(suite, Mapping) and suite.get("name"):
        text += f" Suite `{_identifier(str(suite['name']))}`, seed {markdown(suite.get('seed', NOT_RECORDED))}."
    elif "demo" in config:
        text += f" {_demo_size(report)}"
    return " ".join([text, *_against_ce(tasks)])


def _against_ce(tasks: Sequence[Task]) -> list[str]:
    """Sentences on what distillation adds to plain cross-entropy: as important to a reader as the gain itself."""
    rows = [task for task in tasks if {"ce_only", "ce"} & task.scores.keys()]
    if not rows:
        return []
    sentences = ["*CE only* is the same start, rows and steps with plain cross-entropy."]
    for task in rows:
        if task.group == "language" and task.ce_recovered:
            sentences.append(f"It recovered {task.ce_recovered.value:.0%} on {markdown(task.title)}.")
        if verdict := _verdict(task.ce_change, task, "better than it", "worse than it", "not told apart from it"):
            sentences.append(f"On {markdown(task.title)} this model is {verdict}.")
    return sentences


def _verdict(change: Score | None, task: Task, better: str, worse: str, neither: str) -> str | None:
    """What a paired difference with its interval says; None without one."""
    if change is None or change.low is None or change.high is None:
        return None
    if change.low <= 0 <= change.high:
        return neither
    return better if (change.value > 0) == task.higher_is_better else worse


def _demo_size(report: Facts) -> str:
    tokens = (report.get("language") or {}).get("n_tokens")
    return f"One run, seed {markdown(report['config'].get('seed', NOT_RECORDED))}" + (
        f"; {tokens:,} tokens of text." if isinstance(tokens, int) else "."
    )


def _plots(plots: Mapping[str, str]) -> str:
    return "\n\n".join(f"![{markdown(caption)}]({path})" for caption, path in plots.items())


def _prompts(prompts: Sequence[Facts]) -> str:
    lines = []
    for entry in prompts:
        lines.append(f"> {plain(entry.get('prompt', ''), 400)}" + ("  [with an image]" if entry.get("image") else ""))
        for arm, label in (("original", "original LM"), ("before", "VLM before"), ("after", "this model")):
            if entry.get(arm) is not None:
                answer = f"  {label:<12} {plain(entry[arm], 400) or '(nothing)'}"
                lines += textwrap.wrap(answer, 92, subsequent_indent=" " * 15) or [answer]
    return fenced("\n".join(lines)) if lines else ""


def _vision_table(tasks: Sequence[Task]) -> str:
    rows = [task for task in tasks if task.group in ("vision", "grounded")]
    if not rows:
        return ""
    columns = _columns(rows, ("before", "after", "ce_only", "ce"))
    controls = list(dict.fromkeys(name for task in rows for name in task.controls))
    body = []
    for task in rows:
        scores = [str(task.scores[model]) if model in task.scores else "-" for model in columns]
        scores = [f"**{text}**" if model == "after" else text for model, text in zip(columns, scores, strict=True)]
        change = task.change.signed() if task.change else "-"
        blind = [str(task.controls[name]) if name in task.controls else "-" for name in controls]
        body.append([_label(task), str(task.n or "-"), *scores, change, *blind])
    blind_heads = [f"images {markdown(name)}" for name in controls]
    return _table(["benchmark", "items", *columns.values(), "this model - before", *blind_heads], body)


def _vision_reading(tasks: Sequence[Task]) -> str:
    rows = [task for task in tasks if task.group in ("vision", "grounded")]
    sentences = []
    for task in rows:
        nothing = f"no difference that {task.n or 'these'} items can show"
        if verdict := _verdict(task.change, task, "a gain", "a loss", nothing):
            sentences.append(f"{markdown(task.title)}: {verdict}.")
        elif task.change is not None:
            sentences.append(
                f"{markdown(task.title)}: {task.change.value:+.3f}, with no interval of the difference itself."
            )
    if any(task.controls for task in rows):
        sentences.append(
            "On the right, this model's scores when the images are exchanged or blank: a score that these reach too says nothing "
            "about vision."
        )
    return " ".join(sentences)


def _training_rows(record: Facts) -> list[tuple[str, str]]:
    """(what, value) of the training table; all of it escaped."""
    student, teacher, settings = (record.get(name) or {} for name in ("student", "teacher", "settings"))
    training, hardware = record.get("training") or {}, record.get("hardware") or {}
    known: Any = lambda value, text: NOT_RECORDED if value is None else markdown(text)  # noqa: E731
    mib, kl = teacher.get("mib"), teacher.get("quantization_kl")
    quantised = known(teacher.get("quantization"), teacher.get("quantization"))
    if teacher.get("arithmetic"):
        quantised += f", computed in {markdown(teacher['arithmetic'])}"
    memory = f", {mib:,.1f} MiB" if is_finite(mib) else ""
    fidelity = f", KL to full precision {kl:.4f} nats a token" if is_finite(kl) else ""
    ce, kd = settings.get("ce_weight"), settings.get("distill_weight")
    loss = f"{ce} x CE + {kd} x divergence at distilled tokens, CE elsewhere"
    loss += f" (beta {settings.get('beta')}, temperature {settings.get('temperature')})"
    gate = settings.get("distill_tokens")
    margin = f", margin {settings.get('distill_margin')} nats" if settings.get("distill_margin") else ""
    batch = settings.get("per_device_train_batch_size")
    accumulation = settings.get("gradient_accumulation_steps") or 1
    return [
        ("student (VLM before)", _pinned(student)),
        ("teacher (frozen)", f"{_pinned(teacher)}; weights in {quantised}{memory}{fidelity}"),
        ("data", _data_rows(record.get("datasets") or [])),
        ("distilled share", _shares(training)),
        ("`kv_sharing`", known(settings.get("kv_sharing"), settings.get("kv_sharing"))),
        ("`distill_tokens`", known(gate, f"{gate}{margin}")),
        ("loss", known(ce, loss)),
        ("steps", known(training.get("steps"), _count(training.get("steps")))),
        (
            "batch",
            known(
                batch,
                f"{batch} rows a device x {accumulation} accumulation x {hardware.get('processes') or 1} process(es)",
            ),
        ),  # fmt: skip
        ("tokens seen", known(training.get("tokens"), _count(training.get("tokens")))),
        ("learning rate", known(settings.get("learning_rate"), settings.get("learning_rate"))),
        ("hardware", _hardware_text(hardware)),
        ("seconds", known(training.get("seconds"), _count(training.get("seconds")))),
        ("seed", known(settings.get("seed"), settings.get("seed"))),
    ]


def _count(value: Any) -> str:
    return f"{value:,.0f}" if is_finite(value) else str(value)


def _pinned(fact: Facts) -> str:
    revision = fact.get("revision")
    text = _linked(fact, NOT_RECORDED)
    return f"{text} at `{revision}`" if isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) else text


def _data_rows(datasets: Sequence[Facts]) -> str:
    parts = []
    for fact in datasets:
        text = _pinned({**fact, "kind": "dataset"})
        if not fact.get("id"):
            text = markdown(fact.get("name") or NOT_RECORDED)
        details = [str(fact[key]) for key in ("config", "split") if fact.get(key)]
        if fact.get("distill") is not None:
            details.append("distilled" if fact["distill"] else "cross-entropy only")
        parts.append(text + (f" ({markdown(', '.join(details))})" if details else ""))
    return "; ".join(parts) or NOT_RECORDED


def _shares(training: Facts) -> str:
    rows, tokens = training.get("distilled_rows_share"), training.get("distilled_tokens_share")
    parts = [f"{rows:.0%} of the rows"] if is_finite(rows) else []
    parts += [f"{tokens:.0%} of the answer tokens"] if is_finite(tokens) else []
    return ", ".join(parts) or NOT_RECORDED


def _hardware_text(hardware: Facts) -> str:
    if not hardware.get("device"):
        return NOT_RECORDED
    device = "CPU" if hardware["device"] == "cpu" else str(hardware["device"])
    processes, threads = hardware.get("processes") or 1, hardware.get("threads")
    parts = [f"{processes} x {device}" if processes > 1 else device]
    parts += [f"{threads} threads"] if threads else []
    parts += [str(hardware["precision"])] if hardware.get("precision") else []
    return markdown(", ".join(parts))


_SHARING = {
    "full": "reads the student's keys and values at every position",
    "prompt": "reads the student's keys and values at the prompt, text and image, and its own at the answer",
    "vision": "reads the student's keys and values at image tokens and its own at all text",
    "none": "reads its own keys and values only, with images left out",
}


def _method(record: Facts) -> str:
    settings = record.get("settings") or {}
    reads = _SHARING.get(str(settings.get("kv_sharing")), "may read the student's keys and values")
    others = "the others are trained with cross-entropy"
    if settings.get("distill_tokens") == "confident":
        others = "the others, and tokens whose label it finds less likely than the student does, are trained with cross-entropy"
    return (
        f"The frozen language model has never seen an image: layer by layer it {reads}. Rows that are marked for distillation "
        f"are trained towards its next-token distribution; {others}. It is dropped after training."
    )


def _limits(record: Facts, report: Facts, tasks: Sequence[Task]) -> list[str]:
    """What a reader must not conclude."""
    groups = {task.group for task in tasks}
    names = {"language": "language", "vision": "vision", "grounded": "long answers about an image"}
    missing = [title for group, title in names.items() if group not in groups]
    limits = []
    if missing:
        limits.append(f"Not evaluated: {', '.join(missing)}.")
    limits.append("Not evaluated: safety, bias, factuality, and languages other than those of the benchmarks.")
    if tasks:
        limits.append("One training run: the intervals are over items, not over seeds.")
    if (report.get("config") or {}).get("demo"):
        limits.append("A demonstration that is made in minutes, not a model to use.")
    limits.append(
        "Distillation gives back what the language model knew; it teaches nothing new and does not improve vision. What the "
        "VLM before got wrong about images, and the biases of its training data, are still there."
    )
    return limits


def _licence_text(student: Facts, teacher: Facts, chosen: str | None) -> str:
    code, name, link = licence_of(student, chosen)
    other = teacher.get("license")
    if code is None:
        text = (
            "**Not chosen yet.** The card of the VLM before names no licence, and none is guessed here: read the terms of both "
            "models and of the data, then set `license:` at the top of this card (`lingudistill publish --license ID`)."
        )
    elif chosen:
        text = f"`{code}`, chosen by the publisher."
    else:
        shown = f"[{markdown(name or code)}]({link})" if link else f"`{markdown(name or code)}`"
        text = f"{shown}, inherited from the VLM before, whose terms also hold here."
    if isinstance(other, str) and other != code:
        text += f" The teacher's licence is `{_identifier_of_licence(other)}`: check that the two, and the data's, go together."
    return text


def _identifier_of_licence(code: str) -> str:
    return re.sub(r"[^\w.+-]", "", code)[:60] or "unknown"


def _reproduce(record: Facts, report: Facts, repo_id: str | None, command: str | None) -> dict[str, str]:
    """{"command", "command_note"} of the card's last section."""
    demo = (report.get("config") or {}).get("demo")
    if command is None and demo in ("tiny", "real"):
        command = "make demo" if demo == "tiny" else "make demo-real"
    if command is not None:
        return {"command": command, "command_note": "In a clone of hf_lingudistill."}
    recipe = record.get("recipe") or {}
    if not recipe:
        return {"command": "# the recipe of this run was not recorded", "command_note": ""}
    where = repo_or_none(repo_id) or "ORG/NAME"
    note = "Names in `recipe.yaml` without an organisation are folders that are not on the Hub."
    if not recipe.get("dataset_name") and not recipe.get("datasets"):
        note = "The rows were given in Python: add them to `recipe.yaml` as `dataset_name` or `datasets`. " + note
    return {
        "command": f"pip install hf_lingudistill\nhf download {where} recipe.yaml --local-dir .\n"
        "accelerate launch -m hf_lingudistill.scripts.distill --config recipe.yaml --output_dir OUT",
        "command_note": note,
    }
