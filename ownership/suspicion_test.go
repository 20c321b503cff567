package ownership

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// A lock that ended under a suspicion is waited for from when that was seen. What was seen in an etcd that was restored
// since counts for nothing: the backup may have the suspicion, and the owner may have ended it later, and got a yes.
func TestTheWaitForASuspectedOwnerBeginsWithTheSuspicionOfThisEtcd(t *testing.T) {
	const P = time.Second
	ip := netip.MustParseAddr("10.0.0.1")
	for _, tt := range []struct {
		name     string
		restores int
		want     plan.Role
	}{{"seen long ago", 0, plan.Own}, {"seen in the etcd before", 1, plan.Pending}} {
		t.Run(tt.name, func(t *testing.T) {
			now := epoch
			m := New(Config{Node: "a", Permit: P, Gossip: true, Start: now})
			m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Minute})
			round := func(s egress.Snapshot) plan.Role {
				s.Suspicions = map[string]egress.Suspicion{"b": {Node: "b", Revision: 7}}
				s.Agents = map[string]egress.Agent{"a": {Node: "a", Lease: egress.FormatLease(1)}}
				m.Step(now, View{Cluster: plan.New(&s)})
				return m.Step(now, Facts{Facts: plan.Facts{Node: "a", Uplink: plan.Link{Name: "eth0", Up: true}}, Dead: func(string) bool { return false }})[0].(Program).Roles[ip]
			}
			round(egress.Snapshot{})
			now = now.Add(10 * P)
			round(egress.Snapshot{Restores: tt.restores})
			now = now.Add(10 * time.Millisecond)
			lock := egress.Owner{IP: ip, Node: "a", Lease: 1, Revision: 20, Suspicion: 7}
			held := egress.Snapshot{Restores: tt.restores, Owners: map[netip.Addr]egress.Owner{ip: lock}}
			held.Pools = map[string]egress.Pool{"p": {}}
			held.Nodes = map[string]egress.Node{"a": {}}
			held.Egresses = map[string]egress.Policy{"e": {Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "p"}}}}
			if got := round(held); got != tt.want {
				t.Errorf("role %d, want %d", got, tt.want)
			}
		})
	}
}

// deaf returns a machine of a that hears nobody, and what it wants to do about b, which holds an IP, at a time, when
// etcd is so.
func deaf(now time.Time) func(now time.Time, s egress.Snapshot) []Effect {
	ip := netip.MustParseAddr("10.0.0.1")
	m := New(Config{Node: "a", Permit: time.Second, ClaimDelay: time.Second, Gossip: true, Start: now})
	m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Hour})
	return func(now time.Time, s egress.Snapshot) (out []Effect) {
		s.Nodes = map[string]egress.Node{"a": {}, "b": {}, "c": {}}
		s.Owners = map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "b", Lease: 2, Revision: 5}}
		if s.Agents == nil {
			s.Agents = map[string]egress.Agent{"a": {Node: "a"}, "c": {Node: "c"}, "b": {Node: "b", Lease: egress.FormatLease(2), Revocable: true, Suspectable: true}}
		}
		m.Step(now, View{Cluster: plan.New(&s)})
		m.Step(now, Facts{Facts: plan.Facts{Node: "a"}, Dead: func(string) bool { return true }})
		m.Step(now, Programmed{Applied: true})
		for _, f := range m.Step(now, Settled{}) {
			switch f.(type) {
			case Suspect, Revoke:
				out = append(out, f)
			}
		}
		return out
	}
}

// Where the gossip is cut off for long, and etcd is not, an agent that lives is suspected again and again, ever more
// rarely.
func TestAnAgentThatLivesIsSuspectedEverMoreRarely(t *testing.T) {
	now, suspected, revision := epoch, 0, int64(10)
	does := deaf(now)
	for end := now.Add(10 * time.Minute); now.Before(end); now = now.Add(100 * time.Millisecond) {
		for _, f := range does(now, egress.Snapshot{}) {
			s := f.(Suspect).Suspicion
			suspected++
			revision++
			s.Revision = revision
			now = now.Add(100 * time.Millisecond)
			for _, f := range does(now, egress.Snapshot{Suspicions: map[string]egress.Suspicion{"b": s}}) {
				t.Fatalf("%#v, at once", f)
			}
		}
	}
	if suspected < 10 || suspected > 20 {
		t.Errorf("suspected %d times in ten minutes, want 1, 2, 4 ... seconds and then a minute between two", suspected)
	}
}

// An agent of a version that knows no suspicions adopted the lease: it gets a yes all the same.
func TestASuspicionAgainstWhoKnowsNoneCountsForNothing(t *testing.T) {
	now := epoch
	m := New(Config{Node: "a", Permit: time.Second, Gossip: true, Start: now})
	s := egress.Snapshot{
		Suspicions: map[string]egress.Suspicion{"b": {Node: "b", Lease: egress.FormatLease(2), Revision: 7}},
		Agents:     map[string]egress.Agent{"b": {Node: "b", Lease: egress.FormatLease(2), Revocable: true}},
	}
	for range 2 { // its lease has ended when it is seen again
		m.Step(now, View{Cluster: plan.New(&s)})
		m.Step(now, Facts{Facts: plan.Facts{Node: "a"}, Dead: func(string) bool { return false }})
		s.Agents = nil
	}
	if got := m.suspicion(egress.Owner{Node: "b", Lease: 2}); got.Revision != 0 {
		t.Errorf("suspicion %+v counts", got)
	}
	if since := m.peers.suspected(7, now.Add(time.Hour)); !since.Equal(now.Add(time.Hour)) {
		t.Errorf("waited for from %v", since)
	}
}
