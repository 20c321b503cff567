package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
)

// Etcd's answers renew the permits when less than three fifths of them are left; where none comes, time does when two
// fifths are.
func TestPermitsAreRenewedByEverySecondAnswerOrByTime(t *testing.T) {
	const length = 500 * time.Millisecond
	permits := func(gossip bool, left time.Duration) *permits {
		p := newPermits(nil, newMachine(ownership.Config{Node: "a", Permit: length, Gossip: gossip}), length, time.Minute)
		p.machine.step(ownership.Granted{Lease: 1, Sent: time.Now(), TTL: time.Minute})
		p.machine.Step(time.Now(), ownership.View{Cluster: plan.New(&egress.Snapshot{})})
		p.machine.Grant([]ownership.Permit{{IP: netip.MustParseAddr("10.10.0.11"), Answer: true}}, true)
		p.machine.Written(time.Now().Add(left), time.Now().Add(length))
		return p
	}
	for _, tt := range []struct {
		left, due time.Duration
		renews    bool
	}{
		{450 * time.Millisecond, 250 * time.Millisecond, false},
		{350 * time.Millisecond, 150 * time.Millisecond, false},
		{290 * time.Millisecond, 125 * time.Millisecond, true},
		{-time.Second, 125 * time.Millisecond, true},
	} {
		p := permits(true, tt.left)
		if p.confirmed(); len(p.kick) > 0 != tt.renews {
			t.Errorf("an answer with %v left: renewed %t, want %t", tt.left, len(p.kick) > 0, tt.renews)
		}
		if due := p.due(); due > tt.due || due < 125*time.Millisecond {
			t.Errorf("with %v left, renewed by time alone after %v: want at most %v", tt.left, due, tt.due)
		}
	}
	if due := permits(false, time.Minute).due(); due != length/4 {
		t.Errorf("without gossip renewed after %v, want %v: no answer says when", due, length/4)
	}
	p := permits(true, 0)
	p.machine.Grant(nil, true)
	if p.confirmed(); len(p.kick) > 0 {
		t.Error("an answer wakes what renews permits although there are none")
	}
}
