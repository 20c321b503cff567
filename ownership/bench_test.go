package ownership

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// BenchmarkRound is a round of one of 50 gateways among 5,000 nodes with 10,000 egress IPs: at rest, and when nobody
// holds any of them.
func BenchmarkRound(b *testing.B) {
	const nodes, gateways, ips = 5000, 50, 10000
	s := &egress.Snapshot{
		Pools: map[string]egress.Pool{"p": {Name: "p", NodeSelector: egress.Selector{MatchLabels: map[string]string{"gateway": "yes"}}}},
		Nodes: map[string]egress.Node{}, Agents: map[string]egress.Agent{}, Egresses: map[string]egress.Policy{}, Owners: map[netip.Addr]egress.Owner{},
	}
	for i := range nodes {
		name := fmt.Sprint("node-", i)
		n := egress.Node{Name: name, Index: i + 1}
		if i < gateways {
			n.Labels = map[string]string{"gateway": "yes"}
		}
		s.Nodes[name], s.Agents[name] = n, egress.Agent{Node: name, Lease: egress.FormatLease(int64(i + 1))}
	}
	owners := map[netip.Addr]egress.Owner{}
	ip := netip.MustParseAddr("10.0.0.0")
	for i := range ips {
		ip = ip.Next()
		name := fmt.Sprint("egress-", i)
		s.Egresses[name] = egress.Policy{Name: name, Addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 1), Pool: "p"}}}
		owners[ip] = egress.Owner{IP: ip, Node: fmt.Sprint("node-", i%gateways), Lease: int64(i%gateways + 1), Revision: int64(i + 1)}
	}
	for name, held := range map[string]map[netip.Addr]egress.Owner{"at rest": owners, "nobody holds any": {}} {
		b.Run(name, func(b *testing.B) {
			s.Owners = held
			m := New(Config{Node: "node-0", Permit: time.Second, ClaimDelay: time.Second, Gossip: true, Start: epoch})
			now := epoch.Add(time.Hour)
			m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Minute})
			facts := Facts{Facts: plan.Facts{Node: "node-0", Uplink: plan.Link{Name: "eth0", Up: true}}, Dead: func(string) bool { return false }}
			longest := time.Duration(0)
			cluster := plan.New(s)
			for b.Loop() {
				news := *s // a record changed that has nothing to do with who owns what
				cluster = cluster.With(&news)
				for _, e := range []Event{View{Cluster: cluster}, facts, Programmed{Applied: true}, Settled{}} {
					began := time.Now()
					m.Step(now, e)
					longest = max(longest, time.Since(began))
				}
			}
			b.ReportMetric(float64(longest.Microseconds())/1000, "ms-longest-step")
		})
	}
}
