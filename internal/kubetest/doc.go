// Package kubetest gives a test a real Kubernetes API: a kube-apiserver over an etcd of its own, with Egret's CRDs.
// Nothing of it reaches a binary.
//
// There are no controllers and no kubelet: nodes, pods and their status are what the test writes, and a namespace is
// never quite deleted. The server takes about 5 s to start, so let tests share one.
package kubetest
