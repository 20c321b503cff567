package crdsync

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/store"
)

// TestPorts goes through what becomes of the blocks of ports of nodes.
func TestPorts(t *testing.T) {
	kube := kubetest.New(t)
	applyRBAC(t, kube)
	for name, test := range map[string]func(*cluster){
		"a node gets ports with its first pod, in one transaction":        testPortsGiven,
		"a node without pods has no ports, once they have rested":         testPortsFreed,
		"a node that gets pods again gets its own ports back":             testPortsBack,
		"ports of an IP that is given to another egress rest":             testPortsOfAnotherEgress,
		"an etcd whose roles are older remembers nothing of ports":        testPortsOfOlderRoles,
		"a node whose object is deleted has no ports":                     testPortsOfGoneNode,
		"an agent gets more ports, and fewer":                             testPortsAsked,
		"an agent gives ports back, but not those that every node has":    testPortsGivenBack,
		"a node that gets no ports is reported, and gets those that come": testPortsExhausted,
		"static egress IPs have no blocks of ports":                       testPortsStatic,
		"blocks are given, and taken away, by the option":                 testPortsTurnedOff,
		"a restart gives nobody other ports":                              testPortsRestart,
		"whoever leads, no two nodes have a port":                         testPortsOfLeaders,
		"records of blocks that were spoiled are mended":                  testPortsSpoiled,
		"a pod's event is one transaction with its ports, too":            testPortsTransactions,
		"an etcd that is restored has the ports of its nodes":             testPortsRestored,
	} {
		t.Run(name, func(t *testing.T) { test(newCluster(t, kube)) })
	}
}

// ports returns the blocks in etcd as "ip first-last node", - behind those that are retired, x behind those that rest,
// and fails when two have a port in common, or the copies in the Members are other ones than the live ones.
func (c *cluster) ports() (out []string, err error) {
	c.Helper()
	values, _ := c.records()
	blocks, copies := map[string]egress.Block{}, map[string]int{}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		r := store.Record{Value: []byte(values[key])}
		if strings.HasPrefix(key, store.BlockPrefix) {
			n, err := store.DecodeBlock(key, r)
			if err != nil {
				out = append(out, key+" unreadable")
				continue
			}
			for _, o := range blocks {
				if o.Overlaps(n) {
					c.Fatalf("%+v and %+v overlap", o, n)
				}
			}
			blocks[key] = n
			text := fmt.Sprintf("%s %d-%d %s", n.IP, n.First, n.Last(), n.Node)
			if n.Retired {
				text += "-"
			}
			if !n.Freed.IsZero() {
				text += "x"
			}
			out = append(out, text)
		}
		if strings.HasPrefix(key, "members/") {
			m, err := store.Decode[egress.Members](r)
			if err != nil {
				return out, err
			}
			for _, n := range m.Blocks {
				copies[fmt.Sprintf("%+v", n)]++
			}
		}
	}
	live := map[string]int{}
	for _, n := range blocks {
		if n.Freed.IsZero() {
			live[fmt.Sprintf("%+v", n)] = 2
		}
	}
	if !maps.Equal(live, copies) {
		return out, fmt.Errorf("live blocks are %v, and Members list %v", slices.Sorted(maps.Keys(live)), copies)
	}
	return out, nil
}

// wantPorts waits until the blocks are these; see ports.
func (c *cluster) wantPorts(want ...string) {
	c.Helper()
	c.eventually(func() error {
		got, err := c.ports()
		if d := cmp.Diff(want, got); err == nil && d != "" && len(want)+len(got) > 0 {
			err = fmt.Errorf("blocks (-want +got):\n%s", d)
		}
		return err
	})
}

// somePorts starts crdsync, two nodes, and an egress whose IP is 10.10.0.1.
func (c *cluster) somePorts(size int, rest time.Duration) (stop func()) {
	c.Helper()
	c.blockSize, c.blockRest = size, rest
	c.node("node-1", "192.0.2.1")
	c.node("node-2", "192.0.2.2")
	c.pool("p", "10.10.0.1-10.10.0.1", "10.10.0.5-10.10.0.9")
	c.egress("a", "externalIPPool: p")
	stop = c.run(c.kube)
	c.wantEgresses("a", "10.10.0.1/1")
	return stop
}

func testPortsGiven(c *cluster) {
	c.somePorts(1024, time.Hour)
	w := watchWrites(c.Context(), c.etcd.Client())
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	if err := w.until(c.Context(), store.MembersByNodeKey("node-1", "a"), "prod/x"); err != nil {
		c.Fatal(err)
	}
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	_, revisions := c.records()
	block := revisions["blocks/10.10.0.1/02048"]
	for _, key := range []string{"members/by-node/node-1/a", "members/by-egress/a/node-1"} {
		if revisions[key] != block {
			c.Errorf("%s is of revision %d, the block of %d", key, revisions[key], block)
		}
	}
	c.pod("prod", "y", "node-1", "10.244.1.2", "a") // it needs no more
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.pod("prod", "none", "node-2", "10.244.2.2", "none")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2")
	if _, revisions = c.records(); revisions["blocks/10.10.0.1/02048"] != block {
		c.Error("the block was written for a second pod")
	}
}

func testPortsFreed(c *cluster) {
	const rest = 10 * time.Second // other things are seen while it rests
	c.somePorts(1024, rest)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2")
	began := time.Now()
	c.deletePod("prod", "x", 0)
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2")
	values, _ := c.records()
	n, err := store.DecodeBlock("blocks/10.10.0.1/02048", store.Record{Value: []byte(values["blocks/10.10.0.1/02048"])})
	if err != nil || n.Freed.Before(began.Add(-time.Second)) || n.Since.After(n.Freed) {
		c.Errorf("freed at %v, %v; it was deleted at %v", n.Freed, err, began)
	}
	// While it rests another node gets other ports.
	c.node("node-3", "192.0.2.3")
	c.pod("prod", "w", "node-3", "10.244.3.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2", "10.10.0.1 4096-5119 node-3")
	c.wantPorts("10.10.0.1 3072-4095 node-2", "10.10.0.1 4096-5119 node-3")
	if d := time.Since(began); d < rest {
		c.Errorf("it has rested for %v, want %v", d, rest)
	}
	n.Size, n.Node = 1024, "node-1"
	c.wantHistory("10.10.0.1", n.Tenure())
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2", "10.10.0.1 4096-5119 node-3")
}

func testPortsBack(c *cluster) {
	c.somePorts(1024, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2")
	c.deletePod("prod", "x", 0)
	c.deletePod("prod", "z", 0)
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2x")
	values, _ := c.records()
	was, err := store.DecodeBlock("blocks/10.10.0.1/03072", store.Record{Value: []byte(values["blocks/10.10.0.1/03072"])})
	if err != nil || was.Egress == "" {
		c.Errorf("%+v, %v: want the egress that it was given for", was, err)
	}
	c.wantHistory("10.10.0.1") // the records of those that rest say it
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2")
	c.wantHistory("10.10.0.1", was.Tenure())
}

// testPortsOfOlderRoles has an etcd that was not asked again by `egret etcd-rbac` after an upgrade: nodes get their
// ports back all the same, and others get what has rested.
func testPortsOfOlderRoles(c *cluster) {
	c.underItsRole()
	prefix := store.DefaultPrefix + store.BlockHistoryPrefix
	if _, err := c.direct().RoleRevokePermission(c.Context(), "egret-crdsync", prefix, clientv3.GetPrefixRangeEnd(prefix)); err != nil {
		c.Fatal(err)
	}
	c.somePorts(1024, 10*time.Second)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2")
	c.deletePod("prod", "x", 0)
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2")
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "10.10.0.1 3072-4095 node-2")
	c.deletePod("prod", "x", 0)
	c.wantPorts("10.10.0.1 3072-4095 node-2")
	c.wantHistory("10.10.0.1")
}

// wantHistory fails where etcd remembers others of who had ports of an IP.
func (c *cluster) wantHistory(ip string, want ...egress.BlockTenure) {
	c.Helper()
	got, faults, err := c.store.BlockHistory(c.Context(), netip.MustParseAddr(ip))
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" || err != nil || len(faults) > 0 {
		c.Errorf("history: %v, %v (-want +got):\n%s", faults, err, d)
	}
}

func testPortsOfAnotherEgress(c *cluster) {
	c.somePorts(1024, 10*time.Second)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "b")
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	// The egress gets another IP: its node has ports of that one at once, and those of the former rest.
	c.patch("Egress", "a", `{"spec": {"egressIP": "10.10.0.5"}}`)
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.5 2048-3071 node-1")
	c.egress("b", "externalIPPool: p, egressIP: 10.10.0.1")
	c.wantPorts("10.10.0.1 2048-3071 node-1x", "10.10.0.1 3072-4095 node-2", "10.10.0.5 2048-3071 node-1")
	c.wantPorts("10.10.0.1 3072-4095 node-2", "10.10.0.5 2048-3071 node-1")
	// An egress that is deleted loses both.
	c.remove("Egress", "a")
	c.wantPorts("10.10.0.1 3072-4095 node-2", "10.10.0.5 2048-3071 node-1x")
	c.wantPorts("10.10.0.1 3072-4095 node-2")
}

func testPortsOfGoneNode(c *cluster) {
	c.somePorts(1024, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	if err := c.core.CoreV1().Nodes().Delete(c.Context(), "node-1", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.wantPorts("10.10.0.1 2048-3071 node-1x")
	c.wantMembers("a", "prod/x=10.244.1.1") // its pods are those of the egress still
	c.node("node-1", "192.0.2.1")
	c.wantPorts("10.10.0.1 2048-3071 node-1")
}

// agent writes what an agent says of its ports of 10.10.0.1.
func (c *cluster) agent(node string, want int, drained ...uint16) {
	c.Helper()
	c.put(store.AgentKey(node), egress.Agent{Node: node, Ports: map[netip.Addr]egress.PortUse{ip("10.10.0.1"): {Want: want, Drained: drained}}})
}

func testPortsAsked(c *cluster) {
	c.somePorts(64, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	other := "10.10.0.1 2112-2175 node-2"
	c.wantPorts("10.10.0.1 2048-2111 node-1", other)
	c.agent("node-1", 256)
	c.wantPorts("10.10.0.1 2048-2111 node-1-", other, "10.10.0.1 2304-2559 node-1")
	c.agent("node-1", 500)
	c.wantPorts("10.10.0.1 2048-2111 node-1-", other, "10.10.0.1 2304-2559 node-1-", "10.10.0.1 2560-3071 node-1")
	c.agent("node-1", 2048) // a fourth one has to wait
	c.agent("node-2", 128)
	c.wantPorts("10.10.0.1 2048-2111 node-1-", other+"-", "10.10.0.1 2176-2303 node-2", "10.10.0.1 2304-2559 node-1-", "10.10.0.1 2560-3071 node-1")
	c.agent("node-1", 2048, 2304)
	c.wantPorts("10.10.0.1 2048-2111 node-1-", other+"-", "10.10.0.1 2176-2303 node-2", "10.10.0.1 2304-2559 node-1-x", "10.10.0.1 2560-3071 node-1-", "10.10.0.1 4096-6143 node-1")
	// What has drained goes, whatever the agent says of the one that it uses.
	c.agent("node-1", 0, 2048, 2560, 4096)
	c.wantPorts("10.10.0.1 2048-2111 node-1-x", other+"-", "10.10.0.1 2176-2303 node-2", "10.10.0.1 2304-2559 node-1-x", "10.10.0.1 2560-3071 node-1-x", "10.10.0.1 4096-6143 node-1")
	c.agent("node-1", 64) // it gets back what is its own
	c.wantPorts("10.10.0.1 2048-2111 node-1", other+"-", "10.10.0.1 2176-2303 node-2", "10.10.0.1 2304-2559 node-1-x", "10.10.0.1 2560-3071 node-1-x", "10.10.0.1 4096-6143 node-1-")
	c.wantCondition("a", "Degraded")
}

// testPortsGivenBack has a node that wants less and less: it gets no less than others do at first.
func testPortsGivenBack(c *cluster) {
	c.somePorts(256, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantPorts("10.10.0.1 2048-2303 node-1")
	c.agent("node-1", 1024)
	c.wantPorts("10.10.0.1 2048-2303 node-1-", "10.10.0.1 3072-4095 node-1")
	c.agent("node-1", 0, 2048)
	c.wantPorts("10.10.0.1 2048-2303 node-1-x", "10.10.0.1 3072-4095 node-1")
	c.agent("node-1", 64)
	c.wantPorts("10.10.0.1 2048-2303 node-1", "10.10.0.1 3072-4095 node-1-")
	c.agent("node-1", 64, 3072)
	c.wantPorts("10.10.0.1 2048-2303 node-1", "10.10.0.1 3072-4095 node-1-x")
}

func testPortsExhausted(c *cluster) {
	c.blockSize, c.blockRest = 32768, time.Second
	for i := range 6 {
		c.node(fmt.Sprintf("node-%d", i), fmt.Sprintf("192.0.2.%d", i+1))
	}
	c.pool("p", "10.10.0.1-10.10.0.2")
	c.egress("a", "externalIPPool: p")
	c.run(c.kube)
	c.wantEgresses("a", "10.10.0.1/1")
	// what is left is halved, and halved again
	want := []string{"32768-65535", "16384-32767", "8192-16383", "4096-8191", "2048-4095"}
	var is []string
	for i := range 5 {
		c.pod("prod", fmt.Sprintf("x-%d", i), fmt.Sprintf("node-%d", i), fmt.Sprintf("10.244.%d.1", i), "a")
		is = append(is, fmt.Sprintf("10.10.0.1 %s node-%d", want[i], i))
		slices.SortFunc(is, func(a, b string) int { return firstPort(a) - firstPort(b) })
		c.wantPorts(is...)
	}
	c.wantCondition("a", "Degraded")
	c.pod("prod", "x-5", "node-5", "10.244.5.1", "a")
	c.wantCondition("a", "Degraded PortsExhausted: node node-5 has no ports of 10.10.0.1, since none are left: the gateway translates for it, and its connections end with the gateway")
	c.agent("node-4", 4096)
	c.wantCondition("a", "Degraded PortsExhausted: node node-4 has 2048 ports of 10.10.0.1 and asks for a block of 4096, for which there is no room; "+
		"node node-5 has no ports of 10.10.0.1, since none are left: the gateway translates for it, and its connections end with the gateway")
	pool, err := c.dyn.Resource(v1beta1.PoolResource).Get(c.Context(), "p", metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.eventually(func() error {
		events := c.eventsAbout(string(pool.GetUID()), "ExternalIPPool", "p")
		if len(events) != 1 || !strings.HasPrefix(events[0], "Warning PortsExhausted") || !strings.Contains(events[0], "10.10.0.1") {
			return fmt.Errorf("Events of the pool: %q", events)
		}
		return nil
	})
	c.wantPorts(is...)
	c.deletePod("prod", "x-0", 0) // what it leaves goes to those who wait
	c.eventually(func() error {
		got, err := c.ports()
		has := map[string]int{}
		for _, text := range got {
			has[strings.TrimRight(strings.Fields(text)[2], "-")]++
		}
		if err == nil && !maps.Equal(has, map[string]int{"node-1": 1, "node-2": 1, "node-3": 1, "node-4": 1, "node-5": 1}) && !maps.Equal(has, map[string]int{"node-1": 1, "node-2": 1, "node-3": 1, "node-4": 2, "node-5": 1}) {
			err = fmt.Errorf("blocks %q", got)
		}
		return err
	})
}

// firstPort returns the first port of what ports returns.
func firstPort(text string) (first int) {
	_, _ = fmt.Sscanf(strings.Fields(text)[1], "%d-", &first) // the test compares the text
	return first
}

func testPortsStatic(c *cluster) {
	c.somePorts(64, time.Hour)
	c.egress("s", "egressIP: 192.0.2.1")
	c.pod("prod", "s", "node-1", "10.244.1.9", "s")
	c.pod("prod", "x", "node-2", "10.244.2.1", "a")
	c.wantMembers("s", "prod/s=10.244.1.9")
	c.wantPorts("10.10.0.1 2048-2111 node-2")
}

func testPortsTurnedOff(c *cluster) {
	stop := c.somePorts(0, 0)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantMembers("a", "prod/x=10.244.1.1")
	c.wantPorts()
	for _, step := range []struct {
		size int
		rest time.Duration
		want []string
	}{
		{128, time.Hour, []string{"10.10.0.1 2048-2175 node-1", "10.10.0.1 2176-2303 node-2"}},
		// what they have they keep
		{4096, time.Hour, []string{"10.10.0.1 2048-2175 node-1", "10.10.0.1 2176-2303 node-2"}},
		{0, time.Hour, []string{"10.10.0.1 2048-2175 node-1x", "10.10.0.1 2176-2303 node-2x"}},
		{128, time.Hour, []string{"10.10.0.1 2048-2175 node-1", "10.10.0.1 2176-2303 node-2"}},
		{0, time.Second, nil},
	} {
		stop()
		c.blockSize, c.blockRest = step.size, step.rest
		stop = c.run(c.kube)
		c.wantPorts(step.want...)
	}
	c.wantMembers("a", "prod/x=10.244.1.1")
}

func testPortsRestart(c *cluster) {
	stop := c.somePorts(1024, time.Hour)
	for i := range 3 {
		c.pod("prod", fmt.Sprintf("x-%d", i), fmt.Sprintf("node-%d", i%2+1), fmt.Sprintf("10.244.1.%d", i+1), "a")
	}
	c.agent("node-1", 2048)
	c.wantPorts("10.10.0.1 2048-3071 node-1-", "10.10.0.1 3072-4095 node-2", "10.10.0.1 4096-6143 node-1")
	c.wantMembers("a", "prod/x-0=10.244.1.1 prod/x-2=10.244.1.3") // with all three pods
	stop()
	_, before := c.records()
	c.node("node-3", "192.0.2.3") // by which shows that the next one has done its work
	c.run(c.kube)
	c.wantRecords("nodes/node-3", map[string]string{"nodes/node-3": "3 192.0.2.3"})
	c.pod("prod", "y", "node-3", "10.244.3.1", "none")
	c.wantRecords("members/by-node/node-3/*", map[string]string{"members/by-node/node-3/-": "prod/y=10.244.3.1"})
	_, after := c.records()
	for key, revision := range before {
		if (strings.HasPrefix(key, "blocks/") || strings.HasPrefix(key, "members/")) && after[key] != revision {
			c.Errorf("%s was written at %d, now %d", key, revision, after[key])
		}
	}
	// A former version, which knows nothing of blocks, writes the Members without them. This one then finds them as
	// they were.
	for _, key := range []string{"members/by-node/node-1/a", "members/by-egress/a/node-1"} {
		c.put(key, egress.Members{Egress: "a", Node: "node-1", Pods: []egress.Member{{Pod: "prod/x-0", IPs: []netip.Addr{ip("10.244.1.1")}}}})
	}
	c.wantPorts("10.10.0.1 2048-3071 node-1-", "10.10.0.1 3072-4095 node-2", "10.10.0.1 4096-6143 node-1")
}

// testPortsOfLeaders has pods come and go on several nodes while one leader after another is deposed, of three.
func testPortsOfLeaders(c *cluster) {
	c.somePorts(64, 300*time.Millisecond)
	c.run(c.kube)
	c.run(c.kube)
	for i := range 8 {
		c.node(fmt.Sprintf("many-%d", i), fmt.Sprintf("192.0.2.%d", i+50))
	}
	var changes atomic.Int64
	looked := make(chan bool)
	go func() { // every state that etcd has, by its revisions
		ctx, cancel := context.WithTimeout(c.Context(), 3*deadline)
		defer cancel()
		blocks := map[string]egress.Block{}
		for resp := range c.etcd.Client().Watch(ctx, store.DefaultPrefix+store.BlockPrefix, clientv3.WithPrefix()) {
			for _, e := range resp.Events {
				key := strings.TrimPrefix(string(e.Kv.Key), store.DefaultPrefix)
				if key == "blocks/end" {
					looked <- true
					return
				}
				changes.Add(1)
				delete(blocks, key)
				if e.Kv.Value == nil {
					continue
				}
				is, err := store.DecodeBlock(key, store.Record{Value: e.Kv.Value})
				for _, o := range blocks {
					if o.Overlaps(is) || err != nil {
						c.Errorf("revision %d: %+v and %+v overlap, or %v", e.Kv.ModRevision, o, is, err)
					}
				}
				blocks[key] = is
			}
		}
		looked <- false
	}()
	for round := 0; round < 12 || changes.Load() < 50 && round < 60; round++ { // while nobody leads, what comes and goes leaves nothing
		if round%3 == 1 {
			c.deposeLeader()
		}
		for i := range 8 {
			node, name := fmt.Sprintf("many-%d", i), fmt.Sprintf("x-%d", i)
			switch {
			case round%2 == 0:
				c.pod("prod", name, node, fmt.Sprintf("10.244.%d.1", i+10), "a")
			default:
				c.agent(node, 64<<((round+i)%5))
				c.deletePod("prod", name, 0)
			}
		}
	}
	c.pod("prod", "last", "many-0", "10.244.10.2", "a")
	c.eventually(func() error {
		got, err := c.ports()
		if live := slices.DeleteFunc(got, func(s string) bool { return strings.HasSuffix(s, "x") }); err == nil && (len(live) == 0 || !strings.Contains(live[0], "many-0")) {
			err = fmt.Errorf("blocks %q", got)
		}
		return err
	})
	c.put("blocks/end", "end")
	if all, n := <-looked, changes.Load(); !all || n < 50 {
		c.Errorf("%d changes of blocks were seen, all of them: %t", n, all)
	}
}

func testPortsRestored(c *cluster) {
	stop := c.somePorts(64, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-2111 node-1", "10.10.0.1 2112-2175 node-2")
	old, _ := c.records()
	c.agent("node-2", 128)
	c.deletePod("prod", "x", 0)
	c.wantPorts("10.10.0.1 2048-2111 node-1x", "10.10.0.1 2112-2175 node-2-", "10.10.0.1 2176-2303 node-2")
	stop()
	c.restore(old)
	c.node("node-3", "192.0.2.3")
	c.pod("prod", "w", "node-3", "10.244.3.1", "a")
	c.run(c.kube)
	c.wantPorts("10.10.0.1 2048-2111 node-1x", "10.10.0.1 2112-2175 node-2", "10.10.0.1 2176-2239 node-3")
	// Members that are older than the records, and records that are older than the Members.
	c.restore(maps.Collect(func(yield func(string, string) bool) {
		now, _ := c.records()
		for key, value := range now {
			if strings.HasPrefix(key, store.BlockPrefix) {
				value = old[key]
			}
			if value != "" && !yield(key, value) {
				return
			}
		}
	}))
	c.wantPorts("10.10.0.1 2048-2111 node-1x", "10.10.0.1 2112-2175 node-2", "10.10.0.1 2176-2239 node-3")
}

func testPortsTransactions(c *cluster) {
	c.blockSize, c.blockRest = 256, time.Hour
	testTransactions(c)
	blocks, err := c.ports()
	if err != nil || len(blocks) < 50 {
		c.Errorf("%d blocks, %v; want those of 50 egresses", len(blocks), err)
	}
}

func testPortsSpoiled(c *cluster) {
	c.somePorts(1024, time.Hour)
	c.pod("prod", "x", "node-1", "10.244.1.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	c.put("blocks/10.10.0.1/02048", "nonsense")
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"blocks/10.10.0.1/02048"); err != nil {
		c.Fatal(err)
	}
	c.wantPorts("10.10.0.1 2048-3071 node-1")
	// One that nobody knows is left alone, and nobody gets what it may have.
	c.put("blocks/10.10.0.1/03072", "nonsense")
	c.pod("prod", "z", "node-2", "10.244.2.1", "a")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "blocks/10.10.0.1/03072 unreadable", "10.10.0.1 4096-5119 node-2")
	// Members that cannot be read are written anew with the ports that the node has.
	c.put("members/by-node/node-1/a", "nonsense")
	c.put("members/by-egress/a/node-1", "nonsense")
	c.wantPorts("10.10.0.1 2048-3071 node-1", "blocks/10.10.0.1/03072 unreadable", "10.10.0.1 4096-5119 node-2")
	// A record that says something else is what counts, for both nodes.
	c.put("blocks/10.10.0.1/02048", egress.Block{IP: ip("10.10.0.1"), First: 2048, Size: 1024, Node: "node-2"})
	c.wantPorts("10.10.0.1 2048-3071 node-2", "blocks/10.10.0.1/03072 unreadable", "10.10.0.1 4096-5119 node-2-", "10.10.0.1 5120-6143 node-1")
}

// TestALeaderWhoseCacheIsBehindGivesNoPortsThatAreTaken has two leaders after each other at a real etcd. The cache of
// the second one stopped before the first wrote.
func TestALeaderWhoseCacheIsBehindGivesNoPortsThatAreTaken(t *testing.T) {
	etcd := etcdtest.New(t)
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcd.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	follow := func() (cache *store.Cache, stop func()) {
		cache = client.NewCache(store.BlockPrefix, store.MembersByNode, store.MembersByEgress)
		cache.Track()
		running, end := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- cache.Run(running) }()
		<-cache.Ready()
		return cache, func() { end(); <-done }
	}
	behind, stop := follow()
	stop()
	give := func(lead *store.Leadership, cache *store.Cache, size int, nodes ...string) error {
		b := &blocks{size: size, rest: blockRest}
		b.begin(cache.Revision())
		b.read(cache, listedMembers(cache))
		for _, node := range nodes {
			groups, policy := oneEgress(node, "a", "10.0.0.1")
			changes, err := b.divide(node, groups, policy, true, time.Unix(1000, 0).UTC())
			if err != nil {
				return err
			}
			units, err := memberDifference(view{cache, cache.Revision()}, node, groups, nil, changes)
			if err != nil {
				return err
			}
			ops := b.guarded(slices.Concat(units...))
			revision, err := lead.CommitAt(ctx, ops...)
			if err != nil {
				return err
			}
			b.committed(ops, revision)
		}
		return nil
	}
	first, err := client.Campaign(ctx, store.CrdsyncElection, "first", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	cache, stop := follow()
	// one transaction after another, while the cache lags
	if err := give(first, cache, 64, "n1", "n2", "n3"); err != nil {
		t.Fatal(err)
	}
	stop()
	// so that the keys of the next are none of those that are there
	if _, err := etcd.Client().Delete(ctx, store.DefaultPrefix+store.BlockKey(ip("10.0.0.1"), 2048)); err != nil {
		t.Fatal(err)
	}
	if err := first.Resign(ctx); err != nil {
		t.Fatal(err)
	}
	second, err := client.Campaign(ctx, store.CrdsyncElection, "second", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := give(second, behind, 2048, "n4"); err == nil || !strings.Contains(err.Error(), "blocks/10.0.0.1/: "+store.ErrConflict.Error()) {
		t.Errorf("with a cache that is behind: %v, want a conflict of the IP's blocks", err)
	}
	cache, stop = follow()
	defer stop()
	if err := give(first, cache, 64, "n5"); err == nil || !strings.Contains(err.Error(), store.ErrNotLeader.Error()) {
		t.Errorf("the former leader, late: %v, want that it is not the leader", err)
	}
	if err := give(second, cache, 2048, "n4"); err != nil {
		t.Error(err)
	}
	blocks, faults, err := client.Blocks(ctx, netip.Addr{})
	if err != nil || len(faults) > 0 {
		t.Fatal(faults, err)
	}
	var got []string
	for _, n := range blocks {
		got = append(got, fmt.Sprintf("%d-%d %s", n.First, n.Last(), n.Node))
	}
	if d := cmp.Diff([]string{"2112-2175 n2", "2176-2239 n3", "4096-6143 n4"}, got); d != "" {
		t.Errorf("blocks (-want +got):\n%s", d)
	}
	if err := second.Resign(ctx); err != nil {
		t.Error(err)
	}
}

func TestABlockSizeIsAPowerOfTwoWithinBounds(t *testing.T) {
	for n, ok := range map[int]bool{0: true, 64: true, 1024: true, 32768: true, 1: false, 32: false, 63: false, 65: false, 1000: false, 65536: false, -64: false} {
		if err := (Config{BlockSize: n}).Validate(); (err == nil) != ok {
			t.Errorf("%d: %v", n, err)
		}
	}
}
