package witness

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

func TestSenders(t *testing.T) {
	ip := netip.MustParseAddr("10.10.0.11")
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	sent := func(node string, first, last float64) spell { return spell{node, at(first), at(last)} }
	a, crash, move := tenure{"a", at(0), egress.ReasonClaim}, tenure{"b", at(10), egress.ReasonClaim}, tenure{"b", at(10), egress.ReasonMove}
	for _, tt := range []struct {
		name    string
		tenures []tenure
		spells  []spell
		want    int
	}{
		{"one owner", []tenure{a}, []spell{sent("a", 1, 99)}, 0},
		{"a crash", []tenure{a, crash}, []spell{sent("a", 1, 10.4), sent("b", 10.5, 99)}, 0},
		{"the former owner after a crash", []tenure{a, crash}, []spell{sent("a", 1, 9), sent("b", 10.5, 11), sent("a", 11.1, 11.1), sent("b", 12, 13)}, 1},
		{"a move, with both as relays", []tenure{a, move}, []spell{sent("a", 1, 9), sent("b", 9.9, 9.9), sent("a", 9.91, 10.1), sent("b", 10.1, 11),
			sent("a", 11, 12), sent("b", 12, 20)}, 0},
		{"a relay for too long", []tenure{a, move}, []spell{sent("a", 1, 10), sent("b", 10, 20), sent("a", 20, 20)}, 1},
		{"somebody else", []tenure{a}, []spell{sent("a", 1, 10), sent("c", 10, 20)}, 1},
		{"its lock at another lease", []tenure{a, a, move, move}, []spell{sent("a", 1, 10), sent("b", 10, 11), sent("a", 11, 12)}, 0},
		{"there and back", []tenure{a, move, {"a", at(12), egress.ReasonMove}}, []spell{sent("a", 1, 10), sent("b", 10, 12), sent("a", 12, 13), sent("b", 13, 14), sent("a", 14, 99)}, 0},
	} {
		w := &Witness{tenures: map[netip.Addr][]tenure{ip: tt.tenures}, spells: map[netip.Addr][]spell{ip: tt.spells}}
		if got := w.senders(); len(got) != tt.want {
			t.Errorf("%s: %v, want %d", tt.name, got, tt.want)
		}
	}
}
