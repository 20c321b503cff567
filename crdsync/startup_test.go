package crdsync

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Whoever is given another's taint takes it off nodes that it is to keep pods away from.
func TestAStartupTaintIsNoneOfKubernetes(t *testing.T) {
	for key, ok := range map[string]bool{
		"": true, "egret/agent-not-ready": true, "example.com/egret": true, "notkubernetes.io/x": true,
		"startup-taint.cluster-autoscaler.kubernetes.io/egret": true,
		"node.kubernetes.io/not-ready":                         false, "node.kubernetes.io/unschedulable": false, "kubernetes.io/x": false,
		"node-role.kubernetes.io/control-plane": false, "node.cloudprovider.kubernetes.io/uninitialized": false, "ToBeDeletedByClusterAutoscaler": false,
		"startup-taint.cluster-autoscaler.kubernetes.io/": false, "agent-not-ready": false, "a b/c": false, "egret/": false, "egret/x=y": false,
	} {
		err := Config{StartupTaint: key}.Validate()
		if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), fmt.Sprintf("--startup-taint %q", key)) {
			t.Errorf("%q: %v", key, err)
		}
	}
	if err := (Config{StartupTaint: "x", BlockSize: 3}).Validate(); err == nil || !strings.Contains(err.Error(), "--block-size") || !strings.Contains(err.Error(), "--startup-taint") {
		t.Errorf("not every fault is named: %v", err)
	}
}

func TestTheStartupTaintIsSeenAndLeavesTheRecordAlone(t *testing.T) {
	n := &corev1.Node{Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "egret/agent-not-ready", Effect: corev1.TaintEffectNoSchedule}, {Key: "other"}}}}
	s := &startup{taint: "egret/agent-not-ready"}
	for _, d := range []nodeDefaults{{followCordon: true}, {followCordon: true, startupTaint: s.taint}} {
		o, err := d.trim(n)
		if err != nil {
			t.Fatal(err)
		}
		trimmed := o.(*corev1.Node)
		if s.has(trimmed) != (d.startupTaint != "") || len(trimmed.Spec.Taints) > 1 {
			t.Errorf("with %+v its taints are %v", d, trimmed.Spec.Taints)
		}
		if got, err := readNode(trimmed, d); err != nil || got.Cordoned {
			t.Errorf("with %+v the record is %+v, %v: a node that is new is not cordoned", d, got, err)
		}
	}
}
