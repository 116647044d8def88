"""An endpoint to be made, and the calls of AWS that make it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lmi_multi.checkpoint.s3.address import Address, is_address
from lmi_multi.deploy.aws import SAGEMAKER, SCALING, values
from lmi_multi.errors import OptionError
from lmi_multi.instances import Instance
from lmi_multi.values import Int

VARIANT = "all"  # an endpoint of ours has one variant
METRIC = "SageMakerVariantInvocationsPerInstance"
DIMENSION = "sagemaker:variant:DesiredInstanceCount"
MAX_VOLUME = 512  # GiB
_NAME, _NAME_LENGTH = r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$", 63
_ROLE = r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/[a-zA-Z_0-9+=,.@/-]+$"


@dataclass(frozen=True)
class Call:
    """One request to AWS. `makes` says what exists afterwards."""

    service: str
    operation: str
    request: dict[str, Any]
    makes: str

    def shown(self) -> dict[str, Any]:
        """The call as JSON."""
        return {"service": self.service, "operation": self.operation, "request": self.request}


_Count = Annotated[Int, Field(ge=1, le=1000)]
_Seconds = Annotated[Int, Field(ge=60, le=3600)]
_COUNT = "an integer from 1 to 1000"
_SECONDS = "an integer from 60 to 3600 (seconds)"


class Deployment(BaseModel):
    """What an endpoint is to be. Its model, its configuration and itself all have its name.

    `model` is a folder on S3, which SageMaker puts before the container's start at /opt/ml/model,
    or something that the container fetches by itself: a Hub id, or `demo`. `environment` is the
    container's. `volume` is in GiB, only for instances without disks of their own.

    With `max_instances` above `instances` the endpoint scales so that each instance gets about
    `invocations` requests a minute. Raises OptionError, one line, for a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str
    instance: Instance
    image: str = Field(
        pattern=r"^\S{1,255}$", description="an image in a registry, at most 255 characters"
    )
    role: str = Field(
        pattern=_ROLE, description="the ARN of a role, arn:aws:iam::ACCOUNT:role/NAME"
    )
    name: str = Field(
        pattern=_NAME,
        max_length=_NAME_LENGTH,
        description="at most 63 letters, digits and hyphens, none at an end",
    )
    environment: dict[str, str] = {}
    instances: _Count = Field(default=1, description=_COUNT)
    max_instances: _Count | None = Field(default=None, description=_COUNT)
    invocations: Annotated[Int, Field(ge=1, le=10**6)] = Field(
        default=60, description="an integer from 1 to 1000000 (requests a minute and instance)"
    )
    volume: Annotated[Int, Field(ge=1, le=MAX_VOLUME)] | None = Field(
        default=None, description=f"an integer from 1 to {MAX_VOLUME} (GiB)"
    )
    ami: str | None = None
    download_timeout: _Seconds = Field(default=3600, description=_SECONDS)
    startup_timeout: _Seconds = Field(default=1800, description=_SECONDS)

    if not TYPE_CHECKING:  # type checkers see the fields as keywords

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _judged(error) from None

    @model_validator(mode="after")
    def _fits_together(self) -> Deployment:
        name = self.instance.name
        if self.instance_type not in values("ProductionVariantInstanceType"):
            raise _rule("instance", name, "types that SageMaker hosts endpoints on")
        if self.volume is not None and self.instance.has_disk:
            raise _rule("volume", self.volume, f"nothing, as {name} has disks of its own")
        if self.max_instances is not None and self.max_instances < self.instances:
            raise _rule("max_instances", self.max_instances, f"at least {self.instances}")
        known = values("ProductionVariantInferenceAmiVersion")
        if self.ami is not None and self.ami not in known:
            raise _rule("ami", self.ami, ", ".join(sorted(known)))
        return self

    @property
    def instance_type(self) -> str:
        """The type as SageMaker calls it."""
        return f"ml.{self.instance.name}"

    @property
    def scales(self) -> bool:
        """Whether the number of instances follows the load."""
        return self.max_instances is not None and self.max_instances > self.instances

    def calls(self) -> list[Call]:
        """What makes the endpoint, in order. Scaling is for an endpoint that is in service."""
        named = {"EndpointConfigName": self.name}
        result = [
            Call(SAGEMAKER, "CreateModel", self._model(), f"model {self.name}"),
            Call(
                SAGEMAKER,
                "CreateEndpointConfig",
                named | {"ProductionVariants": [self._variant()]},
                f"endpoint configuration {self.name}",
            ),
            Call(
                SAGEMAKER,
                "CreateEndpoint",
                named | {"EndpointName": self.name},
                f"endpoint {self.name}",
            ),
        ]
        return result + self._scaling() if self.scales else result

    def _model(self) -> dict[str, Any]:
        container: dict[str, Any] = {"Image": self.image, "Environment": self.environment}
        if is_address(self.model):
            source = {
                "S3Uri": Address.parse(self.model).url(""),
                "S3DataType": "S3Prefix",
                "CompressionType": "None",
            }
            container["ModelDataSource"] = {"S3DataSource": source}
        return {
            "ModelName": self.name,
            "PrimaryContainer": container,
            "ExecutionRoleArn": self.role,
        }

    def _variant(self) -> dict[str, Any]:
        variant: dict[str, Any] = {
            "VariantName": VARIANT,
            "ModelName": self.name,
            "InstanceType": self.instance_type,
            "InitialInstanceCount": self.instances,
            "ModelDataDownloadTimeoutInSeconds": self.download_timeout,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.startup_timeout,
        }
        optional = {"VolumeSizeInGB": self.volume, "InferenceAmiVersion": self.ami}
        return variant | {name: value for name, value in optional.items() if value is not None}

    def _scaling(self) -> list[Call]:
        target = scalable(self.name)
        bounds = {"MinCapacity": self.instances, "MaxCapacity": self.max_instances}
        policy = {
            "PolicyName": f"{self.name}-invocations",
            "PolicyType": "TargetTrackingScaling",
            "TargetTrackingScalingPolicyConfiguration": {
                "TargetValue": float(self.invocations),
                "PredefinedMetricSpecification": {"PredefinedMetricType": METRIC},
            },
        }
        return [
            Call(SCALING, "RegisterScalableTarget", target | bounds, f"scaling of {self.name}"),
            Call(SCALING, "PutScalingPolicy", target | policy, f"policy of {self.name}"),
        ]


def scalable(name: str) -> dict[str, str]:
    """How application autoscaling calls the endpoint's number of instances."""
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{name}/variant/{VARIANT}",
        "ScalableDimension": DIMENSION,
    }


def check_name(name: str) -> None:
    """Raises OptionError for what cannot be an endpoint's name."""
    if len(name) > _NAME_LENGTH or not re.fullmatch(_NAME, name):
        allowed = Deployment.model_fields["name"].description
        raise OptionError(f"name is {name!r:.80}; allowed: {allowed}")


def name_for(model: str) -> str:
    """A name made from the last part of a model's: `google/flan-t5-base` is `flan-t5-base`."""
    last = model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-zA-Z0-9]+", "-", last)[:_NAME_LENGTH].strip("-") or "model"


def _rule(field: str, value: object, allowed: str) -> PydanticCustomError:
    """A breach of a rule over several fields, for `_judged`."""
    return PydanticCustomError("rule", "", {"field": field, "value": value, "allowed": allowed})


def _judged(error: ValidationError) -> OptionError:
    """The first failure as one line."""
    first = error.errors()[0]
    if first["type"] == "rule":
        field, value, allowed = (first["ctx"][key] for key in ("field", "value", "allowed"))
    else:
        field, value = str(first["loc"][0]), first["input"]
        allowed = Deployment.model_fields[field].description or first["msg"]
    return OptionError(f"{field} is {value!r:.200}; allowed: {allowed}")
