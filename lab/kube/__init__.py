"""The manifests of deploy/k8s: checked without a cluster (`check`), and tried on one (`verify`)."""
