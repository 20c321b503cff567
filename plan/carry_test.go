package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
)

// What a Cluster carries on from the one before is what it would compute anew: for a node with links, and for
// snapshots each of which differs from the one before in some of its maps, and has the others of it.
func TestACarriedClusterPlansAsANewOne(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	const nodes, ips = 6, 12
	name := func(kind string, n int) string { return fmt.Sprint(kind, "-", r.IntN(n)) }
	addr := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 10, 0, byte(r.IntN(ips))}) }
	s := &egress.Snapshot{}
	change := map[string]func(){
		"nodes": func() {
			s.Nodes = edited(s.Nodes, name("node", nodes), func() egress.Node {
				i := r.IntN(nodes)
				return egress.Node{Name: fmt.Sprint("node-", i), Index: i + 1, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(r.IntN(250))})},
					Labels: map[string]string{"gateway": fmt.Sprint(r.IntN(2))}, Capacity: r.IntN(4)}
			}, r)
		},
		"pods": func() {
			s.Pods = edited(s.Pods, name("node", nodes), func() egress.PodRanges { return egress.PodRanges{CIDRs: []netip.Prefix{netip.PrefixFrom(addr(), 32)}} }, r)
		},
		"services": func() {
			s.Services = edited(s.Services, name("svc", 2), func() egress.ServiceCIDR {
				return egress.ServiceCIDR{CIDRs: []netip.Prefix{netip.PrefixFrom(addr(), 32)}}
			}, r)
		},
		"agents": func() {
			s.Agents = edited(s.Agents, name("node", nodes), func() egress.Agent { return egress.Agent{Lease: "1", Restarting: r.IntN(5) == 0} }, r)
		},
		"owners": func() {
			ip := addr()
			s.Owners = edited(s.Owners, ip, func() egress.Owner { return egress.Owner{IP: ip, Node: name("node", nodes), Revision: r.Int64N(9) + 1} }, r)
		},
		"moves": func() {
			s.Moves = edited(s.Moves, addr(), func() egress.Move { return egress.Move{IP: addr(), To: name("node", nodes)} }, r)
		},
		"pools": func() {
			s.Pools = edited(s.Pools, name("pool", 2), func() egress.Pool {
				return egress.Pool{NodeSelector: egress.Selector{MatchLabels: map[string]string{"gateway": fmt.Sprint(r.IntN(2))}}}
			}, r)
		},
		"egresses": func() {
			s.Egresses = edited(s.Egresses, name("egress", ips), func() egress.Policy {
				return egress.Policy{Addresses: []egress.Address{{IP: addr(), ID: egress.ID(r.IntN(ips) + 1), Pool: []string{"", "pool-0", "pool-1"}[r.IntN(3)]}}}
			}, r)
		},
	}
	kinds := []string{"nodes", "pods", "services", "agents", "owners", "moves", "pools", "egresses"}
	c := New(s)
	for step := range 3000 {
		next := *s
		s = &next
		for range r.IntN(3) {
			change[kinds[r.IntN(len(kinds))]]()
		}
		c = c.With(s)
		f := Facts{Node: "node-0", Underlay: netip.MustParseAddr("192.0.2.1"), Uplink: Link{Name: "eth0", Up: true, MTU: 1500}, Links: []Link{{Name: "eth0", Up: true}},
			Local: map[netip.Addr]bool{netip.AddrFrom4([4]byte{10, 10, 0, 3}): true}}
		if r.IntN(20) == 0 {
			f.Underlay = netip.MustParseAddr("192.0.2.2")
		}
		type planned struct {
			Desired   Desired
			Claims    []Claim
			Releases  []egress.Owner
			Bystander bool
			Owned     int
			Held      map[netip.Addr]egress.Owner
		}
		of := func(c *Cluster) planned {
			return planned{Build(c, f, map[netip.Addr]Role{}), c.Claims(f), c.Releases(f), c.Bystander(f), c.Owned("node-1"), c.Held("node-2")}
		}
		if diff := cmp.Diff(of(New(s)), of(c), cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Fatalf("seed %d, step %d (-new +carried):\n%s", seed, step, diff)
		}
	}
}

// edited returns another map than m, in which a key has another value or none.
func edited[K comparable, V any](m map[K]V, key K, value func() V, r *rand.Rand) map[K]V {
	out := map[K]V{}
	maps.Copy(out, m)
	if delete(out, key); r.IntN(4) > 0 {
		out[key] = value()
	}
	return out
}
