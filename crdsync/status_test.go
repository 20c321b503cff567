package crdsync

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/egret-project/egret/api/v1beta1"
)

// egress returns an Egress.
func (c *cluster) egress(name string) v1beta1.Egress {
	c.Helper()
	u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
	var e v1beta1.Egress
	if err == nil {
		err = runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e)
	}
	if err != nil {
		c.Fatal(err)
	}
	return e
}

// wantCondition waits until a condition of an egress says "type reason: message", or, where reason and message are left out, is absent.
func (c *cluster) wantCondition(name, want string) {
	c.Helper()
	kind, _, present := strings.Cut(want, " ")
	c.eventually(func() error {
		got := kind
		e := c.egress(name)
		for _, o := range e.Status.Conditions {
			if string(o.Type) != kind {
				continue
			}
			got = fmt.Sprintf("%s %s: %s", o.Type, o.Reason, o.Message)
			if o.ObservedGeneration != e.Generation || o.LastTransitionTime.IsZero() {
				return fmt.Errorf("condition of %s: %+v, want a time, and generation %d", name, o, e.Generation)
			}
		}
		if got != want {
			return fmt.Errorf("condition of %s: got %q, want %q (present: %t)", name, got, want, present)
		}
		return nil
	})
}

func (c *cluster) wantOrder(name string, want ...v1beta1.EgressConditionType) {
	c.Helper()
	var got []v1beta1.EgressConditionType
	for _, o := range c.egress(name).Status.Conditions {
		got = append(got, o.Type)
	}
	if d := cmp.Diff(want, got); d != "" {
		c.Errorf("conditions of %s (-want +got):\n%s", name, d)
	}
}

func testConflict(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.19}]}}`)
	egress := func(name, ip string) {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s},
  spec: {externalIPPool: p, egressIP: %q, appliedTo: {podSelector: {matchLabels: {app: web}}}}}`, name, ip))
	}
	egress("b", "10.10.0.12")
	egress("a", "") // in the same second: the first by name, so that b loses
	c.eventually(func() error {
		if a, b := c.egress("a"), c.egress("b"); !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
			c.remove("Egress", "a")
			c.remove("Egress", "b")
			egress("b", "10.10.0.12")
			egress("a", "")
			return fmt.Errorf("not of equal age")
		}
		return nil
	})
	c.wantStatus("b", "10.10.0.12  True Allocated False AssignmentError")
	c.wantOrder("b", v1beta1.IPAllocated, v1beta1.IPAssigned)
	c.pod("prod", "y", "node-1", "10.244.1.1", "web")
	c.wantCondition("b", "Conflict OverlappingSelection: pod prod/y is selected by egress a too, which comes first")
	c.wantCondition("a", "Conflict")
	c.pod("prod", "x", "node-2", "10.244.2.1", "web")
	c.wantCondition("b", "Conflict OverlappingSelection: 2 pods, such as prod/x, are selected by egress a too, which comes first")
	c.wantOrder("b", v1beta1.IPAllocated, v1beta1.IPAssigned, v1beta1.Conflict)
	c.wantRecords("members/by-egress/*/*", map[string]string{
		"members/by-egress/a/node-1": "prod/y=10.244.1.1", "members/by-egress/a/node-2": "prod/x=10.244.2.1",
	})
	since := func(name string, kind v1beta1.EgressConditionType) time.Time {
		conditions := c.egress(name).Status.Conditions
		return conditions[slices.IndexFunc(conditions, func(o v1beta1.EgressCondition) bool { return o.Type == kind })].LastTransitionTime.Time
	}
	before := since("b", v1beta1.Conflict)

	time.Sleep(time.Until(before.Add(1100 * time.Millisecond))) // a status that is written now would have another time
	c.patchPod("prod", "y", `{"metadata":{"labels":{"app":"db"}}}`)
	c.wantCondition("b", "Conflict OverlappingSelection: pod prod/x is selected by egress a too, which comes first")
	if after := since("b", v1beta1.Conflict); !after.Equal(before) {
		c.Errorf("the condition stayed True, and its time went from %v to %v", before, after)
	}
	c.patch("Egress", "b", `{"spec":{"bandwidth":{"rate":"1M","burst":"1M"}}}`) // another generation
	c.wantCondition("b", "Conflict OverlappingSelection: pod prod/x is selected by egress a too, which comes first")

	egress("twin", "10.10.0.12")
	c.wantStatus("twin", "  False AllocationError False AssignmentError True DuplicateIP")
	c.wantCondition("twin", "Conflict DuplicateIP: 10.10.0.12 is in use by egress b; pod prod/x is selected by egress a too, which comes first")
	c.wantCondition("twin", "IPAllocated AllocationError: 10.10.0.12 is in use by egress b")

	c.remove("Egress", "a")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/b/node-2": "prod/x=10.244.2.1"})
	c.wantCondition("b", "Conflict")
	c.wantCondition("twin", "Conflict DuplicateIP: 10.10.0.12 is in use by egress b; pod prod/x is selected by egress b too, which comes first")
	c.remove("Egress", "b")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/twin/node-2": "prod/x=10.244.2.1"})
	c.wantStatus("twin", "10.10.0.12  True Allocated False AssignmentError")
}
