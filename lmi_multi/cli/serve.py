"""`lmi-multi serve`: answer over HTTP."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import note
from lmi_multi.errors import LmiError, OptionError
from lmi_multi.parallel import job

if TYPE_CHECKING:
    from lmi_multi.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_SERVER = "Server"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="As for the other commands; default: what the properties say."),
    ] = None,
    properties: Annotated[
        Path | None,
        typer.Option(
            help="A serving.properties; default: the one in the model's folder.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Default: 127.0.0.1.", rich_help_panel=_SERVER)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Default: 8080; 0: any.", rich_help_panel=_SERVER)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name in /v1; default: MODEL.", rich_help_panel=_SERVER),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(help="Prompts that may be there at once; then 503.", rich_help_panel=_SERVER),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds for an answer.", rich_help_panel=_SERVER)
    ] = None,
    step_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds until a silent engine is replaced.", rich_help_panel=_SERVER),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that SIGTERM leaves for answers.", rich_help_panel=_SERVER),
    ] = None,
    multi_model: Annotated[
        bool | None,
        typer.Option(
            "--multi-model",
            help="No MODEL: requests to /models load and unload them.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    models_root: Annotated[
        Path | None,
        typer.Option(
            help="The folder that these models are in; default: /opt/ml/models.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    models_bytes: Annotated[
        int | None,
        typer.Option(
            help="Memory of all these models; beyond, idle ones make room. Default: what there is.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text or json.", rich_help_panel=_SERVER)
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info (a line for each request), warning or error.", rich_help_panel=_SERVER
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or neuron.", rich_help_panel=options.LOADING)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, fp32, fp16 or bf16.", rich_help_panel=options.LOADING),
    ] = None,
    quantize: options.Quantize = None,
    tensor_parallel: Annotated[
        str | None,
        typer.Option(help="Ranks that share each layer, or max.", rich_help_panel=options.LOADING),
    ] = None,
    pipeline_parallel: Annotated[
        int | None,
        typer.Option(
            help="Stages that share the layers; each takes --tensor-parallel ranks.",
            rich_help_panel=options.LOADING,
        ),
    ] = None,
    max_batch: options.MaxBatch = None,
    max_tokens: options.MaxTokens = None,
    memory_share: options.MemoryShare = None,
    revision: options.Revision = None,
    fallback: options.Fallback = None,
    entry_point: Annotated[
        Path | None,
        typer.Option(
            help="A script with a function handle(inputs) that answers instead of a model.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: SageMaker's, DJL's and OpenAI's requests.

    Settings come from here, from a serving.properties, and from OPTION_ and SAGEMAKER_ variables.
    LMI_MULTI_API_KEY is the bearer token to ask for. /ping answers 200 once the model can answer,
    /docs shows every route; SIGTERM ends the server when what it has begun is answered.
    """
    try:
        from lmi_multi.serve import logs
        from lmi_multi.serve.app import Application
        from lmi_multi.serve.listening import listen, shown
        from lmi_multi.serve.server import Server
        from lmi_multi.serve.settings import ServeSettings
    except ModuleNotFoundError as error:
        raise OptionError(
            f"{error.name} is not installed, which serving needs: pip install 'lmi_multi[serve]'"
        ) from None
    if job.read(os.environ) is not None:
        raise OptionError(
            "a server does not run under torchrun: it starts ranks of its own, on its host; start "
            "it by itself, with --tensor-parallel and --pipeline-parallel"
        )
    logs.set_up("text")  # until the settings are known
    given = {
        "model": model,
        "host": host,
        "port": port,
        "max_queue": max_queue,
        "request_timeout": request_timeout,
        "step_timeout": step_timeout,
        "drain_timeout": drain_timeout,
        "backend": backend,
        "dtype": dtype,
        "quantize": quantize,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "max_batch": max_batch,
        "max_tokens": max_tokens,
        "memory_share": memory_share,
        "revision": revision,
        "fallback": fallback,
        "entry_point": entry_point,
        "multi_model": multi_model,
        "models_root": models_root,
        "models_bytes": models_bytes,
        "log_format": log_format,
        "log_level": log_level,
    }
    settings = ServeSettings.read(command_line=given, properties=properties, environ=os.environ)
    logs.set_up(settings.log_format, logs.LEVELS[settings.log_level])
    if settings.task != "auto":
        log.info("task is %s: no effect, as the model itself tells what it can do", settings.task)

    def read(folder: Path) -> ServeSettings:
        """Those of one of several models: its own file stands in for that of the server."""
        own = given | {"multi_model": False}
        return ServeSettings.read(
            command_line=own, properties=properties, environ=os.environ, folder=folder
        )

    what = settings.models_root if settings.multi_model else settings.entry_point or settings.model
    application = Application(settings, name or str(what), read)
    with listen(settings.host, settings.port) as listening:
        note(f"serving {what} on {shown(listening, settings.host)}")
        Server(application, settings).run(listening)
    if application.failed:
        raise LmiError(application.error or "the engine failed")
