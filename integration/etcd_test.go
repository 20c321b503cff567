package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// leader returns the member of etcd that leads, and the others.
func leader(t *testing.T) (leads string, follow []string) {
	t.Helper()
	etcd := etcdClient(t)
	eventually(t, 20*time.Second, func() error {
		leads, follow = "", nil
		for i, name := range cluster.EtcdMembers() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			status, err := etcd.Status(ctx, cluster.EtcdEndpoints()[i])
			cancel()
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if status.Leader == status.Header.MemberId {
				leads = name
			} else {
				follow = append(follow, name)
			}
		}
		if leads == "" {
			return fmt.Errorf("no leader among %v", cluster.EtcdMembers())
		}
		return nil
	})
	return leads, follow
}

// ownerIn returns the owner of an IP, "" for none.
func ownerIn(ctx context.Context, etcd *clientv3.Client, ip netip.Addr) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := etcd.Get(ctx, "/egret/"+store.OwnerKey(ip))
	if err != nil || len(r.Kvs) == 0 {
		return "", err
	}
	var o egress.Owner
	err = json.Unmarshal(r.Kvs[0].Value, &o)
	return o.Node, err
}

// TestPartitionsOfTheLANAndOfEtcd divides the LAN between the nodes, with etcd's members on either side. The leader is
// always with the minority at first, which is the worst for the others.
func TestPartitionsOfTheLANAndOfEtcd(t *testing.T) {
	for _, tt := range []struct {
		name, address string
		peer          bool // is with the owner
		majority      bool // of etcd is with the owner
	}{
		{"owner with the minority", "10.10.0.65", false, false},
		{"owner and a peer with the minority", "10.10.0.66", true, false},
		{"owner with the majority", "10.10.0.67", false, true},
		{"owner and a peer with the majority", "10.10.0.68", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNamespace(t)
			ip, gateway, _ := n.remote("partition-"+tt.address[len("10.10.0."):], tt.address)
			time.Sleep(4 * time.Second) // an agent that has had etcd for less than 3 s promises as if it had none
			own := []string{gateway}
			if tt.peer {
				own = append(own, otherNode(gateway))
			}
			others := slices.DeleteFunc(nodes(), func(node string) bool { return slices.Contains(own, node) })
			leads, follow := leader(t)
			few, most := []string{leads}, follow
			majority := etcdClient(t, most...) // the others would not answer
			sides := [][]string{append(slices.Clone(own), few...), append(slices.Clone(others), most...)}
			if tt.majority {
				sides = [][]string{append(slices.Clone(own), most...), append(slices.Clone(others), few...)}
			}
			stay := n.pod("stay", gateway, "web")
			move := n.pod("move", others[0], "web")
			selected(t, stay, ip)
			selected(t, move, ip)
			stopAsking := askWhoHas(t, ip)
			t.Cleanup(func() {
				if err := cluster.Rejoin(context.Background()); err != nil {
					t.Error(err)
				}
			})
			began := time.Now()
			if err := cluster.Partition(t.Context(), sides...); err != nil {
				t.Fatal(err)
			}
			served := stay
			if !tt.majority {
				served = move
				eventually(t, leaseTTL+8*time.Second, func() error {
					owner, err := ownerIn(t.Context(), majority, ip)
					if err != nil || !slices.Contains(others, owner) {
						return fmt.Errorf("the owner is %q, %v; want one of %v", owner, err, others)
					}
					return nil
				})
				t.Logf("another node has it after %v; the former owner spoke last after %v", time.Since(began).Round(time.Millisecond),
					watch.LastAnswer(ip, gateway).Sub(began).Round(time.Millisecond))
			}
			leavesWithin(t, 8*time.Second, served, ip)
			t.Logf("%s is served again after at most %v", served, time.Since(began).Round(time.Millisecond))
			time.Sleep(2 * time.Second) // for the others to do what they must not
			if owner, err := ownerIn(t.Context(), majority, ip); err != nil || tt.majority && owner != gateway {
				t.Errorf("the owner is %q, %v; want %s still", owner, err, gateway)
			}
			if err := cluster.Rejoin(t.Context()); err != nil {
				t.Fatal(err)
			}
			leader(t)
			for _, pod := range []string{stay, move} {
				leavesWithin(t, 8*time.Second, pod, ip)
			}
			stopAsking()
			if err := watch.Doubles(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLeaderOfEtcdIsKilledDuringAFailover kills it in the moment in which the owner of an IP goes.
func TestLeaderOfEtcdIsKilledDuringAFailover(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("leader", "10.10.0.69")
	time.Sleep(4 * time.Second)
	leads, _ := leader(t)
	t.Cleanup(func() {
		if err := cluster.Recover(context.Background(), gateway); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if err := cluster.Start(context.Background(), leads, ""); err != nil {
			t.Error(err)
		}
	})
	r := probe(t, pod, 12*time.Second, func() {
		if err := cluster.Crash(t.Context(), gateway); err != nil {
			t.Fatal(err)
		}
		if err := cluster.Kill(t.Context(), leads, ""); err != nil {
			t.Fatal(err)
		}
	})
	only(t, r, ip)
	t.Logf("without an answer for %v", r.LongestGap)
	if _, owner := lookUp(t, "leader"); owner == gateway || owner == "" {
		t.Errorf("the owner is %q after %s went", owner, gateway)
	}
	// etcd elects within 1 to 2 s; the rest is as without.
	if limit := 6 * time.Second; r.LongestGap > limit {
		t.Errorf("without an answer for %v, want at most %v", r.LongestGap, limit)
	}
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
}

// TestFollowerOfEtcdThatStandsStillIsNotNoticed: its clients' connections to it hang, and their watches say nothing
// more.
func TestFollowerOfEtcdThatStandsStillIsNotNoticed(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("follower", "10.10.0.70")
	for _, stuck := range cluster.EtcdMembers() {
		if leads, _ := leader(t); stuck == leads {
			continue
		}
		next := otherNode(gateway, otherNode(gateway))
		thaw := func() {
			if err := cluster.Thaw(context.Background(), stuck); err != nil {
				t.Error(err)
			}
		}
		freeze := func() {
			t.Helper()
			if err := cluster.Freeze(t.Context(), stuck); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() {
			if t.Failed() {
				_ = cluster.Thaw(context.Background(), stuck) // the next tests want all members
			}
		})
		r := probe(t, pod, 6*time.Second, func() {
			freeze()
			time.Sleep(5 * time.Second) // it is what is tested
			thaw()
		})
		only(t, r, ip)
		lossless(t, "while "+stuck+" stood still", r)
		// The pod's node may hear of the move later than the new owner answers.
		freeze()
		r = probe(t, pod, 10*time.Second, func() { t.Log(egret(t, "move", ip.String(), "--to", next)) })
		thaw()
		only(t, r, ip)
		t.Logf("move: %d lost, longest gap %v", r.Lost, r.LongestGap)
		if r.LongestGap > 4*time.Second {
			t.Errorf("without an answer for %v, want 4s at most", r.LongestGap)
		}
		gateway = next
	}
}

// TestEtcdIsRestoredFromABackup has etcd come back as it was before a move, the restart of an agent, and an egress.
func TestEtcdIsRestoredFromABackup(t *testing.T) {
	n := newNamespace(t)
	moved, gateway, pod := n.remote("restored", "10.10.0.71")
	n.pool("stayed", "10.10.0.72", "10.10.0.72")
	n.egress("stayed", "stayed", "other")
	stayed, keeper := held(t, "stayed")
	other := n.pod("other", otherNode(keeper), "other")
	selected(t, other, stayed)
	backup := filepath.Join(t.TempDir(), "backup")
	then := revision(t, etcdClient(t))
	if err := cluster.SaveEtcd(t.Context(), backup); err != nil {
		t.Fatal(err)
	}
	next := otherNode(gateway, otherNode(gateway))
	egret(t, "move", moved.String(), "--to", next)
	for _, node := range nodes() {
		renew(t, node) // the leases of the backup are not theirs
	}
	n.pool("later", "10.10.0.73", "10.10.0.74")
	n.egress("later", "later", "later")
	later, _ := held(t, "later")
	late := n.pod("late", otherNode(), "later")
	selected(t, late, later)

	stopAsking := askWhoHas(t, moved)
	r := probe(t, pod, 12*time.Second, func() {
		began := time.Now()
		if err := cluster.RestoreEtcd(t.Context(), backup); err != nil {
			t.Fatal(err)
		}
		back := time.Now()
		if err := watch.Restored(t.Context(), then, began); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, func() error { return watch.Locked(t.Context(), moved, stayed, later) })
		t.Logf("all have an owner that lives %v after etcd is back", time.Since(back).Round(time.Millisecond))
	})
	only(t, r, moved)
	t.Logf("without an answer for %v", r.LongestGap)
	if limit := 8 * time.Second; r.LongestGap > limit {
		t.Errorf("without an answer for %v, want at most %v", r.LongestGap, limit)
	}
	for pod, ip := range map[string]netip.Addr{pod: moved, other: stayed, late: later} {
		leavesAs(t, pod, ip)
	}
	stopAsking()
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
	// And from there everything is as ever.
	owners := ownership(t)
	r = probe(t, pod, 3*time.Second, func() { egret(t, "move", moved.String(), "--to", otherNode(owners[moved])) })
	only(t, r, moved)
	lossless(t, "after the restore", r)
	delete(owners, moved)
	after := ownership(t)
	delete(after, moved)
	if !maps.Equal(owners, after) {
		t.Errorf("owners before the move %v, after it %v", owners, after)
	}
}
