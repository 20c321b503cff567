package integration

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// With a CNI that keeps its own book of addresses, as Calico's and AWS's do, nodes have no podCIDRs: two of the three
// here.
func TestPodsAreNoOutsideWhereNodesHaveNoPodCIDRs(t *testing.T) {
	ctx := t.Context()
	l, err := lab.Up(ctx, lab.Config{Name: lab.OwnName("e2e-cidrs"), Nodes: 3, WithoutPodCIDRs: 2, LeaseTTL: leaseTTL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	shared := cluster
	cluster = l
	defer func() { cluster = shared }()
	n := &namespace{t: t, name: "cidrs"}
	n.dual("both", "10.10.0.30", "fd10::30")
	ips := bothIPs(t, "both")
	pods := map[string]lab.Pod{}
	pod := func(name, node, app string) lab.Pod {
		t.Helper()
		p, err := l.Pod(ctx, lab.PodConfig{Name: n.name + "/" + name, Node: node, Labels: map[string]string{"app": app}})
		if err != nil {
			t.Fatal(err)
		}
		serve(t, "pod", p.Name)
		return p
	}
	for _, node := range nodes() {
		pods["web "+node] = pod("web-"+node, node, "web")
		pods["db "+node] = pod("db-"+node, node, "db")
	}
	for _, node := range nodes() {
		for _, ip := range ips {
			leavesAs(t, pods["web "+node].Name, ip)
		}
	}
	keep := func(from, to lab.Pod) {
		t.Helper()
		for i, ip := range to.IPs {
			if got, err := ask("pod", from.Name, ip, servePort); err != nil || got != from.IPs[i] {
				t.Errorf("%s is seen by %s as %v (%v), want its own %s", from.Name, to.Name, got, err, from.IPs[i])
			}
		}
	}
	for _, node := range nodes() {
		for _, to := range pods {
			keep(pods["web "+node], to)
		}
	}
	if t.Failed() {
		return
	}
	t.Run("a new pod is reached at once", func(t *testing.T) {
		for i := range 5 {
			name := fmt.Sprint("new-", i)
			made := pod(name, "node-2", "db")
			began, wrong := time.Now(), 0
			eventually(t, 4*time.Second, func() error {
				got, err := ask("pod", pods["web node-3"].Name, made.IPs[0], servePort)
				// it was on its way by the gateway when the address became an exception: TCP tries again after a second
				if err != nil {
					wrong++
					return fmt.Errorf("%s is not reached: %w", name, err)
				}
				if got != pods["web node-3"].IPs[0] {
					wrong++
					return fmt.Errorf("%s sees %s", name, got)
				}
				return nil
			})
			t.Logf("%s sees the pod's own address after %v and %d of the egress", name, time.Since(began), wrong)
			if err := l.RemovePod(ctx, made.Name); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("an address that left is outside again", func(t *testing.T) {
		gone := pods["db node-2"]
		excepted := func() bool {
			_, err := l.Exec(ctx, "node", "node-3", "nft", "get", "element", "inet", "egret", "except4", "{", gone.IPs[0].String(), "}")
			return err == nil
		}
		if !excepted() {
			t.Error("the address of a pod is no exception: the test proves nothing")
		}
		if err := l.RemovePod(ctx, gone.Name); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			if excepted() {
				return fmt.Errorf("%s is excepted still", gone.IPs[0])
			}
			return nil
		})
	})
	t.Run("without a word of the pods no further one gets its egress IP, and it is said", func(t *testing.T) {
		pods["ends"] = pod("ends", "node-3", "web")
		for _, ip := range ips {
			leavesAs(t, pods["ends"].Name, ip)
		}
		refused(t, l, pods, ips)
	})
}

// refused takes away what is known of the pods, as if crdsync were an older one.
func refused(t *testing.T, l *lab.Lab, pods map[string]lab.Pod, ips []netip.Addr) {
	ctx := t.Context()
	if err := l.Stop(ctx, "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	c := etcdClient(t)
	if _, err := c.Delete(ctx, store.DefaultPrefix+store.PodKey("node-2")); err != nil {
		t.Fatal(err)
	}
	said := func() string {
		r, err := c.Get(ctx, store.DefaultPrefix+store.AgentKey("node-3"))
		if err != nil || len(r.Kvs) != 1 {
			t.Fatalf("reading what the agent says: %v, %v", r, err)
		}
		a, err := store.Decode[egress.Agent](store.Record{Value: r.Kvs[0].Value})
		if err != nil {
			t.Fatal(err)
		}
		return a.Faults["pods"]
	}
	check := func(want string) {
		t.Helper()
		out, err := l.Exec(ctx, "node", "node-3", l.EgretPath(), "check", "--endpoints", l.AgentEndpoints())
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("egret check: %v; it does not say %q:\n%s", err, want, out)
		}
	}
	check("no record of crdsync")
	eventually(t, 5*time.Second, func() error {
		if got := said(); !strings.Contains(got, "node-2") || !strings.Contains(got, "--cluster-cidrs") {
			return fmt.Errorf("the agent says %q", got)
		}
		return nil
	})
	for _, ip := range ips {
		leavesAs(t, pods["web node-3"].Name, ip) // it is in the kernel, and stays
	}
	// An older crdsync says which pods are selected. Whoever has the address of one that is not any more has no egress IP
	// by it.
	members := func(change func(*egress.Members)) {
		t.Helper()
		key := store.DefaultPrefix + store.MembersByNodeKey("node-3", "both")
		r, err := c.Get(ctx, key)
		if err != nil || len(r.Kvs) != 1 {
			t.Fatalf("reading %s: %v, %v", key, r, err)
		}
		m, err := store.Decode[egress.Members](store.Record{Value: r.Kvs[0].Value})
		if err != nil {
			t.Fatal(err)
		}
		change(&m)
		v, err := store.Encode(m)
		if err == nil {
			_, err = c.Put(ctx, key, string(v))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var was egress.Members
	members(func(m *egress.Members) {
		was = *m
		m.Pods = slices.DeleteFunc(slices.Clone(m.Pods), func(p egress.Member) bool { return p.Pod == pods["ends"].Name })
		if len(m.Pods) != 1 {
			t.Fatalf("%d of %d pods are left, want one of two", len(m.Pods), len(was.Pods))
		}
	})
	asNode := func() {
		t.Helper()
		for _, ip := range lab.NodeIPs(3) {
			leavesAs(t, pods["ends"].Name, ip)
		}
	}
	asNode()
	members(func(m *egress.Members) { m.Pods = was.Pods })
	asNode() // a pod that is selected now is a further one
	for _, ip := range ips {
		leavesAs(t, pods["web node-3"].Name, ip)
	}
	if err := l.Start(ctx, "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		if got := said(); got != "" {
			return fmt.Errorf("the agent says %q still", got)
		}
		return nil
	})
	check("2 of 3 nodes without spec.podCIDRs")
}
