"""JSON Schemas of the fields of KubeRay's and Kueue's custom resources that clusters/kuberay uses.

Written down by hand. KubeRay: docs/reference/api.md of ray-project/kuberay, and for `authOptions` the "KubeRay CRD API
reference" of v1.6.2 on docs.ray.io with the sample ray-cluster.auth.secret-ref.yaml. Kueue: public v1beta1 manifests,
among them the Kueue guide's on docs.ray.io; the API reference itself was not at hand. No other field is allowed, so a
misspelt one fails; a field that is new here must be looked up there first. Pod templates are open here: the tests check
them against Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
OPEN: Schema = {"type": "object"}


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def resource(kind: str, version: str, spec: Schema | None, *, namespaced: bool = True, **more: Schema) -> Schema:
    name: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
    required = ("name", "namespace") if namespaced else ("name",)
    metadata = fields(required, name=name, namespace=name, labels=STRINGS, annotations=STRINGS)
    body = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata}
    if spec is not None:
        body["spec"] = spec
    return fields(tuple(body), **body, **more)


AUTH = fields(("mode",), mode={"enum": ["disabled", "token"]}, secretName=STRING)
AUTOSCALER = fields(
    version={"enum": ["v1", "v2"]},
    idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    resources=OPEN,
    securityContext=OPEN,
)
HEAD = fields(
    ("rayStartParams", "template"),
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=BOOLEAN,
    rayStartParams=STRINGS,
    template=OPEN,
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    rayStartParams=STRINGS,
    template=OPEN,
)
CLUSTER = fields(
    ("rayVersion", "headGroupSpec"),
    rayVersion=STRING,
    authOptions=AUTH,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs=listed(WORKERS),
)
JOB = fields(
    ("entrypoint", "rayClusterSpec"),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    suspend=BOOLEAN,
    rayClusterSpec=CLUSTER,
)
QUOTA = fields(("name", "nominalQuota"), name=STRING, nominalQuota=STRING)
FLAVOR = fields(("name", "resources"), name=STRING, resources=listed(QUOTA))
QUEUE = fields(
    ("resourceGroups",),
    namespaceSelector=OPEN,
    queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
    preemption=fields(
        reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
        withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
    ),
    resourceGroups=listed(
        fields(("coveredResources", "flavors"), coveredResources=listed(STRING), flavors=listed(FLAVOR))
    ),
)

KUEUE = "kueue.x-k8s.io/v1beta1"
SCHEMAS: dict[str, Schema] = {
    "RayCluster": resource("RayCluster", "ray.io/v1", CLUSTER),
    "RayJob": resource("RayJob", "ray.io/v1", JOB),
    "ResourceFlavor": resource("ResourceFlavor", KUEUE, None, namespaced=False),
    "ClusterQueue": resource("ClusterQueue", KUEUE, QUEUE, namespaced=False),
    "LocalQueue": resource("LocalQueue", KUEUE, fields(("clusterQueue",), clusterQueue=STRING)),
    "WorkloadPriorityClass": resource(
        "WorkloadPriorityClass", KUEUE, None, namespaced=False, value={"type": "integer"}, description=STRING
    ),
}
