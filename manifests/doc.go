// Package manifests embeds the YAML that is applied to a cluster: the CRDs (generated from api/v1beta1), crdsync's Deployment with its
// RBAC, the agents' DaemonSet, and the guide's examples.
//
// It owns nothing and decides nothing. Its tests check that the CRDs are those of api/v1beta1, that no manifest has a field that its
// API does not know, and that each command line has only flags that exist.
package manifests
