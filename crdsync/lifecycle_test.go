package crdsync

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/store"
)

// TestLifeCycle goes through what becomes of pools, egresses and pods.
func TestLifeCycle(t *testing.T) {
	kube := kubetest.New(t)
	applyRBAC(t, kube)
	for name, test := range map[string]func(*cluster){
		"the egress IP changes within the pool":                    testIPChanged,
		"the pool of an egress changes":                            testPoolChanged,
		"the pool is dropped and set again":                        testPoolDropped,
		"the pool is extended":                                     testPoolExtended,
		"the pool is deleted while in use, and comes back":         testPoolDeleted,
		"a range in use is taken away past the webhook":            testRangeTakenAway,
		"an egress is deleted":                                     testEgressDeleted,
		"labels and appliedTo change":                              testLabels,
		"pods begin to count, and cease to":                        testPodStates,
		"of two egresses that select a pod the elder wins":         testPrecedence,
		"a pool IP in use is refused to another":                   testRefused,
		"no pool gives out a node's address":                       testNodeAddresses,
		"static egresses share an IP":                              testShared,
		"both families":                                            testDualStack,
		"a pool larger than any memory":                            testLargePools,
		"an allocation survives an hour without crdsync":           testDownForLong,
		"an allocation survives a restore of etcd":                 testRestoredEtcd,
		"an allocation survives an egress that has gone meanwhile": testRestoredOver,
		"pools and egresses come in any order":                     testAnyOrder,
		"what is left of IPs and nodes goes with them":             testDependents,
		"what a former leader left behind is collected":            testGarbage,
		"nothing is there that another test left":                  testLeftovers,
		"a pod's event is one transaction, and no news is none":    testTransactions,
		"a pod's event waits for no status of other egresses":      testOwnersLost,
	} {
		t.Run(name, func(t *testing.T) { test(newCluster(t, kube)) })
	}
}

// testLeftovers: a test that ended in the middle of something takes no other along.
func testLeftovers(c *cluster) {
	c.node("node-1", "10.0.0.1")
	c.pool("p", "10.0.0.0/28")
	c.egress("a", "externalIPPool: p")
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.patchNamespace("prod", `{"metadata": {"labels": {"env": "prod"}}}`)
	next := newCluster(c.T, c.kube)
	next.run(c.kube)
	next.pool("q", "10.0.1.0/28")
	next.egress("b", "externalIPPool: q")
	next.wantEgresses("b", "10.0.1.1/1")
	for _, pattern := range []string{"pools/p", "nodes/*", "members/*/*/*"} {
		next.wantRecords(pattern, map[string]string{})
	}
	ns, err := c.core.CoreV1().Namespaces().Get(c.Context(), "prod", metav1.GetOptions{})
	if err != nil || ns.Labels["env"] != "" {
		c.Errorf("namespace prod has the labels %v (%v)", ns.Labels, err)
	}
}

// pool creates a pool of ranges, each "start-end" or a CIDR.
func (c *cluster) pool(name string, ranges ...string) {
	c.Helper()
	c.create(fmt.Sprintf("{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: %s}, spec: %s}", name, rangesOf(ranges)))
}

func (c *cluster) patchPool(name string, ranges ...string) {
	c.Helper()
	c.patch("ExternalIPPool", name, fmt.Sprintf(`{"spec": %s}`, rangesOf(ranges)))
}

func rangesOf(ranges []string) string {
	var out []string
	for _, r := range ranges {
		if start, end, ok := strings.Cut(r, "-"); ok {
			out = append(out, fmt.Sprintf(`{"start": "%s", "end": "%s"}`, start, end))
		} else {
			out = append(out, fmt.Sprintf(`{"cidr": "%s"}`, r))
		}
	}
	return fmt.Sprintf(`{"ipRanges": [%s], "nodeSelector": {}}`, strings.Join(out, ", "))
}

// egress creates an egress of the pods with a label app=NAME; fields are those of the spec besides, like
// "externalIPPool: p".
func (c *cluster) egress(name, fields string) { c.egressOf(name, name, fields) }

func (c *cluster) egressOf(name, app, fields string) {
	c.Helper()
	c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s},
  spec: {appliedTo: {podSelector: {matchLabels: {app: %s}}}, %s}}`, name, app, fields))
}

// wantEgresses waits until etcd has these egresses: name, addresses, name, addresses ...
func (c *cluster) wantEgresses(pairs ...string) {
	c.Helper()
	want := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		want["egresses/"+pairs[i]] = pairs[i+1]
	}
	c.wantRecords("egresses/*", want)
}

// wantMembers waits until etcd lists the pods of the egress on node-1: "pod=ip ..."; "": none.
func (c *cluster) wantMembers(egress, pods string) {
	c.Helper()
	want := map[string]string{}
	for _, key := range memberKeys("node-1", egress) {
		if pods != "" {
			want[key] = pods
		}
	}
	c.wantRecords("members/*/node-1/"+egress, only(want, "members/by-node"))
	c.wantRecords("members/*/"+egress+"/node-1", only(want, "members/by-egress"))
}

func only(m map[string]string, prefix string) map[string]string {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(key, _ string) bool { return !strings.HasPrefix(key, prefix) })
	return m
}

// wantRefused waits until the condition of an egress says why it has no address.
func (c *cluster) wantRefused(name, why string) {
	c.Helper()
	c.eventually(func() error {
		u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		for _, condition := range conditions {
			m := condition.(map[string]any)
			if m["type"] == string(v1beta1.IPAllocated) && m["status"] == "False" && strings.Contains(fmt.Sprint(m["message"]), why) {
				return nil
			}
		}
		return fmt.Errorf("conditions of %s: got %v, want IPAllocated False, %q", name, conditions, why)
	})
}

// wantSpec fails when a field of the spec of an egress is not what the user typed.
func (c *cluster) wantSpec(name, field, want string) {
	c.Helper()
	u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	if got, _, _ := unstructured.NestedString(u.Object, "spec", field); got != want {
		c.Errorf("egress %s: spec.%s is %q, want %q", name, field, got, want)
	}
}

func testIPChanged(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.egress("a", "externalIPPool: p, egressIP: 10.0.0.3")
	c.egress("b", "externalIPPool: p")
	c.wantEgresses("a", "10.0.0.3/1", "b", "10.0.0.1/2")
	c.patch("Egress", "a", `{"spec": {"egressIP": "10.0.0.7"}}`)
	c.wantEgresses("a", "10.0.0.7/3", "b", "10.0.0.1/2")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.7": "p/3 a", "allocations/10.0.0.1": "p/2 b"})
	c.patch("Egress", "a", `{"spec": {"egressIP": "10.0.0.15"}}`) // the broadcast address: a /28 gives 14
	c.wantEgresses("a", "", "b", "10.0.0.1/2")
	c.wantRefused("a", "10.0.0.15 is not an address of pool p")
	c.patch("Egress", "a", `{"spec": {"egressIP": "10.0.0.14"}}`)
	c.wantRecords("allocations/10.0.0.14", map[string]string{"allocations/10.0.0.14": "p/4 a"})
	c.wantUsage("p", 14, 2)
}

func testPoolChanged(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.pool("q", "10.0.1.5-10.0.1.6")
	c.egress("a", "externalIPPool: p")
	c.wantStatus("a", "10.0.0.1  True Allocated False AssignmentError")
	c.wantSpec("a", "egressIP", "") // so that there is nothing to clear
	c.patch("Egress", "a", `{"spec": {"externalIPPool": "q"}}`)
	c.wantEgresses("a", "10.0.1.5/2")
	c.wantStatus("a", "10.0.1.5  True Allocated False AssignmentError")
	c.wantUsage("p", 14, 0)
	c.wantUsage("q", 2, 1)
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.1.5": "q/2 a"})
}

func testPoolDropped(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.egress("a", "externalIPPool: p, egressIP: 10.0.0.3")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.3": "p/1 a"})
	c.patch("Egress", "a", `{"spec": {"externalIPPool": null}}`)
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.3": "/1 a"})
	c.wantStatus("a", "10.0.0.3  True Allocated False AssignmentError")
	c.egress("b", "egressIP: 10.0.0.3")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.3": "/1 a b"})
	c.patch("Egress", "a", `{"spec": {"externalIPPool": "p"}}`)
	c.wantRefused("a", "10.0.0.3 is in use by egress b")
	c.wantEgresses("a", "", "b", "10.0.0.3/1")
	c.remove("Egress", "b")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.3": "p/2 a"})
	c.wantUsage("p", 14, 1)
}

func testPoolExtended(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.1-10.0.0.1")
	c.egress("a", "externalIPPool: p")
	c.wantEgresses("a", "10.0.0.1/1")
	c.egress("b", "externalIPPool: p")
	c.wantRefused("b", "pool p has no free address")
	c.patchPool("p", "10.0.0.1-10.0.0.1", "10.0.1.0/31", "10.0.1.0/32") // neither has an address to give
	c.wantUsage("p", 1, 1)
	c.patchPool("p", "10.0.9.9-10.0.9.9", "10.0.0.0-10.0.0.1")
	c.wantEgresses("a", "10.0.0.1/1", "b", "10.0.9.9/2") // the ranges in their order
	c.wantUsage("p", 3, 2)
}

func testPoolDeleted(c *cluster) {
	c.run(c.kube)
	c.pod("prod", "x", "node-1", "10.244.1.1", "b")
	c.pool("p", "10.0.0.1-10.0.0.9")
	for _, name := range []string{"a", "b", "d"} {
		c.egress(name, "externalIPPool: p")
		c.wantStatus(name, map[string]string{"a": "10.0.0.1", "b": "10.0.0.2", "d": "10.0.0.3"}[name]+"  True Allocated False AssignmentError")
	}
	c.egress("typed", "externalIPPool: p, egressIP: 10.0.0.7")
	c.remove("Egress", "a") // the lowest free address is none of theirs
	before := []string{"b", "10.0.0.2/2", "d", "10.0.0.3/3", "typed", "10.0.0.7/4"}
	c.wantEgresses(before...)

	c.remove("ExternalIPPool", "p")
	c.wantEgresses("b", "", "d", "", "typed", "")
	c.wantRecords("allocations/*", map[string]string{})
	for _, name := range []string{"b", "typed"} {
		c.wantRefused(name, "pool p does not exist")
		c.wantStatus(name, "  False AllocationError False AssignmentError")
	}
	c.wantMembers("b", "prod/x=10.244.1.1") // of an egress without address: its traffic is dropped
	c.wantSpec("typed", "egressIP", "10.0.0.7")

	c.egress("late", "externalIPPool: p")
	c.wantRefused("late", "pool p does not exist")
	c.pool("p", "10.0.0.1-10.0.0.9")
	c.wantEgresses(append(before, "late", "10.0.0.1/5")...)

	c.remove("ExternalIPPool", "p")
	c.wantRecords("allocations/*", map[string]string{})
	c.pool("p", "10.0.5.1-10.0.5.9")
	c.wantRecords("egresses/[bd]", map[string]string{"egresses/b": "10.0.5.1/6", "egresses/d": "10.0.5.2/7"})
	c.wantRefused("typed", "10.0.0.7 is not an address of pool p")
	c.wantSpec("typed", "egressIP", "10.0.0.7")
}

func testRangeTakenAway(c *cluster) {
	stop := c.run(c.kube)
	c.pool("p", "10.0.0.1-10.0.0.2", "10.0.5.1-10.0.5.9")
	c.pool("q", "10.0.9.1-10.0.9.9")
	c.egress("a", "externalIPPool: p")
	c.wantEgresses("a", "10.0.0.1/1")
	c.egress("typed", "externalIPPool: p, egressIP: 10.0.0.2")
	before := []string{"a", "10.0.0.1/1", "typed", "10.0.0.2/2"}
	c.wantEgresses(before...)
	c.patchPool("p", "10.0.5.1-10.0.5.9")
	taken := func() {
		c.Helper()
		for name, ip := range map[string]string{"a": "10.0.0.1", "typed": "10.0.0.2"} {
			c.wantRefused(name, ip+" was taken out of pool p while in use, and is kept: want its range back, or egressIP set to another address")
			c.wantStatus(name, ip+"  False AllocationError False AssignmentError")
		}
		c.wantEgresses(before...)
		c.wantUsage("p", 9, 2)
	}
	taken()
	stop()
	c.patchPool("p", "10.0.5.1-10.0.5.8", "10.0.5.9-10.0.5.9")
	c.run(c.kube)
	taken()
	c.wantEvents("a", "Warning AllocationError 10.0.0.1 was taken out of pool p while in use, and is kept: want its range back, or egressIP set to another address")

	c.patchPool("p", "10.0.5.1-10.0.5.9", "10.0.0.1-10.0.0.2")
	c.wantStatus("a", "10.0.0.1  True Allocated False AssignmentError")
	c.wantStatus("typed", "10.0.0.2  True Allocated False AssignmentError")
	c.wantEgresses(before...)
	c.patchPool("p", "10.0.5.1-10.0.5.9")
	taken()
	c.patch("Egress", "typed", `{"spec": {"egressIP": "10.0.5.5"}}`)
	c.wantStatus("typed", "10.0.5.5  True Allocated False AssignmentError")
	c.patch("Egress", "a", `{"spec": {"externalIPPool": "q"}}`)
	c.wantStatus("a", "10.0.9.1  True Allocated False AssignmentError")
	c.wantUsage("p", 9, 1)
}

func testEgressDeleted(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.egress("a", "externalIPPool: p")
	c.wantMembers("a", "prod/x=10.244.1.1")
	c.remove("Egress", "a")
	c.wantMembers("a", "")
	c.wantMembers(egress.Unselected, "prod/x=10.244.1.1")
	c.wantRecords("[aei]*/*", map[string]string{})
	c.wantUsage("p", 14, 0)
	c.egress("a", "externalIPPool: p")
	c.wantEgresses("a", "10.0.0.1/2") // the address is free, the id rests
}

func testLabels(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.pod("blue", "x", "node-1", "10.244.1.1", "web")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: a}, spec: {externalIPPool: p, appliedTo: {
  namespaceSelector: {matchLabels: {env: prod}}, podSelector: {matchExpressions: [{key: app, operator: In, values: [web, api]}]}}}}`)
	c.wantEgresses("a", "10.0.0.1/1")
	label := func(env string) {
		c.Helper()
		c.patchNamespace("blue", fmt.Sprintf(`{"metadata": {"labels": {"env": %s}}}`, env))
	}
	defer label("null")
	const x = "blue/x=10.244.1.1"
	c.wantMembers(egress.Unselected, x)
	label(`"prod"`)
	c.wantMembers("a", x)
	label(`"test"`)
	c.wantMembers("a", "")
	label(`"prod"`)
	c.wantMembers("a", x)
	c.patchPod("blue", "x", `{"metadata": {"labels": {"app": "db"}}}`)
	c.wantMembers("a", "")
	c.patchPod("blue", "x", `{"metadata": {"labels": {"app": "api"}}}`)
	c.wantMembers("a", x)
	c.patch("Egress", "a", `{"spec": {"appliedTo": {"namespaceSelector": null, "podSelector": null}}}`)
	c.wantMembers("a", "") // an empty one selects nothing
	c.patch("Egress", "a", `{"spec": {"appliedTo": {"podSelector": {"matchLabels": {"app": "api"}}}}}`)
	c.wantEgresses("a", "10.0.0.1/1")
}

func testPodStates(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.egress("a", "externalIPPool: p")
	c.pod("prod", "host", "node-1", "192.0.2.1", "none")
	c.deletePod("prod", "host", 0)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "host", Labels: map[string]string{"app": "a"}},
		Spec:       corev1.PodSpec{NodeName: "node-1", HostNetwork: true, Containers: []corev1.Container{{Name: "main", Image: "none.invalid"}}},
	}
	if _, err := c.core.CoreV1().Pods("prod").Create(c.Context(), p, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	c.patchPod("prod", "host", `{"status": {"phase": "Running", "podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}]}}`, "status")
	status := func(name, status string) {
		c.Helper()
		c.patchPod("prod", name, `{"status": `+status+`}`, "status")
	}
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantMembers("a", "prod/x=10.244.1.1")
	for _, phase := range []string{"Succeeded", "Failed"} {
		c.pod("prod", "y", "node-1", "10.244.1.2", "a")
		c.wantMembers("a", "prod/x=10.244.1.1 prod/y=10.244.1.2")
		status("y", `{"phase": "`+phase+`"}`)
		c.wantMembers("a", "prod/x=10.244.1.1")
		c.deletePod("prod", "y", 0)
	}
	c.pod("prod", "y", "node-1", "", "a") // it has no IP yet
	c.pod("prod", "z", "node-1", "10.244.1.3", "a")
	c.wantMembers("a", "prod/x=10.244.1.1 prod/z=10.244.1.3")
	status("y", `{"phase": "Pending", "podIP": "10.244.1.4", "podIPs": [{"ip": "10.244.1.4"}]}`) // its init containers run
	c.wantMembers("a", "prod/x=10.244.1.1 prod/y=10.244.1.4 prod/z=10.244.1.3")
	c.deletePod("prod", "x", 30) // it ends, and may still send
	c.pod("prod", "another", "node-1", "10.244.1.1", "none")
	c.wantMembers("a", "prod/y=10.244.1.4 prod/z=10.244.1.3") // its IP was given to another
	c.deletePod("prod", "another", 0)
	c.wantMembers("a", "prod/x=10.244.1.1 prod/y=10.244.1.4 prod/z=10.244.1.3")
	c.deletePod("prod", "x", 0)
	c.wantMembers("a", "prod/y=10.244.1.4 prod/z=10.244.1.3")
}

func testPrecedence(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.pod("prod", "x", "node-1", "10.244.1.1", "web")
	const x = "prod/x=10.244.1.1"
	c.egressOf("z", "web", "externalIPPool: p")
	c.wantMembers("z", x)
	c.eventually(func() error { // the API counts an age in seconds
		c.egressOf("m", "web", "externalIPPool: p")
		c.egressOf("b", "web", "externalIPPool: p")
		z, m, b := c.created("z"), c.created("m"), c.created("b")
		if z.Before(&m) && m.Equal(&b) {
			return nil
		}
		c.remove("Egress", "m")
		c.remove("Egress", "b")
		return fmt.Errorf("ages %s, %s and %s", z, m, b)
	})
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/z/node-1": x})
	c.remove("Egress", "z")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/b/node-1": x}) // of equal age, by name
	c.patch("Egress", "b", `{"spec": {"appliedTo": {"podSelector": {"matchLabels": {"app": "none"}}}}}`)
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/m/node-1": x})
	c.remove("Egress", "m")
	c.wantRecords("members/by-egress/*/*", map[string]string{})
	c.wantMembers(egress.Unselected, x)
}

func (c *cluster) created(name string) metav1.Time {
	c.Helper()
	u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	return u.GetCreationTimestamp()
}

func testRefused(c *cluster) {
	c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "y", "node-1", "10.244.1.2", "b")
	c.egress("a", "externalIPPool: p, egressIP: 10.0.0.3")
	c.wantEgresses("a", "10.0.0.3/1")
	c.egress("b", "externalIPPool: p, egressIP: 10.0.0.3")
	c.egress("c", "egressIP: 10.0.0.3") // static
	for _, name := range []string{"b", "c"} {
		c.wantRefused(name, "10.0.0.3 is in use by egress a")
	}
	c.wantEgresses("a", "10.0.0.3/1", "b", "", "c", "")
	c.wantMembers("a", "prod/x=10.244.1.1")
	c.wantMembers("b", "prod/y=10.244.1.2") // it has no address: nothing of it leaves
	c.remove("Egress", "a")
	c.wantRecords("egresses/*", map[string]string{"egresses/b": "10.0.0.3/2", "egresses/c": ""})
	c.wantStatus("b", "10.0.0.3  True Allocated False AssignmentError")
	c.wantRefused("c", "10.0.0.3 is in use by egress b")
}

// testNodeAddresses: the pool is the whole subnet, as is easily typed, and the nodes are in it.
func testNodeAddresses(c *cluster) {
	c.node("node-1", "10.0.0.1")
	c.run(c.kube)
	c.pool("p", "10.0.0.0/29")
	c.node("node-3", "10.0.0.3")
	c.wantRecords("nodes/*", map[string]string{"nodes/node-1": "1 10.0.0.1", "nodes/node-3": "2 10.0.0.3"})
	for _, name := range []string{"a", "b"} {
		c.egress(name, "externalIPPool: p")
		c.wantRecords("egresses/"+name, map[string]string{"egresses/" + name: map[string]string{"a": "10.0.0.2/1", "b": "10.0.0.4/2"}[name]})
	}
	c.egress("typed", "externalIPPool: p, egressIP: 10.0.0.3")
	c.wantRefused("typed", "10.0.0.3 is the address of node node-3: want another one of pool p, or no pool")
	c.egress("static", "egressIP: 10.0.0.3") // as the guide has it
	c.wantRecords("egresses/static", map[string]string{"egresses/static": "10.0.0.3/3"})
	c.remove("Egress", "static")
	c.node("node-4", "10.0.0.4")
	c.wantRecords("nodes/node-4", map[string]string{"nodes/node-4": "3 10.0.0.4"})
	c.wantEgresses("a", "10.0.0.2/1", "b", "10.0.0.4/2", "typed", "") // what is allocated stays
	if err := c.core.CoreV1().Nodes().Delete(c.Context(), "node-3", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.wantEgresses("a", "10.0.0.2/1", "b", "10.0.0.4/2", "typed", "10.0.0.3/4")
}

func testShared(c *cluster) {
	c.run(c.kube)
	c.egress("a", "egressIP: 192.0.2.9")
	c.egress("b", "egressIP: 192.0.2.9")
	c.wantEgresses("a", "192.0.2.9/1", "b", "192.0.2.9/1")
	c.wantRecords("allocations/*", map[string]string{"allocations/192.0.2.9": "/1 a b"})
	c.remove("Egress", "a")
	c.wantRecords("allocations/*", map[string]string{"allocations/192.0.2.9": "/1 b"})
}

func testDualStack(c *cluster) {
	c.run(c.kube)
	c.pool("four", "10.0.0.0/28")
	c.pool("six", "fd00::/112")
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.patchPod("prod", "x", `{"status": {"podIPs": [{"ip": "10.244.1.1"}, {"ip": "fd01::1"}]}}`, "status")
	c.egress("a", "externalIPPools: [six, four]")
	c.egress("b", "egressIPs: ['fd00::ffff', 10.0.0.9], externalIPPools: [four, six]")
	c.wantEgresses("a", "10.0.0.1/1 fd00::1/2", "b", "10.0.0.9/3 fd00::ffff/4")
	c.wantMembers("a", "prod/x=10.244.1.1 prod/x=fd01::1")
	c.remove("ExternalIPPool", "six")
	c.wantEgresses("a", "10.0.0.1/1", "b", "10.0.0.9/3")
	// the one without an address is dropped, and does not leave by its node
	c.wantMembers("a", "prod/x=10.244.1.1 prod/x=fd01::1")
	c.wantRefused("a", "pool six does not exist")
	c.pool("six", "fd00::/112")
	c.wantEgresses("a", "10.0.0.1/1 fd00::1/2", "b", "10.0.0.9/3 fd00::ffff/4")
}

func testLargePools(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: four}, spec: {ipRanges: [{cidr: 10.0.0.0/8}],
  subnetInfo: {gateway: 10.0.0.1, prefixLength: 8}, nodeSelector: {}}}`)
	c.pool("six", "fd00::/8", "2001:db8::/32")
	c.egress("a", "externalIPPool: four")
	c.egress("b", "externalIPPool: six")
	c.egress("c", "externalIPPool: six, egressIP: 'fdff:ffff:ffff:ffff:ffff:ffff:ffff:fffe'")
	c.egress("d", "externalIPPool: six, egressIP: 'fe00::'")
	c.egress("e", "externalIPPool: four, egressIP: 10.0.0.1")
	c.wantEgresses("a", "10.0.0.2/1", "b", "fd00::1/2", "c", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/3", "d", "", "e", "")
	c.wantRefused("d", "fe00:: is not an address of pool six")
	c.wantRefused("e", "10.0.0.1 is not an address of pool four") // the gateway
	c.wantUsage("four", 1<<24-3, 1)
	c.wantUsage("six", 1<<63-1, 2)
}

func testDownForLong(c *cluster) {
	stop := c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	for _, name := range []string{"a", "b", "d"} {
		c.egress(name, "externalIPPool: p")
		c.wantRecords("egresses/"+name, map[string]string{"egresses/" + name: map[string]string{"a": "10.0.0.1/1", "b": "10.0.0.2/2", "d": "10.0.0.3/3"}[name]})
	}
	stop()
	c.remove("Egress", "a")
	c.remove("ExternalIPPool", "p")
	c.pool("p", "10.0.0.0/28")
	c.patch("Egress", "d", `{"spec": {"appliedTo": {"podSelector": {"matchLabels": {"app": "other"}}}}}`)
	c.egress("0-late", "externalIPPool: p")
	c.run(c.kube)
	c.wantEgresses("b", "10.0.0.2/2", "d", "10.0.0.3/3", "0-late", "10.0.0.4/4") // that of a is free a moment later
}

// testRestoredEtcd has etcd come back as it was before an egress and another's change.
func testRestoredEtcd(c *cluster) {
	stop := c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.egress("b", "externalIPPool: p, egressIP: 10.0.0.1")
	c.wantEgresses("b", "10.0.0.1/1")
	old, _ := c.records()
	c.patch("Egress", "b", `{"spec": {"egressIP": "10.0.0.2"}}`)
	c.wantEgresses("b", "10.0.0.2/2")
	c.egress("a", "externalIPPool: p")
	c.wantStatus("a", "10.0.0.1  True Allocated False AssignmentError")
	stop()
	c.restore(old)
	c.run(c.kube)
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.1": "p/3 a", "allocations/10.0.0.2": "p/2 b"})
}

func testRestoredOver(c *cluster) {
	stop := c.run(c.kube)
	c.pool("p", "10.0.0.0/28")
	c.egress("gone", "externalIPPool: p")
	c.wantEgresses("gone", "10.0.0.1/1")
	old, _ := c.records()
	c.remove("Egress", "gone")
	c.wantEgresses()
	c.egress("a", "externalIPPool: p")
	c.wantStatus("a", "10.0.0.1  True Allocated False AssignmentError")
	stop()
	c.restore(old)
	c.run(c.kube)
	c.wantEgresses("a", "10.0.0.1/2")
}

// restore makes etcd hold what it held once.
func (c *cluster) restore(old map[string]string) {
	c.Helper()
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix, clientv3.WithPrefix()); err != nil {
		c.Fatal(err)
	}
	for key, value := range old {
		if _, err := c.etcd.Client().Put(c.Context(), store.DefaultPrefix+key, value); err != nil {
			c.Fatal(err)
		}
	}
}

func testAnyOrder(c *cluster) {
	c.run(c.kube)
	c.egress("a", "externalIPPool: p")
	c.egress("b", "externalIPPool: p, egressIP: 10.0.0.1")
	c.wantRefused("a", "pool p does not exist")
	c.pool("p", "10.0.0.0/28")
	c.wantRecords("allocations/10.0.0.1", map[string]string{"allocations/10.0.0.1": "p/2 b"})
	// it leaves the one that the other names
	c.wantRecords("allocations/10.0.0.2", map[string]string{"allocations/10.0.0.2": "p/1 a"})
	for range 20 {
		c.remove("ExternalIPPool", "p")
		c.pool("p", "10.0.0.0/28")
		c.patch("Egress", "a", `{"spec": {"bandwidth": {"rate": "1M", "burst": "1M"}}}`)
		c.patch("Egress", "a", `{"spec": {"bandwidth": null}}`)
	}
	c.wantStatus("a", "10.0.0.2  True Allocated False AssignmentError")
	c.wantStatus("b", "10.0.0.1  True Allocated False AssignmentError")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.0.0.1": "p/2 b", "allocations/10.0.0.2": "p/1 a"})
}
