package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// dual returns a cluster of n nodes and some egresses with an IP of each family, none of which is held.
func dual(n, egresses int) *egress.Snapshot {
	s := cluster(n, 0)
	s.Pools["six"] = egress.Pool{Name: "six", Ranges: []egress.Range{{Start: ip("fd00::1"), End: ip("fd00::ffff")}}}
	four, six := ip("10.10.0.11"), ip("fd00::1")
	for i := 1; i <= egresses; i++ {
		name := fmt.Sprintf("egress-%04d", i)
		s.Egresses[name] = egress.Policy{Name: name, Created: time.Unix(int64(i), 0), Addresses: []egress.Address{
			{IP: four, ID: egress.ID(2*i - 1), Pool: "pool"}, {IP: six, ID: egress.ID(2 * i), Pool: "six"},
		}}
		four, six = four.Next(), six.Next()
	}
	return s
}

func TestBothIPsOfAnEgress(t *testing.T) {
	four, six := ip("10.10.0.11"), ip("fd00::1")
	own := func(a netip.Addr, node string) func(*egress.Snapshot) {
		return func(s *egress.Snapshot) { s.Owners[a] = egress.Owner{IP: a, Node: node} }
	}
	tests := map[string]struct {
		prepare []func(*egress.Snapshot)
		node    string
		want    string // what the node claims and, after a bar, gives back
	}{
		"the second is claimed by who holds the first":   {[]func(*egress.Snapshot){own(four, "node-2")}, "node-2", "fd00::1/0 |"},
		"and by nobody else":                             {[]func(*egress.Snapshot){own(four, "node-2")}, "node-1", " |"},
		"the first is claimed by who holds the second":   {[]func(*egress.Snapshot){own(six, "node-2")}, "node-2", "10.10.0.11/0 |"},
		"held by two nodes, the first stays":             {[]func(*egress.Snapshot){own(four, "node-2"), own(six, "node-3")}, "node-2", " |"},
		"held by two nodes, the second is given back":    {[]func(*egress.Snapshot){own(four, "node-2"), own(six, "node-3")}, "node-3", " | fd00::1"},
		"a move of the second to the first goes on":      {[]func(*egress.Snapshot){own(four, "node-2"), own(six, "node-3"), move(six, "node-2")}, "node-3", " |"},
		"a move of the first to the second goes on":      {[]func(*egress.Snapshot){own(four, "node-2"), own(six, "node-3"), move(four, "node-3")}, "node-3", " |"},
		"a wish for the second is one for both":          {[]func(*egress.Snapshot){move(six, "node-3")}, "node-3", "10.10.0.11/0 fd00::1/0 |"},
		"a node that only one pool selects takes none":   {[]func(*egress.Snapshot){selecting("six", "node-1")}, "node-2", " |"},
		"the node that both pools select takes both":     {[]func(*egress.Snapshot){selecting("six", "node-1")}, "node-1", "10.10.0.11/0 fd00::1/0 |"},
		"who may not hold the second gives back both":    {[]func(*egress.Snapshot){own(four, "node-2"), own(six, "node-2"), selecting("six", "node-1")}, "node-2", " | 10.10.0.11 fd00::1"},
		"a node with room for one takes none":            {[]func(*egress.Snapshot){withCapacity(1)}, "node-1", " |"},
		"a node with room for two takes both":            {[]func(*egress.Snapshot){withCapacity(2), selecting("six", "node-1")}, "node-1", "10.10.0.11/0 fd00::1/0 |"},
		"a pool IP waits for its static one":             {[]func(*egress.Snapshot){static}, "node-1", " |"},
		"a pool IP goes where its static one is":         {[]func(*egress.Snapshot){static, own(four, "node-2")}, "node-2", "fd00::1/0 |"},
		"a pool IP leaves when its static one went away": {[]func(*egress.Snapshot){static, own(four, "node-2"), own(six, "node-1")}, "node-1", " | fd00::1"},
	}
	for name, tt := range tests {
		s := dual(3, 1)
		for _, prepare := range tt.prepare {
			prepare(s)
		}
		f, got := facts(tt.node), ""
		f.Local = map[netip.Addr]bool{four: s.Owners[four].Node == tt.node}
		for i, c := range New(s).Claims(f) {
			if i > 0 {
				got += " "
			}
			got += fmt.Sprintf("%s/%d", c.IP, c.Rank)
		}
		got += " |"
		for _, o := range New(s).Releases(f) {
			got += " " + o.IP.String()
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s: %s (-want +got):\n%s", name, tt.node, d)
		}
	}
}

func move(a netip.Addr, to string) func(*egress.Snapshot) {
	return func(s *egress.Snapshot) { s.Moves[a] = egress.Move{IP: a, To: to} }
}

// selecting makes a pool select one node.
func selecting(pool, node string) func(*egress.Snapshot) {
	return func(s *egress.Snapshot) {
		n, p := s.Nodes[node], s.Pools[pool]
		n.Labels = map[string]string{"name": node}
		p.NodeSelector.MatchLabels = n.Labels
		s.Nodes[node], s.Pools[pool] = n, p
	}
}

func withCapacity(n int) func(*egress.Snapshot) {
	return func(s *egress.Snapshot) {
		for name, node := range s.Nodes {
			node.Capacity = n
			s.Nodes[name] = node
		}
	}
}

// static makes the first IP a static one.
func static(s *egress.Snapshot) {
	p := s.Egresses["egress-0001"]
	p.Addresses[0].Pool = ""
	s.Egresses["egress-0001"] = p
}

// TestBothIPsMeetAgain has nodes die, come back, claim out of turn and move IPs, in random order. Once that is over,
// all IPs are held, and the two of an egress by one node.
func TestBothIPsMeetAgain(t *testing.T) {
	const nodes, egresses = 5, 12
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	s := dual(nodes, egresses)
	turn := func(node string, rank int) (changed bool) {
		for _, o := range New(s).Releases(facts(node)) {
			delete(s.Owners, o.IP)
			changed = true
		}
		for _, c := range New(s).Claims(facts(node)) {
			if _, owned := s.Owners[c.IP]; !owned && c.Rank <= rank && r.IntN(3) > 0 {
				s.Owners[c.IP] = egress.Owner{IP: c.IP, Node: node}
			}
			changed = true
		}
		return changed
	}
	for range 200 {
		for range 20 {
			node := fmt.Sprintf("node-%d", 1+r.IntN(nodes))
			_, alive := s.Agents[node]
			switch r.IntN(4) {
			case 0:
				delete(s.Agents, node)
				maps.DeleteFunc(s.Owners, func(_ netip.Addr, o egress.Owner) bool { return o.Node == node })
			case 1:
				s.Agents[node] = egress.Agent{Node: node}
			case 2:
				if all := slices.SortedFunc(maps.Keys(s.Owners), netip.Addr.Compare); alive && len(all) > 0 {
					a := all[r.IntN(len(all))]
					s.Owners[a] = egress.Owner{IP: a, Node: node}
				}
			default:
				if alive {
					turn(node, r.IntN(nodes))
				}
			}
		}
		s.Agents["node-1"] = egress.Agent{Node: "node-1"}
		for i := 0; ; i++ {
			changed := false
			for _, node := range slices.Sorted(maps.Keys(s.Agents)) {
				changed = turn(node, 0) || changed
			}
			if !changed {
				break
			}
			if i == 100 {
				t.Fatal("claims and releases do not come to an end")
			}
		}
		for name, p := range s.Egresses {
			four, six := s.Owners[p.Addresses[0].IP].Node, s.Owners[p.Addresses[1].IP].Node
			if four == "" || four != six {
				t.Fatalf("%s: its IPs are on %q and %q", name, four, six)
			}
		}
	}
}

// TestInvariant6HoldsForBothFamilies is TestInvariant6EqualSnapshotsGiveEqualClaimsOnEveryNode with egresses of two
// IPs.
func TestInvariant6HoldsForBothFamilies(t *testing.T) {
	const nodes, egresses = 7, 20
	r := rand.New(rand.NewPCG(1, 2))
	first := map[netip.Addr]string{}
	for i := 1; i <= nodes; i++ {
		node := fmt.Sprintf("node-%d", i)
		for _, c := range New(shuffled(dual(nodes, egresses), r)).Claims(facts(node)) {
			if c.Rank == 0 && first[c.IP] != "" {
				t.Errorf("%s: both %s and %s are first", c.IP, first[c.IP], node)
			}
			if c.Rank == 0 {
				first[c.IP] = node
			}
		}
	}
	load := map[string]int{}
	for _, p := range dual(nodes, egresses).Egresses {
		four, six := first[p.Addresses[0].IP], first[p.Addresses[1].IP]
		if four == "" || four != six {
			t.Errorf("%s: %q and %q are first", p.Name, four, six)
		}
		load[four]++
	}
	for node, n := range load {
		if n > (egresses+nodes-1)/nodes {
			t.Errorf("%s has %d of %d egresses", node, n, egresses)
		}
	}
}

// TestBothIPsLeaveACordonedNode has a cordoned node give away both IPs of an egress, one after the other, each in
// service all the time.
func TestBothIPsLeaveACordonedNode(t *testing.T) {
	s := dual(3, 2)
	hold := func(nodes ...string) {
		for i, a := range []netip.Addr{ip("10.10.0.11"), ip("fd00::1"), ip("10.10.0.12"), ip("fd00::2")} {
			s.Owners[a] = egress.Owner{IP: a, Node: nodes[i]}
		}
	}
	hold("node-1", "node-1", "node-2", "node-2")
	s.Cordons["node-1"] = egress.Cordon{}
	withCapacity(3)(s)
	if got, to := leaving(s, "node-1"); got != "10.10.0.11" || !slices.Equal(to, []string{"node-3"}) {
		t.Errorf("%q leaves to %v, want 10.10.0.11, to the node with room for both", got, to)
	}
	hold("node-3", "node-1", "node-2", "node-2")
	if got := New(s).Releases(facts("node-1")); len(got) != 0 {
		t.Errorf("the second is given back: %v, want a planned move", got)
	}
	if got, to := leaving(s, "node-1"); got != "fd00::1" || !slices.Equal(to, []string{"node-3"}) {
		t.Errorf("%q leaves to %v, want fd00::1 to follow to node-3", got, to)
	}
}

// TestRebalancingMovesTheFirstIPForBoth: the second would go back to the first.
func TestRebalancingMovesTheFirstIPForBoth(t *testing.T) {
	four, six := ip("10.10.0.11"), ip("fd00::1")
	for _, pinned := range []netip.Addr{four, six} {
		s := dual(2, 1)
		for _, a := range []netip.Addr{four, six} {
			s.Owners[a] = egress.Owner{IP: a, Node: "node-1"}
		}
		s.Pins[pinned] = egress.Pin{IP: pinned, Node: "node-2"}
		misplaced := New(s).Misplacements()
		if len(misplaced) != 1 || misplaced[0].Owner.IP != four || misplaced[0].To != "node-2" {
			t.Errorf("%s is pinned: misplaced %v, want %s to go to node-2", pinned, misplaced, four)
		}
		withCapacity(1)(s)
		if m, ok := New(s).Rebalance(misplaced); ok {
			t.Errorf("%s is pinned: %v moves to a node with room for one", pinned, m)
		}
	}
}
