"""Settings: every name reaches its field, the order holds, and errors speak the user's words."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmi_multi import model
from lmi_multi.backends import cpu
from lmi_multi.errors import OptionError
from lmi_multi.serve import names, sources
from lmi_multi.serve.settings import ServeSettings

# A value of each option that is not its default, as text, and what it becomes.
VALUES: dict[str, tuple[str, object]] = {
    "model": ("s3://bucket/prefix/", "s3://bucket/prefix/"),
    "revision": ("main", "main"),
    "verify": ("TRUE", True),
    "backend": ("cpu", "cpu"),
    "engine": ("fastertransformer", "FasterTransformer"),
    "fallback": ("transformers", "transformers"),
    "task": ("text-embedding", "feature-extraction"),
    "rolling_batch": ("lmi-dist", "auto"),
    "entry_point": ("djl_python.huggingface", None),
    "dtype": ("BFloat16", "bf16"),
    "quantize": ("int8", "int8"),
    "tensor_parallel": ("max", "max"),
    "pipeline_parallel": ("2", 2),
    "max_batch": (" 7 ", 7),
    "max_tokens": ("512", 512),
    "memory_share": ("0.75", 0.75),
    "prefix_caching": ("false", False),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "max_queue": ("5", 5),
    "max_queue_tokens": ("5000", 5000),
    "max_body_bytes": ("2048", 2048),
    "request_timeout": ("2.5", 2.5),
    "startup_timeout": ("600", 600.0),
    "step_timeout": ("3", 3.0),
    "drain_timeout": ("20", 20.0),
    "output_formatter": ("sse", "sse"),
    "enable_streaming": ("huggingface", True),
    "default_accept": ("text/event-stream", "text/event-stream"),
    "max_concurrent_transforms": ("4", 4),
    "batch_strategy": ("SingleRecord", "SINGLE_RECORD"),
    "batch_transform": ("true", True),
    "multi_model": ("1", True),
    "models_root": ("/models", Path("/models")),
    "models_bytes": ("3000000", 3_000_000),
    "log_format": ("json", "json"),
    "log_level": ("Warning", "warning"),
}
PROPERTIES = [(o.field, name) for o in names.OPTIONS for name in o.properties]
VARIABLES = [(o.field, name) for o in names.OPTIONS for name in names.variables(o)]
IN_MEGABYTES = list(names.UNITS)


@pytest.fixture(autouse=True)
def no_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MODEL_FOLDER", tmp_path / "opt" / "ml" / "model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder / "serving.properties"


def read(
    command_line: Mapping[str, object] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServeSettings:
    return ServeSettings.read(
        command_line=command_line or {}, properties=file, environ=environ or {}
    )


def beside(field: str) -> dict[str, str]:
    """A model for the server; with several, requests name them."""
    return {} if field in ("model", "multi_model") else {"HF_MODEL_ID": "demo"}


def refused(*args: Any) -> str:
    with pytest.raises(OptionError) as caught:
        read(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# --- names


@pytest.mark.parametrize(("field", "name"), [p for p in PROPERTIES if p[0] in VALUES])
def test_every_property_reaches_its_field(field: str, name: str, file: Path) -> None:
    text, value = VALUES[field]
    file.write_text(f"{name}={text}\n")
    assert getattr(read(file=file), field) == value
    assert getattr(read({name: text}, None, beside(field)), field) == value


@pytest.mark.parametrize(("field", "name"), [v for v in VARIABLES if v[0] in VALUES])
def test_every_variable_reaches_its_field(field: str, name: str) -> None:
    text, value = ("3", 3 * 2**20) if name in IN_MEGABYTES else VALUES[field]
    assert getattr(read(environ=beside(field) | {name: text}), field) == value


@pytest.mark.parametrize("field", VALUES)
def test_every_field_is_an_option_of_the_command_line(field: str) -> None:
    text, value = VALUES[field]
    assert getattr(read({field: text}, None, beside(field)), field) == value


def test_every_field_has_a_name() -> None:
    assert {o.field for o in names.OPTIONS} == {*ServeSettings.model_fields, "api_key_file"}
    assert set(VALUES) == set(ServeSettings.model_fields) - {"api_key"}


# --- the order, and where things are


def test_the_order(file: Path) -> None:
    environ = {"OPTION_MODEL_ID": "a", "OPTION_PORT": "1", "OPTION_MAX_BATCH": "1"}
    file.write_text("option.port=2\noption.max_batch=2")
    found = read({"port": 3, "host": None}, file, environ)
    assert (found.model, found.port, found.max_batch, found.max_queue) == ("a", 3, 2, 1000)


def test_the_file_of_the_post(file: Path) -> None:
    (file.parent / "model.py").touch()
    file.write_text(
        "engine=FasterTransformer\n"
        "option.tensor_parallel_degree=4\n"
        "option.s3url=s3://bucket/prefix/\n"
        "option.entryPoint=model.py\n"
    )
    found = read(file=file)
    assert (found.model, found.tensor_parallel) == ("s3://bucket/prefix/", 4)
    assert found.entry_point == file.parent / "model.py" and found.fallback is None


def test_the_model_folder_and_the_file_in_it_are_found() -> None:
    sources.MODEL_FOLDER.mkdir(parents=True)
    assert read().model == str(sources.MODEL_FOLDER)
    (sources.MODEL_FOLDER / "serving.properties").write_text("option.port=7")
    assert (read().model, read().port) == (str(sources.MODEL_FOLDER), 7)
    assert read(environ={"HF_MODEL_ID": "gpt2"}).port == 7
    assert read({"model": "gpt2"}).port == 8080  # the file speaks of another model


def test_a_file_without_a_model_lies_in_its_folder(file: Path) -> None:
    file.write_text("option.port=7")
    assert read(file=file).model == str(file.parent)
    assert read({"model": str(file.parent)}).port == 7
    assert read(environ={"HF_MODEL_ID": str(file.parent)}).port == 7


def test_without_a_model() -> None:
    assert refused().startswith("no model is named, and ")
    assert read({"multi_model": True}).model is None
    with pytest.raises(OptionError, match="the settings of one model"):
        read({"multi_model": True}).load_arguments()


def test_what_is_not_read_is_logged(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("")
    (file.parent / "model.py").touch()
    other = file.parent.parent / "other"
    other.write_text("")
    read({"model": str(file.parent)}, other)
    assert f"{file} is not read: {other} is" in caplog.text
    assert "model.py is not run: only a script that option.entryPoint names is" in caplog.text


def test_each_source_names_the_script_from_its_place(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file.write_text("option.entryPoint=model.py")
    (file.parent / "model.py").touch()
    assert read(file=file).entry_point == file.parent / "model.py"
    assert refused({"entry_point": "model.py", "model": "x"}).startswith("--entry-point is")
    (tmp_path / "model.py").touch()
    assert read({"entry_point": "model.py"}, file).entry_point == tmp_path / "model.py"
    file.unlink()
    environ = {"HF_MODEL_ID": str(file.parent), "OPTION_ENTRYPOINT": "model.py"}
    assert read(environ=environ).entry_point == file.parent / "model.py"


# --- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("option.tensor_paralel_degree=4", "did you mean 'option.tensor_parallel_degree'?"),
        ("tensor_parallel_degree=4", "did you mean 'option.tensor_parallel_degree'?"),
        ("option.entrypoint=model.py", "did you mean 'option.entryPoint'?"),
        ("option.api_key=x", "did you mean 'option.api_key_file'?"),
        ("option.zzz=1", "unknown option 'option.zzz'; docs/configuration.md lists all"),
        ("option.n_positions=0", "option.n_positions is '0'; allowed: an integer, at least 1"),
        ("option.max_batch=4.0", "option.max_batch is '4.0'; allowed: an integer"),
        ("option.max_batch=4 # four", "option.max_batch is '4 # four'; allowed: an integer"),
        ("option.predict_timeout=nan", "option.predict_timeout is 'nan'; allowed: a number"),
        ("option.predict_timeout=0", "option.predict_timeout is '0'; allowed: a number"),
        ("option.dtype=fp4", "option.dtype is 'fp4'; allowed: auto, fp32, fp16, bf16"),
        ("option.quantize=awq", "option.quantize is 'awq'; allowed: int8, fp8, or nothing"),
        ("option.gpu_memory_utilization=1.5", "is '1.5'; allowed: a number above 0 and at most 1"),
        ("option.gpu_memory_utilization=0", "is '0'; allowed: a number above 0 and at most 1"),
        (
            "option.pipeline_parallel_degree=0",
            "option.pipeline_parallel_degree is '0'; allowed: an",
        ),
        ("option.rolling_batch=disable", "option.rolling_batch is 'disable'; allowed: auto"),
        ("engine=PyTorch", "engine is 'PyTorch'; allowed: Python, MPI"),
        ("option.entryPoint=nope.py", "option.entryPoint is 'nope.py'; allowed: a Python file"),
        ("option.entryPoint=djl_python.sklearn_handler", "allowed: a Python file, or one of DJL's"),
        ("option.load_in_8bit=true", "option.load_in_8bit is 'true'; allowed: false"),
        ("maxWorkers=2", "maxWorkers is '2'; allowed: 1"),
        ("option.model_id=a\noption.s3url=s3://b/", "yet option.model_id, which means the same,"),
        ("option.model_id=s3:///x", "option.model_id is 's3:///x'; allowed: a folder"),
        ("option.task=vision", "option.task is 'vision'; allowed: auto"),
        ("option.quantize=", "option.quantize is ''; allowed: int8"),
        ("option.dtype=int8\noption.fallback=transformers", "quantize is 'int8'; allowed: nothing"),
        (
            "engine=Accelerate\noption.tensor_parallel_degree=2",
            "option.tensor_parallel_degree is '2'; allowed: 1 beside",
        ),
        ("engine=Accelerate\noption.max_rolling_batch_size=8", "is '8'; allowed: 1 beside"),
        (
            "option.multi_model=true\noption.model_id=a",
            "option.model_id is 'a'; allowed: none beside multi_model",
        ),
        ("engine=Accelerate\noption.verify=true", "is 'true'; allowed: false beside"),
    ],
)
def test_refusals_of_a_file(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    assert message in refused({}, file)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OPTION_TENSOR_PARALEL_DEGREE": "4"}, "did you mean 'OPTION_TENSOR_PARALLEL_DEGREE'?"),
        ({"SAGEMAKER_MAX_PAYLOAD_MB": "4"}, "did you mean 'SAGEMAKER_MAX_PAYLOAD_IN_MB'?"),
        ({"SAGEMAKER_MAX_PAYLOAD_IN_MB": "0"}, "is '0'; allowed: an integer from 1 to 1024"),
        ({"SAGEMAKER_NUM_MODEL_WORKERS": "2"}, "SAGEMAKER_NUM_MODEL_WORKERS is '2'; allowed: 1"),
        ({"SAGEMAKER_BIND_TO_PORT": "x"}, "SAGEMAKER_BIND_TO_PORT is 'x'; allowed: an integer"),
        ({"SERVING_LOAD_MODELS": "a=/b"}, "SERVING_LOAD_MODELS is 'a=/b'; allowed: test::Python"),
    ],
)
def test_refusals_of_variables(environ: dict[str, str], message: str) -> None:
    assert message in refused({"model": "demo"}, None, environ)


def test_refusals_of_the_command_line() -> None:
    assert "--max-batch is 0; allowed: an integer" in refused({"model": "demo", "max_batch": 0})
    assert "--max-batch is True; allowed" in refused({"model": "demo", "max_batch": True})
    assert "did you mean 'max_batch'?" in refused({"max_bacht": 1})
    assert "unknown option 'api_key'" in refused({"api_key": "x"})
    assert "MODEL is ''; allowed: a folder" in refused({"model": ""})


def test_the_object_itself_is_checked() -> None:
    for fields, message in (
        ({"max_bach": 1}, "unknown option 'max_bach'; did you mean 'max_batch'?"),
        ({"port": 65536}, "port is 65536; allowed: an integer from 0"),
    ):
        with pytest.raises(OptionError, match=message):
            ServeSettings(**fields)
    with pytest.raises(ValueError, match="frozen"):
        ServeSettings(model="demo").port = 1  # type: ignore[misc]


# --- secrets


def test_the_key_is_never_shown(tmp_path: Path) -> None:
    demo = {"model": "demo"}
    found = read(demo, None, {"LMI_MULTI_API_KEY": "s3cret"})
    assert found.api_key and found.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(found) + str(found) + found.model_dump_json()
    assert "s3cret" not in refused(demo, None, {"LMI_MULTI_API_KEY": "s3cret and more"})
    holder = tmp_path / "key"
    holder.write_text("s3cret\n")
    key = read(demo | {"api_key_file": holder}).api_key
    assert key and key.get_secret_value() == "s3cret"
    holder.write_text("s3cret\nand more")
    assert "s3cret" not in refused(demo | {"api_key_file": holder})
    both = refused(demo | {"api_key_file": holder}, None, {"LMI_MULTI_API_KEY": "s3cret"})
    assert "allowed: one of them" in both and "s3cret" not in both
    for content in ("", "\u00e9"):
        holder.write_text(content)
        assert "--api-key-file is not usable" in refused(demo | {"api_key_file": holder})
    assert "No such file" in refused(demo | {"api_key_file": tmp_path / "none"})


# --- what has no effect, and what means something else


@pytest.mark.parametrize(
    ("known", "name"), [(i, name) for i in names.INEFFECTIVE for name in i.properties]
)
def test_an_option_without_effect_is_logged(
    known: names.Ineffective, name: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(f"{name}={known.allowed[0] if known.allowed else 'x'}")
    assert read(file=file) == ServeSettings(model=str(file.parent))
    assert f"{name} has no effect: {known.why}" in caplog.text


def test_variables_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmi_multi")
    environ = {
        "SAGEMAKER_REGION": "eu-west-1",
        "SERVING_LOAD_MODELS": "test::MPI=/opt/ml/model",
        "HF_MODEL_TRUST_REMOTE_CODE": "true",
        "SAGEMAKER_MAX_REQUEST_SIZE": "4096",
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "6",
        "OPTION_QUANTIZE": "",
        "UNRELATED": "x",
    }
    assert read({"model": "demo"}, None, environ).max_body_bytes == 4096
    for name in ("SAGEMAKER_REGION", "SERVING_LOAD_MODELS", "HF_MODEL_TRUST_REMOTE_CODE"):
        assert f"{name} has no effect: " in caplog.text
    assert "MAX_PAYLOAD_IN_MB has no effect: SAGEMAKER_MAX_REQUEST_SIZE is set" in caplog.text
    assert "UNRELATED" not in caplog.text and "QUANTIZE" not in caplog.text


@pytest.mark.parametrize(
    "name",
    ["SAGEMAKER_PROGRAM", "SAGEMAKER_SUBMIT_DIRECTORY", "SAGEMAKER_CONTAINER_LOG_LEVEL"]
    + [
        "SAGEMAKER_SAFE_PORT_RANGE",
        "SAGEMAKER_MODEL_SERVER_MEMORY",
        "SAGEMAKER_TFS_NGINX_LOGLEVEL",
    ],
)
def test_what_the_platform_sets_is_no_slip(name: str) -> None:
    assert read({"model": "demo"}, None, {name: "x"}) == ServeSettings(model="demo")


def test_values_that_mean_another_option() -> None:
    assert ServeSettings(engine="Accelerate").fallback == "transformers"
    for kind in ("int8", "fp8"):
        found = ServeSettings(dtype=kind)
        assert (found.dtype, found.quantize) == ("auto", kind)
    assert ServeSettings(dtype="int8", quantize="INT8").quantize == "int8"
    assert ServeSettings(dtype="int8", quantize=None).quantize == "int8"
    with pytest.raises(OptionError, match="dtype is 'int8'; allowed: no other one beside"):
        ServeSettings(dtype="int8", quantize="fp8")


# --- loading


def test_load_arguments_are_those_of_load() -> None:
    found = ServeSettings(model="demo", max_batch=3, dtype="fp32", backend="cpu")
    keywords = found.load_arguments()
    assert keywords.keys() <= model.load.__annotations__.keys()
    assert (keywords["source"], keywords["max_batch"], keywords["dtype"]) == ("demo", 3, "fp32")
    assert ServeSettings(model="x", fallback="transformers").load_arguments()["fallback"]


def test_max_is_one_rank_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ServeSettings(model="demo", backend="cpu", tensor_parallel="max")
    assert found.load_arguments()["tensor_parallel"] == 1
    state = type("State", (), {"ok": True, "devices": ("a", "b", "c", "d")})()
    monkeypatch.setattr(type(cpu.BACKEND), "probe", lambda self: state)
    assert found.load_arguments()["tensor_parallel"] == 4
