package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/store"
)

// unregister deletes the Node object of a node, which lives on, and creates it anew when the test ends.
func unregister(t *testing.T, node string) {
	t.Helper()
	t.Cleanup(func() { register(t, node) })
	kubectl(t, "delete", "node", node)
}

// register creates the Node object of a node where there is none, and waits for its record.
func register(t *testing.T, node string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // the test may be over
	if _, err := cluster.Kubectl(ctx, "get", "node", node); err == nil {
		return
	}
	if err := cluster.RegisterNode(ctx, node); err != nil {
		t.Error(err)
	}
	etcd := etcdClient(t)
	eventually(t, 5*time.Second, func() error {
		if r, err := etcd.Get(ctx, "/egret/"+store.NodeKey(node)); err != nil || len(r.Kvs) == 0 {
			return fmt.Errorf("%s has no record in etcd: %v", node, err)
		}
		return nil
	})
}

// TestDeletingTheNodeObjectOfTheOwnerMovesItsIPs does what an autoscaler does before it powers a machine off: agent and
// machine live on.
func TestDeletingTheNodeObjectOfTheOwnerMovesItsIPs(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("node-gone", "10.10.0.81")
	stopAsking := askWhoHas(t, ip)
	result := probe(t, pod, 4*time.Second, func() { unregister(t, gateway) })
	if _, owner := lookUp(t, "node-gone"); owner == gateway || owner == "" {
		t.Errorf("the owner is %q after the Node object of %s went", owner, gateway)
	}
	only(t, result, ip)
	t.Logf("longest gap %v", result.LongestGap)
	if result.LongestGap > 2*time.Second {
		t.Errorf("%v without an answer, want 100ms, 2s on a busy machine", result.LongestGap)
	}
	etcd := etcdClient(t)
	eventually(t, 5*time.Second, func() error {
		r, err := etcd.Get(t.Context(), "/egret/"+store.AgentKey(gateway))
		if err != nil || len(r.Kvs) != 1 || !strings.Contains(string(r.Kvs[0].Value), "no record in etcd") {
			return fmt.Errorf("the agent's record does not say that its node is gone: %v, %v", r, err)
		}
		return nil
	})
	// Registered anew, it is a node as others.
	register(t, gateway)
	result = probe(t, pod, 3*time.Second, func() {
		eventually(t, 2*time.Second, func() error {
			_, err := cluster.Egret(t.Context(), "move", ip.String(), "--to", gateway)
			return err
		})
	})
	only(t, result, ip)
	if result.LongestGap > time.Second {
		t.Errorf("back to a node that was registered anew: %v without an answer", result.LongestGap)
	}
	stopAsking()
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
}

// TestPodsOfANodeWhoseNodeObjectIsGoneLeaveWithNoOtherSource has a pod on the gateway itself: nobody serves that node
// any more.
func TestPodsOfANodeWhoseNodeObjectIsGoneLeaveWithNoOtherSource(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, _ := n.remote("orphan", "10.10.0.82")
	pod := n.pod("orphan", gateway, "web")
	selected(t, pod, ip)
	unregister(t, gateway)
	eventually(t, 3*time.Second, func() error {
		if _, owner := lookUp(t, "orphan"); owner == gateway || owner == "" {
			return fmt.Errorf("the owner is %q", owner)
		}
		return nil
	})
	if got, err := cluster.Source(t.Context(), pod); err == nil && got != ip {
		t.Errorf("the outside host saw %s", got)
	}
	register(t, gateway)
	leavesAs(t, pod, ip)
	if err := watch.Strangers(); err != nil {
		t.Error(err)
	}
}

// TestANodeObjectThatIsDeletedAndCreatedAtOnce is what a kubelet that registers itself anew looks like, with and
// without crdsync there to see it.
func TestANodeObjectThatIsDeletedAndCreatedAtOnce(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("anew", "10.10.0.83")
	local := n.pod("local", gateway, "web")
	selected(t, local, ip)
	again := func() {
		unregister(t, gateway)
		register(t, gateway)
	}
	result := probe(t, pod, 4*time.Second, again)
	only(t, result, ip)
	t.Logf("longest gap %v", result.LongestGap)
	if result.LongestGap > 2*time.Second {
		t.Errorf("%v without an answer, want 100ms, 2s on a busy machine", result.LongestGap)
	}
	leavesAs(t, local, ip)
	if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.Start(context.Background(), "crdsync", "") }) // it runs, unless the test has failed
	unmoved(t, ip, pod, 4*time.Second, func() {
		again()
		if err := cluster.Start(t.Context(), "crdsync", ""); err != nil {
			t.Error(err)
		}
	})
	leavesAs(t, local, ip)
	if err := errors.Join(watch.Doubles(), watch.Strangers()); err != nil {
		t.Error(err)
	}
}

// TestTheOwnerIsFrozenWhenItsNodeObjectGoes: it cannot let go of its IPs, and its peers find out.
func TestTheOwnerIsFrozenWhenItsNodeObjectGoes(t *testing.T) {
	takeOver(t, "frozen-gone", "10.10.0.84", func(ctx context.Context, node string) error {
		if err := cluster.Freeze(ctx, node); err != nil {
			return err
		}
		unregister(t, node)
		return nil
	}, cluster.Thaw)
}

// TestAnAgentThatServesOnAlthoughItsNodeIsGoneLosesItsLease has a lock and a lease that is kept alive without an agent
// behind them, as one that knows nothing of this would.
func TestAnAgentThatServesOnAlthoughItsNodeIsGoneLosesItsLease(t *testing.T) {
	const ip = "10.10.0.85"
	etcd := etcdClient(t)
	lease, err := etcd.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"agents/node-9": fmt.Sprintf(`{"node":"node-9","address":"10.10.0.109","lease":"%016x","revocable":true}`, uint64(lease.ID)),
		"owners/" + ip:  `{"ip":"` + ip + `","node":"node-9","why":"claim"}`,
	} {
		if _, err := etcd.Put(t.Context(), "/egret/"+key, value, clientv3.WithLease(lease.ID)); err != nil {
			t.Fatal(err)
		}
	}
	n := newNamespace(t)
	began := time.Now()
	n.pool("ghost", ip, ip)
	n.egress("ghost", "ghost", "web")
	eventually(t, 8*time.Second, func() error {
		if _, owner := lookUp(t, "ghost"); owner == "node-9" || owner == "" {
			return fmt.Errorf("the owner is %q", owner)
		}
		return nil
	})
	t.Logf("claimed after %v", time.Since(began).Round(time.Millisecond))
}
