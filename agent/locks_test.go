package agent

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
)

// logging returns an agent of node n1 that logs, and what it has logged since it was asked last, without time and
// level.
func logging() (*agent, func() string) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}}))
	return &agent{Config: Config{Node: "n1", Log: log}, metrics: newMetrics()}, func() string {
		defer out.Reset()
		return strings.TrimSpace(out.String())
	}
}

// Who reads the log of a take-over is told whose IP it was, and what became of that node.
func TestATakeOverIsLoggedWithTheNodeItIsFrom(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	s := func(owners map[netip.Addr]egress.Owner) *egress.Snapshot {
		return &egress.Snapshot{Egresses: map[string]egress.Policy{"web": {Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1}}}}, Owners: owners}
	}
	held := map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "n2", Why: egress.ReasonClaim}}
	for name, tt := range map[string]struct {
		before map[netip.Addr]egress.Owner
		takes  egress.Owner
		want   string
	}{
		"nobody had it":          {nil, egress.Owner{Why: egress.ReasonClaim}, "why=claim"},
		"its owner has died":     {held, egress.Owner{Why: egress.ReasonClaim}, "why=crash from=n2"},
		"its owner gave it back": {held, egress.Owner{Why: egress.ReasonClaim, From: "n2"}, "why=release from=n2"},
		"it is the node's own":   {held, egress.Owner{Why: egress.ReasonStatic}, "why=static"},
	} {
		a, logged := logging()
		now := time.Now()
		for _, owners := range []map[netip.Addr]egress.Owner{tt.before, nil} {
			a.metrics.arrivals(&round{Cluster: plan.New(s(owners)), now: now}, a.Node, func(string) bool { return false })
		}
		tt.takes.IP, tt.takes.Node = ip, a.Node
		a.logClaim(tt.takes, []string{"web"})
		if want := `msg="egress IP claimed" egress_ip=10.0.0.1 egress=[web] ` + tt.want; logged() != want {
			t.Errorf("%s: want %s", name, want)
		}
	}
}

// A lock that goes by itself goes with its lease: without a line for each IP nobody can read when it left.
func TestEachEgressIPThatGoesWithTheLeaseIsLogged(t *testing.T) {
	a, logged := logging()
	first, second := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	lock := func(ip netip.Addr, node string, revision int64) egress.Owner {
		return egress.Owner{IP: ip, Node: node, Lease: 0x6a6ca20ac6dc7c06, Revision: revision}
	}
	next := func(owners ...egress.Owner) string {
		s := &egress.Snapshot{Owners: map[netip.Addr]egress.Owner{}, Egresses: map[string]egress.Policy{
			"mail": {Name: "mail", Addresses: []egress.Address{{IP: second, ID: 2}}}, "web": {Name: "web", Addresses: []egress.Address{{IP: first, ID: 1}}},
		}}
		for _, o := range owners {
			s.Owners[o.IP] = o
		}
		a.logLost(plan.New(s))
		return logged()
	}
	const goes = `msg="egress IP lost" egress_ip=`
	if got := next(lock(first, "n1", 1), lock(second, "n1", 2)); got != "" {
		t.Errorf("what the node has when its agent begins: %s", got)
	}
	if got, want := next(), goes+"10.0.0.1 egress=[web] lease=6a6ca20ac6dc7c06\n"+goes+"10.0.0.2 egress=[mail] lease=6a6ca20ac6dc7c06"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := next(); got != "" {
		t.Errorf("once more: %s", got)
	}
	next(lock(first, "n1", 3), lock(second, "n1", 4))
	a.locks.give(lock(first, "n1", 3)) // which handOver and release log
	if got, want := next(lock(first, "n2", 5), lock(second, "n3", 6)), goes+"10.0.0.2 egress=[mail] lease=6a6ca20ac6dc7c06 node=n3"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	next(lock(first, "n1", 7))
	if got, want := next(), goes+"10.0.0.1 egress=[web] lease=6a6ca20ac6dc7c06"; got != want {
		t.Errorf("a later lock than the one that was given up: got %q, want %q", got, want)
	}
}

// Where etcd takes 100 ms for a request, a reconcile has time for ten.
func TestStaticIPsDoNotHoldUpTheLocksOfADeadGateway(t *testing.T) {
	g := newGiver(t)
	g.history = newHistory()
	dead := netip.MustParseAddr("10.10.0.200")
	g.probes = newProbes(&probes{})
	g.probes.found[dead] = finding{used: true}
	var claims []ownership.Claim
	for ip := netip.MustParseAddr("10.10.0.101"); len(claims) < 20; ip = ip.Next() {
		claims = append(claims, ownership.Claim{Claim: plan.Claim{IP: ip, Why: egress.ReasonStatic}})
	}
	claims = append(claims, ownership.Claim{Claim: plan.Claim{IP: dead, Why: egress.ReasonClaim}})
	before := g.snapshot()
	if err := g.claimAll(t.Context(), round{Cluster: plan.New(before), lease: g.machine.current()}, claims); err != nil {
		t.Fatal(err)
	}
	after := g.snapshot()
	for _, c := range claims {
		if after.Owners[c.IP].Node != g.Node || !g.locks.claimed[c.IP] {
			t.Errorf("%s is not claimed: %+v", c.IP, after.Owners[c.IP])
		}
	}
	if n := after.Revision - before.Revision; n != 1 {
		t.Errorf("%d transactions, want one", n)
	}
}
