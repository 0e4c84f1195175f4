"""The manifests: valid against the offline schemas, and true to what the server does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import Settings
from service.pb.quire.v1 import inference_pb2
from service.supervisor import KILL_MARGIN_SECONDS
from tests.deploy.environment import quire_settings

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
VALIDATE = Path(sys.executable).parent / "kubernetes-validate"
READINESS = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
LIVENESS = "quire.live"


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    deployment = yaml.safe_load((FOLDER / "deployment.yaml").read_text())
    template: dict[str, Any] = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    return template


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def validate(*files: Path) -> int:
    command = [str(VALIDATE), "--strict", "--quiet", *map(str, files)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_every_manifest_is_strictly_valid() -> None:
    assert [file.name for file in MANIFESTS] == ["deployment.yaml", "service.yaml"]
    assert validate(*MANIFESTS) == 0


def test_an_unknown_field_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text((FOLDER / "service.yaml").read_text().replace("clusterIP:", "clusterIp:"))
    assert validate(tmp_path / "service.yaml") != 0


def test_probes_ask_the_names_that_the_server_publishes(container: dict[str, Any]) -> None:
    probes = {kind: container[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["service"] for kind, probe in probes.items()} == {
        "startup": "",
        "readiness": READINESS,
        "liveness": LIVENESS,
    }
    assert {probe["port"] for probe in probes.values()} == {Settings().port}


def test_the_pod_has_no_rights(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_one_writable_place_is_bounded(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    (volume,) = pod["spec"]["volumes"]
    assert volume["name"] == "tmp"
    assert "sizeLimit" in volume["emptyDir"]


def test_resources_are_limited(container: dict[str, Any]) -> None:
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}


def test_the_environment_is_the_servers_and_grace_outlasts_the_drain(
    pod: dict[str, Any], container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    settings = quire_settings(variables, monkeypatch)
    assert settings.threads is None  # the quota decides
    slowest_end = settings.lame_duck_seconds + settings.drain_seconds + KILL_MARGIN_SECONDS
    assert pod["spec"]["terminationGracePeriodSeconds"] > slowest_end


def test_service_links_do_not_shadow_the_settings(pod: dict[str, Any]) -> None:
    # Kubernetes would set QUIRE_PORT=tcp://10.0.0.1:50051 for a Service of this name.
    service = yaml.safe_load((FOLDER / "service.yaml").read_text())
    assert service["metadata"]["name"] == "quire"
    assert pod["spec"]["enableServiceLinks"] is False


def test_the_service_is_headless_and_selects_the_pods(pod: dict[str, Any], container: dict[str, Any]) -> None:
    spec = yaml.safe_load((FOLDER / "service.yaml").read_text())["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["selector"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": Settings().port, "metrics": Settings().metrics_port}
    assert {port["targetPort"]: port["port"] for port in spec["ports"]} == ports
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(Settings().metrics_port)
