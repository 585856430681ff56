"""What ships in clusters/: valid by the published schemas, one version everywhere, closed by default, no secrets."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import raygard
from raygard.cluster.doctor.checks import NodeFacts, check_shm
from raygard.config_file import load_config
from tests.unit.kuberay_schema import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
README = (CLUSTERS / "README.md").read_text()
MANIFESTS = sorted(CLUSTERS.rglob("*.yaml"))
LAUNCHER = [CLUSTERS / "aws.yaml", CLUSTERS / "gcp.yaml"]
# Beside the interpreter: the tests are run as `.venv/bin/python -m pytest`, without its folder on PATH.
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted(path for path in CLUSTERS.rglob("*") if path.suffix in {".sh", ".sbatch"})
TEXTS = sorted(
    path
    for path in CLUSTERS.rglob("*")
    if path.suffix in {".yaml", ".sh", ".sbatch", ".py", ".md", ""} and path.is_file()
)
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
IMAGE = f"registry.example.com/raygard:{raygard.__version__}-ray{PINS['ray']}"
# The newest release that all our fields are checked against.
KUBERNETES = "1.33"
UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def resources(kind: str | None = None) -> list[dict[str, Any]]:
    found = [document for path in sorted((CLUSTERS / "kuberay").glob("*.yaml")) for document in documents(path)]
    return [document for document in found if kind in (None, document["kind"])]


def ray_clusters() -> list[dict[str, Any]]:
    return [r["spec"] for r in resources("RayCluster")] + [r["spec"]["rayClusterSpec"] for r in resources("RayJob")]


def ray_groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates() -> list[dict[str, Any]]:
    return [group["template"] for cluster in ray_clusters() for group in ray_groups(cluster)] + [
        deployment["spec"]["template"] for deployment in resources("Deployment")
    ]


def containers() -> list[dict[str, Any]]:
    return [container for template in pod_templates() for container in template["spec"]["containers"]]


def amount(text: str | int) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def launcher_commands(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key.endswith("_commands"):
            yield from value


def test_something_is_checked() -> None:
    assert len(MANIFESTS) >= 8 and len(SCRIPTS) >= 1 and len(ray_clusters()) == 2 and len(pod_templates()) >= 6


# ----------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launcher_files_follow_rays_own_schema(path: Path) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert "cluster_synced_files" in config, "Ray takes a file without it for one of another version"


@pytest.mark.parametrize("document", resources(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_kubernetes_resources_follow_their_schema(document: dict[str, Any]) -> None:
    if document["kind"] in SCHEMAS:
        jsonschema.validate(document, SCHEMAS[document["kind"]])
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pod_templates_of_ray_follow_kubernetes_schema() -> None:
    for template in pod_templates():
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
        claimed = {volume["name"] for volume in template["spec"].get("volumes", [])}
        mounted = {mount["name"] for c in template["spec"]["containers"] for mount in c["volumeMounts"]}
        assert mounted == claimed


def test_the_schemas_refuse_a_misspelt_field() -> None:
    (job,) = resources("RayJob")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(job, SCHEMAS["RayJob"])


# ---------------------------------------------------------------------------------------------- versions


def test_one_image_and_one_ray_version_everywhere() -> None:
    images = [yaml.safe_load(path.read_text())["docker"]["image"] for path in LAUNCHER]
    images += [container["image"] for container in containers()]
    assert set(images) == {IMAGE}
    assert {cluster["rayVersion"] for cluster in ray_clusters()} == {PINS["ray"]}
    dockerfile = (CLUSTERS / "Dockerfile").read_text()
    assert re.search(rf"^ARG BASE=rayproject/ray:{re.escape(PINS['ray'])}-py311-gpu$", dockerfile, re.MULTILINE)
    assert IMAGE in dockerfile and IMAGE in README
    for path in TEXTS:
        assert set(re.findall(r"raygard:[\w.-]+-ray[\w.]+", path.read_text())) <= {IMAGE.split("/")[1]}, path


def test_the_image_holds_what_the_manifests_call() -> None:
    dockerfile, ignored = (CLUSTERS / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        word for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()
    ]
    assert "constraints.txt" in copied and "raygard" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} does not reach the build"
    used = {match for path in TEXTS for match in re.findall(r"/opt/raygard/([\w/.-]+\.\w+)", path.read_text())}
    assert used
    for name in used:
        assert (ROOT / name).exists() and any(name == source or name.startswith(f"{source}/") for source in copied), (
            name
        )
    assert dockerfile.count("pip install") == dockerfile.count("--constraint constraints.txt")


# ---------------------------------------------------------------------------------------------- security


def test_no_dashboard_is_public() -> None:
    for path in TEXTS:
        for host in re.findall(r"--dashboard-host[= ]['\"]?([^\s'\",]+)", path.read_text()):
            assert host in {"127.0.0.1", "{LOOPBACK}"}, path
        for line in path.read_text().splitlines():
            if "0.0.0.0" in line and path.suffix != ".md":
                assert (path.name, line.strip()) == ("mlflow.yaml", "- --host=0.0.0.0"), f"{path}: {line}"
    assert not {"Ingress", "Gateway", "HTTPRoute"} & {document["kind"] for document in resources()}
    assert {service["spec"]["type"] for service in resources("Service")} == {"ClusterIP"}
    for cluster in ray_clusters():
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert cluster["headGroupSpec"]["enableIngress"] is False
        assert "dashboard-host" not in cluster["headGroupSpec"]["rayStartParams"]


def test_tokens_are_required_everywhere() -> None:
    for path in LAUNCHER:
        config = yaml.safe_load(path.read_text())
        assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for cluster in ray_clusters():
        assert cluster["authOptions"]["mode"] == "token"
    assert "RAY_AUTH_MODE=token" in (CLUSTERS / "Dockerfile").read_text()
    for path in SCRIPTS:
        assert "RAY_AUTH_MODE=token" in path.read_text() and "RAY_AUTH_TOKEN_PATH=" in path.read_text()
    for path in TEXTS:
        assert not re.search(r"RAY_AUTH_MODE['\"]?\s*[=:]\s*['\"]?disabled|mode: disabled", path.read_text()), path


def test_nothing_secret_is_in_the_files() -> None:
    assert not resources("Secret"), "secrets are made by hand"
    for path in TEXTS:
        text = path.read_text()
        assert not re.search(r"\b(?:AKIA[0-9A-Z]{16}|[0-9a-fA-F]{32,}|hf_\w{20,}|gh[ps]_\w{20,})\b", text), path
        assert "PRIVATE KEY" not in text, path
    for container in containers():
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY|USERNAME", variable["name"]):
                assert "value" not in variable and "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_secrets_that_are_used_are_made_in_the_readme() -> None:
    made: dict[str, set[str]] = {}
    for command in re.findall(r"--namespace=raygard create secret generic (.*?)(?=\nkubectl|\n```)", README, re.DOTALL):
        name, *_ = command.split()
        made[name] = set(re.findall(r"--from-literal=(\w+)=", command))
    used = {(cluster["authOptions"]["secretName"], "auth_token") for cluster in ray_clusters()}
    for container in containers():
        for variable in container.get("env", []):
            reference = variable["valueFrom"]["secretKeyRef"]
            used.add((reference["name"], reference["key"]))
    for name, key in used:
        assert key in made.get(name, set()), f"{name}/{key}"


def test_pods_have_few_rights() -> None:
    for template in pod_templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    for cluster in ray_clusters():
        for group in cluster["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_network_lets_in_only_the_operator_the_cluster_itself_and_logs() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in resources("NetworkPolicy")}
    assert policies["deny-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []) + spec.get("egress", []):
            peers = rule.get("from") or rule.get("to")
            assert peers, f"{name} opens to everybody"
            assert not any("ipBlock" in peer for peer in peers), name
    outside = [
        (spec["podSelector"]["matchLabels"], rule["ports"])
        for spec in policies.values()
        for rule in spec.get("ingress", [])
        if any("namespaceSelector" in peer for peer in rule["from"])
    ]
    assert outside == [({"ray.io/node-type": "head"}, [{"protocol": "TCP", "port": 8265}])]
    (mlflow,) = resources("Deployment")
    assert policies["head-to-mlflow"]["podSelector"]["matchLabels"] == mlflow["spec"]["template"]["metadata"]["labels"]


# ------------------------------------------------------------------------------------------ how it works


def test_heads_do_no_work() -> None:
    for path in LAUNCHER:
        config = yaml.safe_load(path.read_text())
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    for cluster in ray_clusters():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        limits = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert "nvidia.com/gpu" not in limits
    starts = [command for path in LAUNCHER for command in launcher_commands(yaml.safe_load(path.read_text()))]
    starts += [path.read_text().replace("\\\n", " ") for path in SCRIPTS]
    heads = [line for text in starts for line in text.splitlines() if "--head " in line]
    assert len(heads) == len(LAUNCHER) + len(SCRIPTS)
    for line in heads:
        assert "--num-cpus=0" in line and "--num-gpus=0" in line and "--dashboard-host=127.0.0.1" in line


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launcher_workers_are_spot_gpus_that_scale_from_none_and_heed_the_notice(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    workers = {name: each for name, each in config["available_node_types"].items() if name != config["head_node_type"]}
    for worker in workers.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] > 0
        spot = json.dumps(worker["node_config"])
        assert '"MarketType": "spot"' in spot or '"provisioningModel": "SPOT"' in spot
    watch = f"preemption.py watch {config['provider']['type']} --address $RAY_HEAD_IP:6379"
    assert watch in config["worker_start_ray_commands"][-1]
    assert "preemption.py" not in json.dumps(config["head_start_ray_commands"]), "a head is never drained"
    for options in ("head_run_options", "worker_run_options"):
        assert any(option.startswith("--shm-size=") for option in config["docker"][options])
    assert any("mount -t nfs4" in command for command in config["initialization_commands"])
    assert "-v /shared:/shared" in config["docker"]["run_options"]


def test_every_ray_pod_has_the_shared_volume_and_room_in_shm() -> None:
    for cluster in ray_clusters():
        for group in ray_groups(cluster):
            spec = group["template"]["spec"]
            (container,) = spec["containers"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == "raygard-shared"
            shm = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shm["medium"] == "Memory"
            assert amount(shm["sizeLimit"]) <= amount(container["resources"]["limits"]["memory"]) / 2
    claims = {claim["metadata"]["name"]: claim["spec"]["accessModes"] for claim in resources("PersistentVolumeClaim")}
    assert claims["raygard-shared"] == ["ReadWriteMany"]


def test_the_doctor_finds_room_in_the_shm_of_every_node_we_ship() -> None:
    nodes = []
    for cluster in ray_clusters():
        for group in ray_groups(cluster):
            spec = group["template"]["spec"]
            (shm,) = (volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "shm")
            gpus = float(spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
            nodes.append((gpus, float(group["rayStartParams"]["object-store-memory"]), amount(shm)))
    for path in LAUNCHER:
        config = yaml.safe_load(path.read_text())
        for kind, gpus in (("head", 0.0), ("worker", 8.0)):
            started = " ".join(config[f"{kind}_start_ray_commands"])
            (store,) = re.findall(r"--object-store-memory=(\d+)", started)
            (shm,) = re.findall(r"--shm-size=(\d+)g", " ".join(config["docker"][f"{kind}_run_options"]))
            nodes.append((gpus, float(store), int(shm) * 2**30))
    facts = [
        NodeFacts(str(i), str(i), resources={"GPU": gpus, "object_store_memory": store}, shm_bytes=int(shm))
        for i, (gpus, store, shm) in enumerate(nodes)
    ]
    check = check_shm(load_config(None, ["engine.use_gpu=true"]), facts)
    assert len(facts) == 9 and check.ok, check.line()


def test_gpu_workers_ask_for_gpus_and_drain_in_time() -> None:
    for cluster in ray_clusters():
        gpu = [
            group
            for group in cluster["workerGroupSpecs"]
            if "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        ]
        assert gpu
        for group in cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            (command,) = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2:]
            seconds = [
                int(number)
                for number in re.findall(r"--seconds (\d+)|sleep (\d+)", command)
                for number in number
                if number
            ]
            assert max(seconds) < spec["terminationGracePeriodSeconds"]
        for group in gpu:
            assert any(t["key"] == "nvidia.com/gpu" for t in group["template"]["spec"]["tolerations"])


def test_the_queued_job_fits_its_queue_whole() -> None:
    (job,), (queue,), (local,), (priority,) = (
        resources(kind) for kind in ("RayJob", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass")
    )
    assert job["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": local["metadata"]["name"],
        "kueue.x-k8s.io/priority-class": priority["metadata"]["name"],
    }
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    cluster = job["spec"]["rayClusterSpec"]
    # Kueue counts what is asked for at the start.
    assert "enableInTreeAutoscaling" not in cluster and job["spec"]["shutdownAfterJobFinishes"] is True
    needed: dict[str, float] = {}
    for group in ray_groups(cluster):
        number = group.get("replicas", 1)
        assert group.get("minReplicas", number) == number == group.get("maxReplicas", number)
        for name, each in group["template"]["spec"]["containers"][0]["resources"]["requests"].items():
            needed[name] = needed.get(name, 0) + number * amount(each)
    (quotas,) = queue["spec"]["resourceGroups"]
    allowed = {each["name"]: amount(each["nominalQuota"]) for each in quotas["flavors"][0]["resources"]}
    assert set(allowed) == set(quotas["coveredResources"])
    assert set(needed) <= set(allowed) and all(needed[name] <= allowed[name] for name in needed)


def test_the_job_runs_a_search_that_parses() -> None:
    (job,) = resources("RayJob")
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script.removeprefix("/opt/raygard/")).name == "search.py"
    config = arguments[arguments.index("--config") + 1].removeprefix("/opt/raygard/")
    overrides = [argument for argument in arguments if re.match(r"^[a-z_]+\.[a-z_]+=", argument)]
    run = load_config(ROOT / config, overrides)
    assert run.engine.use_gpu and arguments[arguments.index("--out") + 1].startswith("/shared/")
    (service,) = resources("Service")
    port = service["spec"]["ports"][0]["port"]
    assert run.tracking.tracking_uri == f"http://{service['metadata']['name']}:{port}"
    (allowed,) = (
        a for a in resources("Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["args"] if "hosts" in a
    )
    assert f"{service['metadata']['name']}:{port}" in allowed.split("=")[1].split(",")


# ---------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    done = subprocess.run([SHELLCHECK, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert "ray stop" not in re.sub(r"#.*", "", path.read_text())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launcher_commands_parse(path: Path) -> None:
    commands = list(launcher_commands(yaml.safe_load(path.read_text())))
    assert len(commands) >= 8
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr


def test_files_and_placeholders_are_named_in_the_readme() -> None:
    for path in re.findall(r"(?:clusters|jobs)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for path in MANIFESTS:
        name = path.relative_to(CLUSTERS).as_posix()
        assert path.name in README, name
        if "CHANGE_ME" in path.read_text():
            row = next((line for line in README.splitlines() if f"`{name}`" in line and line.startswith("|")), "")
            assert row, f"the README does not say what CHANGE_ME stands for in {name}"
