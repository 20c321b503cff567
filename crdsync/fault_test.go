package crdsync

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/google/go-cmp/cmp"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/egret-project/egret/api/v1beta1"
)

// loosen makes the API server take any spec until tighten is called, or the test ends: as if the objects were older
// than the schema.
func (c *cluster) loosen() (tighten func()) {
	c.Helper()
	client, err := apiextensions.NewForConfig(c.kube)
	if err != nil {
		c.Fatal(err)
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	set := func(name string, spec func(old apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps) {
		c.eventually(func() error {
			// the test's own has ended when it cleans up
			ctx, cancel := context.WithTimeout(context.Background(), deadline)
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
	var restore []func()
	for _, resource := range []string{"egresses", "externalippools"} {
		name := resource + ".crd.antrea.io"
		var strict apiextensionsv1.JSONSchemaProps
		set(name, func(old apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps {
			strict = old
			return apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: &yes}
		})
		restore = append(restore, func() {
			set(name, func(apiextensionsv1.JSONSchemaProps) apiextensionsv1.JSONSchemaProps { return strict })
		})
	}
	once := sync.OnceFunc(func() {
		for _, f := range restore {
			f()
		}
	})
	c.Cleanup(once)
	takes := func(kind string) error {
		u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{}}}
		u.SetGroupVersionKind(v1beta1.GroupVersion.WithKind(kind))
		u.SetName("loose")
		_, err := c.dyn.Resource(resourceOf(kind)).Create(c.Context(), u, metav1.CreateOptions{DryRun: []string{"All"}})
		return err
	}
	for _, kind := range []string{"Egress", "ExternalIPPool"} { // the API server takes a moment to see its own CRDs
		c.eventually(func() error { return takes(kind) })
	}
	return func() {
		once()
		for _, kind := range []string{"Egress", "ExternalIPPool"} {
			c.eventually(func() error {
				if takes(kind) == nil {
					return fmt.Errorf("any %s is taken still", kind)
				}
				return nil
			})
		}
	}
}

// wantAllocated waits until the condition IPAllocated of an egress is as given, and its message has all the parts.
func (c *cluster) wantAllocated(name string, status metav1.ConditionStatus, parts ...string) {
	c.Helper()
	c.eventually(func() error {
		u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range readStatus(u).Conditions {
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
	c.wantAllocated("twice", metav1.ConditionFalse, "10.10.2.4/30 overlaps with 10.10.2.1-10.10.2.5 of the same pool")
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

// testSlipped: objects that are older than the schema are reported, each by itself, and hold up no other.
func testSlipped(c *cluster) {
	c.example()
	tighten := c.loosen()
	egresses := map[string]struct{ spec, says string }{
		"no-address":   {"{egressIP: here, appliedTo: {}}", `egressIP "here": want an IPv4 or IPv6 address`},
		"nothing":      {"{}", "neither egressIP nor externalIPPool is set"},
		"a-list":       {"{egressIP: 192.0.2.7, appliedTo: [all]}", "reading the object"},
		"a-key":        {"{egressIP: 192.0.2.7, appliedTo: {podSelector: {matchLabels: {'a b': c}}}}", `appliedTo.podSelector.matchLabels: key "a b": want the name of a label`},
		"an-operator":  {"{egressIP: 192.0.2.7, appliedTo: {namespaceSelector: {matchExpressions: [{key: a, operator: Near}]}}}", `operator "Near": want In, NotIn, Exists or DoesNotExist`},
		"a-rate":       {"{egressIP: 192.0.2.7, appliedTo: {}, bandwidth: {rate: fast, burst: 2G}}", `bandwidth rate "fast": want a quantity above 0`},
		"two-of-one":   {"{egressIPs: [192.0.2.7, 192.0.2.8], appliedTo: {}}", "want at most one of each IP family"},
		"a-bad-pool":   {"{externalIPPool: no-cidr, appliedTo: {}}", `pool no-cidr cannot be read: ipRanges[0]: cidr "here"`},
		"outside":      {"{externalIPPool: external-ip-pool, egressIP: 10.10.9.9, appliedTo: {}}", "egressIP 10.10.9.9 is not an address of pool external-ip-pool"},
		"of-no-family": {"{externalIPPool: a-gateway, appliedTo: {}}", "gateway fd00::1 is not of the IP family of the range"},
	}
	pools := map[string]struct{ spec, says string }{
		"no-cidr":    {"{ipRanges: [{cidr: here}], nodeSelector: {}}", `ipRanges[0]: cidr "here"`},
		"no-ranges":  {"{ipRanges: all, nodeSelector: {}}", "reading the object"},
		"no-node":    {"{ipRanges: [], nodeSelector: {matchLabels: {'a b': c}}}", `nodeSelector.matchLabels: key "a b"`},
		"a-gateway":  {"{ipRanges: [{cidr: 10.1.0.0/28}], nodeSelector: {}, subnetInfo: {gateway: 'fd00::1', prefixLength: 64}}", "gateway fd00::1"},
		"a-vlan":     {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.2.0.1, prefixLength: 24, vlan: 5000}}", "vlan 5000: want 1 to 4094"},
		"a-prefix":   {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.2.0.1, prefixLength: 32}}", "prefixLength 32: want 1 to 31"},
		"z-overlaps": {"{ipRanges: [{start: 10.10.0.20, end: 10.10.0.21}], nodeSelector: {}}", "of pool external-ip-pool"},
	}
	for name, tt := range egresses {
		c.create(fmt.Sprintf("{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s}, spec: %s}", name, tt.spec))
	}
	for name, tt := range pools {
		c.create(fmt.Sprintf("{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: %s}, spec: %s}", name, tt.spec))
	}
	const refused = "a-number" // its status cannot be written either
	c.create("{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: " + refused + "}, spec: {egressIP: 10, appliedTo: {}}}")
	tighten()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	stop := c.run(c.kube)
	c.wantAllocated("egress-prod-web", metav1.ConditionTrue, "is of pool external-ip-pool")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1")
	for name, tt := range egresses {
		c.wantAllocated(name, metav1.ConditionFalse, tt.says)
	}
	warned := func(kind, name, reason, says string) {
		u, err := c.dyn.Resource(resourceOf(kind)).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			c.Fatal(err)
		}
		c.eventually(func() error {
			events := c.eventsAbout(string(u.GetUID()), kind, name)
			if len(events) != 1 || !strings.HasPrefix(events[0], "Warning "+reason) || !strings.Contains(events[0], says) {
				return fmt.Errorf("%s %s: Events %q, want a Warning %s that says %q", kind, name, events, reason, says)
			}
			return nil
		})
	}
	for name, tt := range pools {
		warned("ExternalIPPool", name, "InvalidPool", tt.says)
	}
	warned("Egress", refused, "StatusRefused", "spec.egressIP: Invalid value")
	stop()
	said := func() map[string]int64 {
		_, revisions := c.records()
		maps.DeleteFunc(revisions, func(key string, _ int64) bool {
			return strings.HasPrefix(key, "members/") || strings.HasPrefix(key, "pods/")
		})
		return revisions
	}
	before := said()
	c.run(c.kube) // finds all that again, which is nothing new
	c.pod("prod", "b", "node-1", "10.244.1.2", "web")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1 prod/b=10.244.1.2")
	if d := cmp.Diff(before, said()); d != "" {
		c.Errorf("revisions after a restart (-before +after):\n%s", d)
	}
	warned("Egress", refused, "StatusRefused", "spec.egressIP: Invalid value")
}
