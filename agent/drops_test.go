package agent

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

func TestDropsAreSaidWhenTheyLastAndNoLonger(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.5")
	cause := true
	d := &drops{log: slog.New(slog.DiscardHandler), causes: func() func(egress.ID) (netip.Addr, string, bool) {
		return func(id egress.ID) (netip.Addr, string, bool) { return ip, "chain x", cause && id == 5 }
	}}
	now := time.Now()
	const never = -1
	// What the guard says at each look: how long ago it dropped the last packet.
	look := func(ago time.Duration, want string, changed bool) {
		t.Helper()
		now = now.Add(dropsEvery)
		last := map[egress.ID]time.Duration{}
		if ago != never {
			last[5], last[6] = ago, ago
		}
		if got := d.note(now, last); got != changed {
			t.Errorf("changed is %t", got)
		}
		said := map[netip.Addr]string{}
		if want != "" {
			said[ip] = want
		}
		if diff := cmp.Diff(said, d.why(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" && len(said)+len(d.why()) > 0 {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	look(never, "", false)
	look(4*time.Second, "", false) // a take-over: a moment of drops
	look(7*time.Second, "", false)
	look(12*time.Second, "", false)
	look(never, "", false)
	look(time.Second, "", false) // for longer
	look(2*time.Second, "", false)
	look(time.Second, "chain x", true)
	look(6*time.Second, "chain x", false) // who tries only now and then
	look(11*time.Second, "chain x", false)
	look(never, "", true)
	look(time.Second, "", false)
	look(time.Second, "", false)
	cause = false
	look(time.Second, "", false) // as it should be: the node has no permit
	cause = true
	look(time.Second, "chain x", true)
}
