package ownership

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// A round over thousands of IPs takes longer than permits may wait.
func TestPermitsAreRenewedWhileARoundGoesOn(t *testing.T) {
	ip, now := netip.MustParseAddr("10.0.0.1"), epoch
	m := New(Config{Node: "a", Permit: time.Second, Gossip: true, Freeze: true, Process: 1, Start: now})
	m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Minute})
	m.Step(now, View{Cluster: plan.New(&egress.Snapshot{
		Agents:  map[string]egress.Agent{"a": {Node: "a", Lease: egress.FormatLease(1), Permit: egress.Duration(time.Second)}, "b": {Node: "b"}},
		Nodes:   map[string]egress.Node{"a": {}, "b": {}},
		Longest: time.Second,
		Owners:  map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "a", Lease: 1, Revision: 1, From: "b"}},
	})})
	m.Grant([]Permit{{IP: ip, Answer: true}}, false)
	first := true
	inPass, goOn, done := make(chan bool), make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		m.Step(now, Facts{Facts: plan.Facts{Node: "a"}, Dead: func(string) bool {
			if first {
				first = false
				inPass <- true
				<-goOn
			}
			return false
		}})
	}()
	<-inPass
	renewed := make(chan error)
	go func() {
		m.Step(now, Confirmed{Lease: 1, Sent: now})
		m.Step(now, Heard{From: "b", Message: Message{Process: 2}})
		end, limit, err := m.Look(now)
		m.Written(end, limit)
		m.Narrow(func(netip.Addr) (send, answer bool) { return true, true })
		renewed <- err
	}()
	select {
	case err := <-renewed:
		if _, answer := m.Lasts(now, ip); err != nil || !answer {
			t.Errorf("renewed: %v, answers %t", err, answer)
		}
	case <-time.After(5 * time.Second):
		t.Error("the renewal waits for the round")
	}
	close(goOn)
	<-done
}
