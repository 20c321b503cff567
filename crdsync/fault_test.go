package crdsync

import (
	"context"
	"fmt"
	"strings"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/egret-project/egret/api/v1beta1"
)

// loosen makes the API server take any spec until the test ends: as if the objects were older than the schema.
func (c *cluster) loosen() {
	c.Helper()
	client, err := apiextensions.NewForConfig(c.kube)
	if err != nil {
		c.Fatal(err)
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	set := func(name string, spec func(old apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps) {
		c.eventually(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), deadline) // the test's own has ended when it cleans up
			defer cancel()
			crd, err := crds.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			fields := crd.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties
			fields["spec"] = spec(fields["spec"])
			_, err = crds.Update(ctx, crd, metav1.UpdateOptions{})
			return err
		})
	}
	yes := true
	for _, resource := range []string{"egresses", "externalippools"} {
		name := resource + ".crd.antrea.io"
		var strict apiextensionsv1.JSONSchemaProps
		set(name, func(old apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps {
			strict = old
			return apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: &yes}
		})
		c.Cleanup(func() {
			set(name, func(apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps { return strict })
		})
	}
	for _, kind := range []string{"Egress", "ExternalIPPool"} {
		u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{}}}
		u.SetGroupVersionKind(v1beta1.GroupVersion.WithKind(kind))
		u.SetName("loose")
		c.eventually(func() error { // the API server takes a moment to see its own CRDs
			_, err := c.dyn.Resource(resourceOf(kind)).Create(c.Context(), u, metav1.CreateOptions{DryRun: []string{"All"}})
			return err
		})
	}
}

// wantAllocated waits until the condition IPAllocated of an egress is as told, and its message has all the parts.
func (c *cluster) wantAllocated(name string, status metav1.ConditionStatus, parts ...string) {
	c.Helper()
	c.eventually(func() error {
		u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var e v1beta1.Egress
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e); err != nil {
			return err
		}
		for _, condition := range e.Status.Conditions {
			if condition.Type != v1beta1.IPAllocated {
				continue
			}
			for _, part := range parts {
				if !strings.Contains(condition.Message, part) {
					return fmt.Errorf("egress %s: IPAllocated says %q, want %q", name, condition.Message, part)
				}
			}
			if condition.Status != status {
				return fmt.Errorf("egress %s: IPAllocated is %s, want %s", name, condition.Status, status)
			}
			return nil
		}
		return fmt.Errorf("egress %s has no condition IPAllocated", name)
	})
}

// testPoolFaults: what the webhook would refuse came past it.
func testPoolFaults(c *cluster) {
	c.run(c.kube)
	pool := func(name, ranges string) {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: %s}, spec: {ipRanges: [%s], nodeSelector: {}}}`, name, ranges))
	}
	egress := func(name, fields string) {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s}, spec: {%s, appliedTo: {}}}`, name, fields))
	}
	pool("a-elder", "{start: 10.10.0.1, end: 10.10.0.3}")
	pool("b-younger", "{start: 10.10.0.2, end: 10.10.0.4}")
	pool("c-inverted", "{start: 10.10.1.9, end: 10.10.1.1}")
	pool("d-twice", "{start: 10.10.2.1, end: 10.10.2.5}, {cidr: 10.10.2.4/30}")
	egress("young-1", "externalIPPool: b-younger, egressIP: 10.10.0.2")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.2": "b-younger/1 young-1"})
	egress("elder", "externalIPPool: a-elder, egressIP: 10.10.0.2")
	c.wantAllocated("elder", metav1.ConditionFalse, "10.10.0.2 is in use by egress young-1")
	egress("young-2", "externalIPPool: b-younger")
	c.wantAllocated("young-2", metav1.ConditionFalse, "pool b-younger: ipRanges: 10.10.0.2-10.10.0.4 overlaps with 10.10.0.1-10.10.0.3 of pool a-elder")
	egress("inverted", "externalIPPool: c-inverted")
	c.wantAllocated("inverted", metav1.ConditionFalse, "pool c-inverted", "ipRanges[0]: start 10.10.1.9 is after end 10.10.1.1")
	egress("twice", "externalIPPool: d-twice")
	c.wantAllocated("twice", metav1.ConditionFalse, "10.10.2.5-10.10.2.6 overlaps with 10.10.2.1-10.10.2.5 of the same pool")
	egress("outside", "externalIPPool: a-elder, egressIP: 10.10.9.9")
	c.wantAllocated("outside", metav1.ConditionFalse, "egressIP 10.10.9.9 is not an address of pool a-elder: want one of 10.10.0.1-10.10.0.3")
	egress("early", "externalIPPool: later, egressIP: '2001:DB8:0::1'")
	c.wantAllocated("early", metav1.ConditionFalse, "pool later does not exist")
	pool("later", "{cidr: '2001:db8::/64'}")
	c.wantAllocated("early", metav1.ConditionTrue, "2001:db8::1 is of pool later")
	egress("good", "externalIPPool: a-elder")
	c.wantAllocated("good", metav1.ConditionTrue, "10.10.0.1 is of pool a-elder")
	c.wantRecords("allocations/*", map[string]string{
		"allocations/10.10.0.1": "a-elder/4 good", "allocations/10.10.0.2": "b-younger/1 young-1", "allocations/10.10.0.3": "b-younger/2 young-2",
		"allocations/2001:db8::1": "later/3 early",
	})
}
