"""`lingudistill publish`: a saved model, its card and report to the Hub, and a Space that shows it."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace

from ..exit_codes import DONE
from .arguments import add_before_and_original
from .command import Command
from .errors import bad_input, not_published


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUT", help="the folder of the saved model, or OUT of an embedded demo")
    parser.add_argument("--repo_id", required=True, metavar="ORG/NAME", help="the model's repository; made if need be")
    parser.add_argument("--private", action="store_true", help="make the repository (and the Space) private")
    parser.add_argument(
        "--report", metavar="DIR", help="what `lingudistill evaluate` wrote; default: looked for in OUT"
    )
    add_before_and_original(
        parser,
        before="the VLM before; default: what the run's facts say",
        original="the original LM; default: what they say",
        place="ORG/",
    )
    parser.add_argument("--license", metavar="ID", help="a licence's code on the Hub; default: that of the VLM before")
    parser.add_argument("--tag", help="a name for this commit; default: lingudistill- and its first digits")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--space", metavar="ORG/SPACE", help="also publish the Space that shows before and after")
    parser.add_argument("--space_files", metavar="DIR", help="the Space's app; default: examples/space of the clone")
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be sent and print the card; send nothing"
    )


def run(args: Namespace) -> int:
    from ..hub.manifest import PublishError, command_for
    from ..hub.model import model_manifest
    from ..hub.publish import publish, whole_name
    from ..hub.space import space_manifest

    if args.space_files and not args.space:
        return bad_input("--space_files are of --space, which is not given: name the Space, or leave them out.")
    command = command_for(args.output_dir, args.repo_id, private=args.private)
    command += "".join(
        f" --{name} {shlex.quote(value)}"
        for name in ("report", "before", "original", "license", "tag", "revision", "space", "space_files")
        if (value := getattr(args, name))
    )
    try:
        repo_id = args.repo_id if args.dry_run else whole_name(args.repo_id, command)
    except PublishError as error:
        return not_published(error)
    try:
        manifest = model_manifest(
            args.output_dir,
            repo_id,
            private=args.private,
            report=args.report,
            base_model=args.before,
            teacher=args.original,
            license=args.license,
            revision=args.revision,
            tag=args.tag,
            command=command,
            space=args.space,
        )
        manifests = [manifest]
        if args.space:
            manifests.append(
                space_manifest(
                    manifest, args.space, before=args.before, original=args.original, files=args.space_files
                )
            )
    except PublishError as error:
        return bad_input(str(error))
    print("\n\n".join(map(str, manifests)))
    if args.dry_run:
        print(f"\n{manifest.text('README.md')}")
        return DONE
    try:
        for manifest in manifests:
            done = publish(manifest)
            print(f"{done.url}: {len(done.sent)} of {len(manifest.items)} files sent, {done.tag or done.commit[:8]}")
            if done.removed:
                print(f"  removed there, of the weights before: {', '.join(done.removed)}")
            if done.kept:
                print(f"  kept as edited on the Hub, in README.md: {', '.join(done.kept)}")
    except PublishError as error:
        return not_published(error)
    return DONE


COMMAND = Command(
    name="publish",
    help="send a saved model to the Hub, with its card",
    description="Send a saved model to the Hub: plain weights, processor, a model card rendered from the run's record and the "
    "evaluation's report, plots and recipe. Run again after a failure, it sends what is missing. The token comes from "
    "`hf auth login` or HF_TOKEN. Exit code: 0 published, 2 bad input, 3 not published.",
    add_arguments=add_arguments,
    run=run,
)
