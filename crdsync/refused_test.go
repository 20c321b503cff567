package crdsync

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// testTooLarge: an etcd takes no request of more than 64 KiB, and a node and a pool are larger than that.
func testTooLarge(c *cluster) {
	c.etcd.Stop()
	c.etcd.MaxRequestBytes = 64 << 10
	c.etcd.Start()
	c.example()
	large := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "large", Labels: map[string]string{}}}
	for i := range 1000 {
		large.Labels[fmt.Sprintf("label-%d", i)] = strings.Repeat("x", 60)
	}
	if _, err := c.core.CoreV1().Nodes().Create(c.Context(), large, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	c.node("node-1", "192.0.2.1")
	var ranges []string
	for i := range 1000 {
		a := fmt.Sprintf("fd00:1111:2222:3333:4444:5555:6666:%x", 0x1000+i)
		ranges = append(ranges, a+"-"+a)
	}
	c.pool("large", ranges...)
	c.pod("prod", "a", "node-1", "10.244.0.2", "web")
	c.run(c.kube)
	c.wantMembers("egress-prod-web", "prod/a=10.244.0.2")
	nodes := func() (names []string) {
		all, _ := c.records()
		for key := range all {
			if name, ok := strings.CutPrefix(key, store.NodePrefix); ok {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	if got := nodes(); !slices.Equal(got, []string{"node-1"}) {
		c.Errorf("nodes %v, want node-1 alone: etcd was to refuse the other", got)
	}
	c.egress("other", "externalIPPool: external-ip-pool") // what comes after that is not held up either
	c.wantAllocated("other", metav1.ConditionTrue, "10.10.0.13 is of pool external-ip-pool")
	c.pod("prod", "b", "node-1", "10.244.0.3", "web")
	c.wantMembers("egress-prod-web", "prod/a=10.244.0.2 prod/b=10.244.0.3")
	u, err := c.dyn.Resource(v1beta1.PoolResource).Get(c.Context(), "large", metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.eventually(func() error {
		events := c.eventsAbout(string(u.GetUID()), "ExternalIPPool", "large")
		if len(events) != 1 || !strings.Contains(events[0], "pools/large cannot be written") || !strings.Contains(events[0], "too large") {
			return fmt.Errorf("Events of the pool: %q", events)
		}
		return nil
	})
	c.etcd.Stop()
	c.etcd.MaxRequestBytes = 0
	c.etcd.Start()
	c.eventually(func() error { // it was tried again a second ago, and two, and four
		if got := nodes(); !slices.Equal(got, []string{"large", "node-1"}) {
			return fmt.Errorf("nodes %v", got)
		}
		return nil
	})
}

func TestWhatHasToComeAfterARefusedChangeWaits(t *testing.T) {
	a := egress.Address{IP: netip.MustParseAddr("10.0.0.1"), ID: 1}
	b := egress.Address{IP: netip.MustParseAddr("10.0.0.2"), ID: 2}
	allocation := func(a egress.Address, name string) egress.Allocation {
		return egress.Allocation{IP: a.IP, ID: a.ID, Egresses: []string{name}}
	}
	w := &writer{
		c: control{values: map[string]any{
			"allocations/10.0.0.1": allocation(a, "one"), "egresses/one": egress.Policy{Addresses: []egress.Address{a}},
			"egresses/two": egress.Policy{}, "egresses/three": egress.Policy{},
		}},
		have:    records{policies: map[string]egress.Policy{"two": {Addresses: []egress.Address{b}}}},
		blocked: map[string]bool{},
	}
	of := func(key string) unit { return unit{{Key: key}} }
	w.block(of("allocations/10.0.0.1"))
	w.block(of("egresses/two"))
	for key, waits := range map[string]bool{
		"egresses/one": true, "allocations/10.0.0.2": true, "egresses/three": false, "members/by-node/n/one": false, "pools/p": false,
	} {
		if w.waits(of(key)) != waits {
			t.Errorf("%s waits: %t, want %t", key, !waits, waits)
		}
	}
}

func TestARefusedUnitIsDividedByEgressesAndNotWithinOne(t *testing.T) {
	of := func(keys ...string) (u unit) {
		for _, key := range keys {
			u = append(u, store.Op{Key: key})
		}
		return u
	}
	members := of("members/by-node/n/-", "members/by-node/n/a", "members/by-egress/a/n", "members/by-node/n/b", "members/by-egress/b/n")
	if got := members.pairs(); len(got) != 3 || len(got[0]) != 1 || len(got[1]) != 2 || len(got[2]) != 2 {
		t.Errorf("members of a node: %v", got)
	}
	members = of("members/by-node/n/a", "members/by-egress/a/n", "blocks/10.0.0.1/02048", "blocks/10.0.0.1/", "members/by-node/n/b", "members/by-egress/b/n", "blocks/10.0.0.2/02048")
	if got := members.pairs(); len(got) != 2 || len(got[0]) != 4 || len(got[1]) != 3 {
		t.Errorf("members of a node and its ports: %v", got)
	}
	if got := of("blocks/10.0.0.1/02048", "blocks/10.0.0.1/").pairs(); len(got) != 1 {
		t.Errorf("ports alone: %v", got)
	}
	if got := of("allocations/10.0.0.1", "pins/10.0.0.1", "history/10.0.0.1/").pairs(); len(got) != 1 {
		t.Errorf("an allocation and what it takes along: %v", got)
	}
}
