"""`lmi-multi deploy` and `undeploy`: endpoints on SageMaker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lmi_multi.cli.console import json_page, line, note, waiting

if TYPE_CHECKING:
    from lmi_multi.deploy.deployment import Deployment
    from lmi_multi.fit import Option

_ENDPOINT = "Endpoint"
_MODEL = "Model (the server's settings)"


def deploy(
    model: Annotated[
        str, typer.Argument(help="s3://BUCKET/PREFIX, a Hub id such as gpt2, or 'demo'.")
    ],
    instance: Annotated[
        str,
        typer.Option(help="Such as ml.g5.12xlarge; see plan.", rich_help_panel=_ENDPOINT),
    ],
    image: Annotated[
        str,
        typer.Option(
            envvar="LMI_MULTI_IMAGE",
            help="The image in a registry that SageMaker can read.",
            rich_help_panel=_ENDPOINT,
        ),
    ],
    role: Annotated[
        str,
        typer.Option(
            envvar="LMI_MULTI_ROLE",
            help="The ARN of the endpoint's role.",
            rich_help_panel=_ENDPOINT,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Default: the last part of MODEL.", rich_help_panel=_ENDPOINT),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A variable of the container; may be repeated.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    instances: Annotated[
        int, typer.Option(help="Instances, at the least.", rich_help_panel=_ENDPOINT)
    ] = 1,
    max_instances: Annotated[
        int | None,
        typer.Option(help="Scale up to so many.", rich_help_panel=_ENDPOINT),
    ] = None,
    invocations: Annotated[
        int,
        typer.Option(
            help="Requests a minute and instance to scale for.", rich_help_panel=_ENDPOINT
        ),
    ] = 60,
    volume: Annotated[
        int | None,
        typer.Option(
            help="GiB; only for instances without disks of their own.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    ami: Annotated[
        str | None,
        typer.Option(
            help="InferenceAmiVersion, which decides on the driver.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    download_timeout: Annotated[
        int,
        typer.Option(help="Seconds for fetching the model from S3.", rich_help_panel=_ENDPOINT),
    ] = 3600,
    startup_timeout: Annotated[
        int,
        typer.Option(help="Seconds until the container answers.", rich_help_panel=_ENDPOINT),
    ] = 1800,
    dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, fp16 or bf16.", rich_help_panel=_MODEL)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or fp8.", rich_help_panel=_MODEL)
    ] = None,
    tensor_parallel: Annotated[
        str | None,
        typer.Option(
            help="Ranks that share the model, or max; default: the fewest that fit.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    pipeline_parallel: Annotated[
        int | None,
        typer.Option(
            help="Stages that share the layers; each takes --tensor-parallel ranks. Default: 1.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    memory_share: Annotated[
        float | None,
        typer.Option(
            help="Part of a GPU's memory that the model may take; else 0.9.", rich_help_panel=_MODEL
        ),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Prompts computed at once.", rich_help_panel=_MODEL)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer in all.", rich_help_panel=_MODEL),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of a Hub id.", rich_help_panel=_MODEL),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Read the model's headers first, and refuse one that does not fit.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the calls as JSON, and make none of them.")
    ] = False,
) -> None:
    """Make an endpoint on SageMaker: model, configuration, endpoint, scaling.

    Waits until it is in service, and then prints its name. It costs money from then on, until
    `lmi-multi undeploy NAME`. After a failure or Ctrl-C a line says what exists by then.
    """
    from lmi_multi.deploy.endpoint import create
    from lmi_multi.deploy.prepare import prepare

    deployment, option = prepare(
        model,
        instance,
        settings={
            "dtype": dtype,
            "quantize": quantize,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "memory_share": memory_share,
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "revision": revision,
        },
        environment=parse_environment(env or []),
        check=check,
        name=name,
        image=image,
        role=role,
        instances=instances,
        max_instances=max_instances,
        invocations=invocations,
        volume=volume,
        ami=ami,
        download_timeout=download_timeout,
        startup_timeout=startup_timeout,
    )
    note(_estimate(deployment, option))
    if deployment.instance.backend == "neuron":
        note("nothing of this has run on a NeuronCore yet: docs/neuron.md")
    if dry_run:
        json_page([call.shown() for call in deployment.calls()])
        return
    with waiting(f"endpoint {deployment.name}") as status:
        create(deployment, note, status)
    line(deployment.name)


def undeploy(
    name: Annotated[str, typer.Argument(help="The endpoint's name.")],
) -> None:
    """Remove an endpoint, its configuration, its model and its scaling.

    What is not there is passed over, so that it can be repeated.
    """
    from lmi_multi.deploy.endpoint import remove

    with waiting(f"endpoint {name}") as status:
        remove(name, note, status)


def parse_environment(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs of --env."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--env")
        if found.setdefault(name, value) != value:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--env")
    return found


def _estimate(deployment: Deployment, option: Option | None) -> str:
    where = f"{deployment.instances} x {deployment.instance_type}"
    if option is None:
        return f"{deployment.model} on {where}: not checked whether it fits"
    room = (
        "" if option.batch is None else f", {option.batch:,} of {option.max_tokens:,} tokens each"
    )
    stages = option.pipeline_parallel
    degree = f"tensor_parallel {option.tensor_parallel}"
    if stages > 1:
        degree += f", pipeline_parallel {stages}"
    return f"{deployment.model} on {where}: fits at {degree}{room} (estimate)"
