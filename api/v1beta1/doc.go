// Package v1beta1 is the API that users write: Egress and ExternalIPPool, of the group crd.antrea.io, version v1beta1.
// Manifests that were written for that API elsewhere work unchanged.
//
// The CRDs in manifests/crds and the deepcopy functions are generated from these types (`go generate`, see below). The
// package decides nothing and speaks to nobody; what the fields do is the business of crdsync and the agents.
//
// +kubebuilder:object:generate=true
// +groupName=crd.antrea.io
package v1beta1

//go:generate go tool controller-gen object paths=.
//go:generate go tool controller-gen crd paths=. output:crd:dir=../../manifests/crds
