package crdsync

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
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

// Without the value of the chart that gives it the right, crdsync is refused: the error names the value.
func TestARefusedTaintNamesTheValueOfTheChart(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.Method == http.MethodGet {
			_, _ = io.WriteString(w, `{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n"}, "spec": {"taints": [{"key": "a/b", "effect": "NoSchedule"}]}}`)
			return
		}
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "code": 403}`)
	}))
	defer api.Close()
	client, err := corev1client.NewForConfig(&rest.Config{Host: api.URL})
	if err != nil {
		t.Fatal(err)
	}
	err = (&startup{taint: "a/b", client: client}).takeOff(t.Context(), "n")
	name := regexp.MustCompile(`(\S+) of the chart`).FindStringSubmatch(fmt.Sprint(err))
	if name == nil {
		t.Fatalf("error %v names no value of the chart", err)
	}
	values, err := os.ReadFile("../charts/egret/values.yaml")
	if err != nil || !strings.Contains(string(values), "\n"+name[1]+":") {
		t.Errorf("the chart has no value %s: %v", name[1], err)
	}
}
