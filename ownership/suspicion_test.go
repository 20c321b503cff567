package ownership

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// A lock that ended under a suspicion is waited for from when that was seen. What was seen in an etcd that was restored since counts for nothing: the
// backup may have the suspicion, and the owner may have ended it later, and got a yes.
func TestTheWaitForASuspectedOwnerBeginsWithTheSuspicionOfThisEtcd(t *testing.T) {
	const P = time.Second
	ip := netip.MustParseAddr("10.0.0.1")
	for _, tt := range []struct {
		name     string
		restores int
		want     plan.Role
	}{{"seen long ago", 0, plan.Hold}, {"seen in the etcd before", 1, plan.Pending}} {
		t.Run(tt.name, func(t *testing.T) {
			now := epoch
			m := New(Config{Node: "a", Permit: P, Gossip: true, Start: now})
			m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Minute})
			pass := func(s egress.Snapshot) plan.Role {
				s.Suspicions = map[string]egress.Suspicion{"b": {Node: "b", Revision: 7}}
				m.Step(now, View{Cluster: plan.New(&s)})
				return m.Step(now, Facts{Facts: plan.Facts{Node: "a", Uplink: plan.Link{Name: "eth0", Up: true}}, Dead: func(string) bool { return false }})[0].(Program).Roles[ip]
			}
			pass(egress.Snapshot{})
			now = now.Add(10 * P)
			pass(egress.Snapshot{Restores: tt.restores})
			now = now.Add(10 * time.Millisecond)
			lock := egress.Owner{IP: ip, Node: "a", Lease: 1, Revision: 20, Suspicion: 7}
			held := egress.Snapshot{Restores: tt.restores, Owners: map[netip.Addr]egress.Owner{ip: lock}}
			held.Pools = map[string]egress.Pool{"p": {}}
			held.Nodes = map[string]egress.Node{"a": {}}
			held.Egresses = map[string]egress.Policy{"e": {Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "p"}}}}
			if got := pass(held); got != tt.want {
				t.Errorf("role %d, want %d", got, tt.want)
			}
		})
	}
}
