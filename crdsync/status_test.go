package crdsync

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/store"
)

// getEgress returns an Egress.
func (c *cluster) getEgress(name string) v1beta1.Egress {
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

// wantCondition waits until a condition of an egress says "type reason: message", or, where reason and message are left
// out, is absent.
func (c *cluster) wantCondition(name, want string) {
	c.Helper()
	kind, _, present := strings.Cut(want, " ")
	c.eventually(func() error {
		got := kind
		e := c.getEgress(name)
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
	for _, o := range c.getEgress(name).Status.Conditions {
		got = append(got, o.Type)
	}
	if d := cmp.Diff(want, got); d != "" {
		c.Errorf("conditions of %s (-want +got):\n%s", name, d)
	}
}

func testConflict(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.19}], nodeSelector: {}}}`)
	egress := func(name, ip string) {
		if ip != "" {
			ip = "egressIP: " + ip + ", "
		}
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s},
  spec: {externalIPPool: p, %sappliedTo: {podSelector: {matchLabels: {app: web}}}}}`, name, ip))
	}
	egress("b", "10.10.0.12")
	egress("a", "") // in the same second: the first by name, so that b loses
	c.eventually(func() error {
		if a, b := c.getEgress("a"), c.getEgress("b"); !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
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
		conditions := c.getEgress(name).Status.Conditions
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

func testDegraded(c *cluster) {
	c.example()
	c.run(c.kube)
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.own("10.10.0.11", "node-4")
	agent := func(node string, faults map[string]string) {
		c.put("agents/"+node, egress.Agent{Node: node, Address: ip("192.0.2.1"), Faults: faults})
	}
	agent("node-1", nil)
	agent("node-4", nil)
	c.wantStatus("egress-prod-web", "10.10.0.11 node-4 True Allocated True Assigned")
	agent("node-4", map[string]string{"routes": "no", "nftables": "refused"})
	c.wantCondition("egress-prod-web", "Degraded ProgrammingError: node node-4: nftables: refused; node node-4: routes: no")
	c.wantOrder("egress-prod-web", v1beta1.IPAllocated, v1beta1.IPAssigned, v1beta1.Degraded)
	c.wantCondition("egress-staging-web", "Degraded") // neither its IP nor its pods are there
	agent("node-1", map[string]string{"conntrack": "full"})
	c.wantCondition("egress-prod-web",
		"Degraded ProgrammingError: node node-4: nftables: refused; node node-4: routes: no; node node-1: conntrack: full")
	c.pod("staging", "b", "node-1", "10.244.1.2", "web")
	c.wantCondition("egress-staging-web", "Degraded ProgrammingError: node node-1: conntrack: full")
	agent("node-4", nil)
	c.wantCondition("egress-prod-web", "Degraded ProgrammingError: node node-1: conntrack: full")
	const unknown = "no further pod gets its egress IP: the addresses of pods on node-9 (1 nodes) are not known"
	agent("node-1", map[string]string{"pods": unknown})
	c.wantCondition("egress-prod-web", "Degraded ProgrammingError: node node-1: pods: "+unknown)
	agent("node-1", nil)
	c.wantCondition("egress-prod-web", "Degraded")
	c.wantEvents("egress-prod-web", on+"node-4", "Warning Degraded node node-4: nftables: refused; node node-4: routes: no")

	dropped := map[netip.Addr]string{ip("10.10.0.11"): "chain x translates first"}
	c.put("agents/node-1", egress.Agent{Node: "node-1", Address: ip("192.0.2.1"), Dropped: dropped})
	c.wantCondition("egress-prod-web", "Degraded TrafficDropped: node node-1: 10.10.0.11: chain x translates first")
	c.wantCondition("egress-staging-web", "Degraded") // has another IP
	agent("node-1", nil)
	c.wantCondition("egress-prod-web", "Degraded")

	used := map[netip.Addr]string{ip("10.10.0.11"): "02:00:00:00:00:09 on link eth0"}
	c.put("agents/node-4", egress.Agent{Node: "node-4", Address: ip("192.0.2.1"), Conflicts: used})
	c.wantCondition("egress-prod-web", "Degraded AddressInUse: node node-4: 10.10.0.11: another host uses it too, 02:00:00:00:00:09 on link eth0")
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"owners/10.10.0.11"); err != nil {
		c.Fatal(err)
	}
	c.wantCondition("egress-prod-web",
		"IPAssigned AssignmentError: no node holds 10.10.0.11: another host uses it, 02:00:00:00:00:09 on link eth0 of node node-4")
	c.wantCondition("egress-prod-web", "Degraded")
}

// kubectl runs kubectl as the administrator.
func (c *cluster) kubectl(args ...string) string {
	c.Helper()
	cmd := exec.CommandContext(c.Context(), kubetest.Kubectl(c), append([]string{
		"--kubeconfig=/dev/null", "--cache-dir=" + c.TempDir(), "--server=" + c.kube.Host, "--token=" + c.kube.BearerToken,
		"--certificate-authority=" + c.kube.CAFile,
	}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		c.Fatalf("kubectl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func testReading(c *cluster) {
	c.run(c.kube)
	c.kubectl("apply", "-f", "../manifests/examples")
	c.pool("host", "10.10.7.5/32")
	c.wantUsage("host", 0, 0)
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: twin}, spec: {externalIPPool: external-ip-pool, egressIP: 10.10.0.11,
  appliedTo: {podSelector: {}}}}`)
	c.own("10.10.0.11", "node-4")
	c.pool("six", "fd00::/112")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: dual}, spec: {externalIPPools: [external-ip-pool, six], appliedTo: {}}}`)
	c.wantStatus("dual", "10.10.0.13  True Allocated False AssignmentError")
	c.wantEvents("egress-prod-web", on+"node-4")
	c.wantEvents("twin", "Warning AllocationError 10.10.0.11 is in use by egress egress-prod-web",
		"Warning Conflict 10.10.0.11 is in use by egress egress-prod-web; pod prod/a is selected by egress egress-prod-web too, which comes first")
	for _, tt := range []struct {
		args string
		want []string // fields in a row, of one line
	}{
		{"get egress", []string{"NAME EGRESSIP AGE NODE", "egress-prod-web 10.10.0.11 * node-4", "twin *"}},
		{"get egress -o wide", []string{
			"NAME EGRESSIP AGE NODE SECONDIP POOL ALLOCATED ASSIGNED CONFLICT DEGRADED CAUSE",
			"egress-prod-web 10.10.0.11 * node-4 external-ip-pool Allocated Assigned",
			`dual 10.10.0.13 * fd00::1 \["external-ip-pool","six"\] Allocated AssignmentError no node holds 10.10.0.13: *`,
			"twin * external-ip-pool AllocationError AssignmentError DuplicateIP 10.10.0.11 is in use by egress egress-prod-web",
		}},
		{"get externalippool -o wide", []string{"NAME TOTAL USED AGE NODES", "external-ip-pool 10 3 * {}", "host 0 0 * {}"}},
		{"describe egress egress-prod-web", []string{"Egress IP: 10.10.0.11", "Egress Node: node-4", "Normal IPAssigned * egret-crdsync 10.10.0.11 is on node node-4"}},
		{"describe egress twin", []string{"Reason: DuplicateIP", "Warning Conflict * egret-crdsync 10.10.0.11 is in use by egress egress-prod-web; *"}},
	} {
		out := c.kubectl(strings.Fields(tt.args)...)
		c.Logf("kubectl %s\n%s", tt.args, out)
		var lines []string
		for line := range strings.Lines(out) {
			lines = append(lines, strings.Join(strings.Fields(strings.ReplaceAll(line, "<none>", "")), " "))
		}
		for _, want := range tt.want {
			if !slices.ContainsFunc(lines, func(line string) bool { ok, _ := path.Match(want, strings.ReplaceAll(line, "/", "|")); return ok }) {
				c.Errorf("kubectl %s: no line %q", tt.args, want)
			}
		}
	}
}

func testUsage(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{cidr: 10.10.0.0/24}], nodeSelector: {}}}`)
	c.wantUsage("p", 254, 0)
	late := 0
	shown := func(total, used int64, since time.Time) {
		c.Helper()
		c.wantUsage("p", total, used)
		if d := time.Since(since); d > time.Second {
			c.Logf("%d of %d: shown after %v", used, total, d)
			late++
		}
	}
	within := func(used int64, since time.Time) { c.Helper(); shown(254, used, since) }
	const n = 50 // the statuses of all of them are to be written meanwhile
	for i := range n {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: e-%03d}, spec: {externalIPPool: p, appliedTo: {}}}`, i))
	}
	within(n, time.Now())
	start := time.Now()
	c.remove("Egress", "e-007")
	within(n-1, start)
	if err := c.dyn.Resource(v1beta1.EgressResource).DeleteCollection(c.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		c.Fatal(err)
	}
	within(0, time.Now())
	create := func(ranges string) {
		c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [` + ranges + `], nodeSelector: {}}}`)
	}
	for _, step := range []struct {
		do          func()
		total, used int64
	}{
		{func() {
			c.patch("ExternalIPPool", "p", `{"spec":{"ipRanges":[{"start":"10.10.0.1","end":"10.10.0.10"}]}}`)
		}, 10, 0},
		{func() { c.egress("a", "externalIPPool: p"); c.egress("b", "externalIPPool: p") }, 10, 2},
		{func() { c.remove("ExternalIPPool", "p"); create("{cidr: 10.10.0.0/24}") }, 254, 2},
		{func() { c.remove("ExternalIPPool", "p"); create("{start: 10.10.0.2, end: 10.10.0.2}") }, 1, 1},
		{func() { c.remove("Egress", "a"); c.remove("Egress", "b"); c.egress("a", "egressIP: 192.0.2.7") }, 1, 0},
		{func() { c.patch("Egress", "a", `{"spec": {"egressIP": "10.10.0.2", "externalIPPool": "p"}}`) }, 1, 1},
	} {
		start := time.Now()
		step.do()
		shown(step.total, step.used, start)
	}
	if late > 3 { // on a busy machine one or the other is
		c.Errorf("%d of 9 changes were shown later than a second after", late)
	}
}

// testCauses: whatever the status tells of, it tells at once when it changes.
func testCauses(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {
  ipRanges: [{start: 10.10.0.11, end: 10.10.0.19}], nodeSelector: {matchLabels: {gateway: a}}}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: elder}, spec: {externalIPPool: p, appliedTo: {
  namespaceSelector: {matchLabels: {env: prod}}}}}`)
	c.wantStatus("elder", "10.10.0.11  True Allocated False AssignmentError")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: web}, spec: {externalIPPool: p, appliedTo: {podSelector: {}}}}`)
	c.pod("causes", "x", "node-1", "10.244.1.1", "web")
	label := func(patch string) { c.patchNamespace("causes", patch) }
	defer label(`{"metadata": {"labels": {"env": null}}}`)
	node := func(patch string) {
		if _, err := c.core.CoreV1().Nodes().Patch(c.Context(), "node-1", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			c.Fatal(err)
		}
	}
	gone := func(key string) {
		if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+key); err != nil {
			c.Fatal(err)
		}
	}
	agent := func(faults map[string]string) {
		c.put("agents/node-1", egress.Agent{Node: "node-1", Address: ip("192.0.2.1"), Faults: faults})
	}
	const (
		unheld   = "IPAssigned AssignmentError: no node holds 10.10.0.12"
		none     = unheld + ": pool p selects no node"
		dead     = unheld + ": pool p selects 1 node; without a live agent: node-1"
		cordoned = unheld + ": pool p selects 1 node; cordoned: node-1"
		one      = unheld + " yet: 1 node could"
		full     = unheld + ": pool p selects 1 node; without room, see egret get nodes: node-1"
		assigned = "IPAssigned Assigned: 10.10.0.12 is on node node-1"
	)
	c.wantCondition("web", none)
	for _, step := range []struct {
		what string
		do   func()
		want string
	}{
		{"a node comes", func() { c.node("node-1", "192.0.2.1"); node(`{"metadata": {"labels": {"gateway": "a"}}}`) }, dead},
		{"its label goes", func() { node(`{"metadata": {"labels": {"gateway": null}}}`) }, none},
		{"the pool selects all", func() { c.patch("ExternalIPPool", "p", `{"spec": {"nodeSelector": {"matchLabels": null}}}`) }, dead},
		{"its agent comes", func() { agent(nil) }, one},
		{"it has another link with the pool's VLAN", func() {
			c.put("agents/node-1", egress.Agent{Node: "node-1", Address: ip("192.0.2.1"), Refused: map[string]string{"p": "link x has VLAN 7"}})
		}, unheld + ": pool p selects 1 node; refused by node-1: link x has VLAN 7"},
		{"the link goes", func() { agent(nil) }, one},
		{"it is cordoned", func() { c.put("cordons/node-1", egress.Cordon{}) }, cordoned},
		{"it is uncordoned", func() { gone("cordons/node-1") }, one},
		{"the annotation takes its room", func() { node(`{"metadata": {"annotations": {"node.antrea.io/max-egress-ips": "0"}}}`) }, cordoned},
		{"it has room for one", func() { node(`{"metadata": {"annotations": {"node.antrea.io/max-egress-ips": "1"}}}`) }, one},
		{"another IP takes that", func() { c.own("10.10.0.11", "node-1") }, full},
		{"the IP leaves", func() { gone("owners/10.10.0.11") }, one},
		{"it takes the IP", func() { c.own("10.10.0.12", "node-1") }, assigned},
		{"it is at fault", func() { agent(map[string]string{"routes": "no"}) }, "Degraded ProgrammingError: node node-1: routes: no"},
		{"with another part", func() { agent(map[string]string{"nftables": "no"}) }, "Degraded ProgrammingError: node node-1: nftables: no"},
		{"it loses the IP, and has the pod still", func() { gone("owners/10.10.0.12") }, "Degraded ProgrammingError: node node-1: nftables: no"},
		{"the pod becomes another's by its namespace", func() { label(`{"metadata": {"labels": {"env": "prod"}}}`) },
			"Conflict OverlappingSelection: pod causes/x is selected by egress elder too, which comes first"},
		{"so the fault is no longer its own", func() {}, "Degraded"},
		{"the namespace is its own again", func() { label(`{"metadata": {"labels": {"env": "test"}}}`) }, "Conflict"},
		{"so the fault is, too", func() {}, "Degraded ProgrammingError: node node-1: nftables: no"},
		{"the pod goes", func() { c.deletePod("causes", "x", 0) }, "Degraded"},
		{"the agent is dead", func() { gone("agents/node-1") }, dead},
		{"the node goes", func() {
			if err := c.core.CoreV1().Nodes().Delete(c.Context(), "node-1", metav1.DeleteOptions{}); err != nil {
				c.Fatal(err)
			}
		}, none},
		{"the pool goes", func() { c.remove("ExternalIPPool", "p") }, "IPAllocated AllocationError: pool p does not exist"},
		{"the pool comes back", func() {
			c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {
  ipRanges: [{start: 10.10.0.11, end: 10.10.0.19}], nodeSelector: {}}}`)
		}, "IPAllocated Allocated: 10.10.0.12 is of pool p"},
	} {
		start := time.Now()
		step.do()
		c.wantCondition("web", step.want)
		// Milliseconds, where nobody else computes; what is not told of is found after a minute.
		if d := time.Since(start); d > 20*time.Second {
			c.Errorf("%s: shown after %v", step.what, d)
		}
	}
}

func TestWhatWasMirroredOfOneObjectIsNotReportedOfAnother(t *testing.T) {
	s := &status{decoded: map[string]decoded{}, verdicts: map[string]verdict{"web": {name: "web", uid: "1", generation: 2, addresses: []egress.Address{{IP: ip("10.0.0.1"), ID: 1}}}}}
	for name, tt := range map[string]struct {
		uid        types.UID
		generation int64
		want       bool
	}{
		"the one that was mirrored":     {"1", 2, true},
		"a change that is not mirrored": {"1", 3, false},
		"deleted, and created anew":     {"2", 2, false},
	} {
		u := &unstructured.Unstructured{Object: map[string]any{}}
		u.SetName("web")
		u.SetUID(tt.uid)
		u.SetGeneration(tt.generation)
		if _, differs := s.desired(egressKind, u); differs != tt.want {
			t.Errorf("%s: to be written %t, want %t", name, differs, tt.want)
		}
	}
}

func TestAPassComparesNoStatuses(t *testing.T) {
	s := &status{wake: make(chan struct{}, 1)} // without a cache or a source, nothing can be compared
	for range 2 {
		s.publish(control{usage: map[string]v1beta1.IPPoolUsage{"p": {Total: 1}}})
	}
	if len(s.wake) != 1 || s.published.usage["p"].Total != 1 || s.usage != nil {
		t.Errorf("woken %d times, published %v, compared with %v: want it left to others", len(s.wake), s.published.usage, s.usage)
	}
}
