// Package manifests embeds the YAML that is applied to a cluster: the CRDs (generated from api/v1beta1), everything
// that runs (deploy, rendered from the chart charts/egret with values.yaml), and the guide's examples.
//
// It owns nothing and decides nothing. Its tests check that the CRDs are those of api/v1beta1 and deploy is what the
// chart makes, that no manifest has a field that its API does not know whatever the values, and that each command line
// and file of options has only options that exist.
//
// The folder render is a module of its own: Helm's engine, which no other part of Egret depends on.
package manifests
