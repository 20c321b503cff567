package plan

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

var compare = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()}

// cluster returns a snapshot of n live nodes, one pool that selects them all, and the given number of egress IPs
// without an owner.
func cluster(n, ips int) *egress.Snapshot {
	s := &egress.Snapshot{
		Pools:    map[string]egress.Pool{"pool": {Name: "pool", Ranges: []egress.Range{{Start: ip("10.10.0.11"), End: ip("10.10.255.20")}}}},
		Egresses: map[string]egress.Policy{}, Nodes: map[string]egress.Node{}, Agents: map[string]egress.Agent{},
		Owners: map[netip.Addr]egress.Owner{}, Moves: map[netip.Addr]egress.Move{}, Pins: map[netip.Addr]egress.Pin{},
		Cordons: map[string]egress.Cordon{}, ByNode: map[string]egress.Members{}, ByEgress: map[string]map[string]egress.Members{},
	}
	for i := 1; i <= n; i++ {
		name := fmt.Sprintf("node-%d", i)
		s.Nodes[name] = egress.Node{Name: name, Index: i, Addresses: []netip.Addr{ip(fmt.Sprintf("10.10.0.%d", 100+i))}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i))}}
		s.Agents[name] = egress.Agent{Node: name}
	}
	a := ip("10.10.0.11")
	for i := 1; i <= ips; i++ {
		name := fmt.Sprintf("egress-%04d", i)
		s.Egresses[name] = egress.Policy{Name: name, Created: time.Unix(int64(i), 0), Addresses: []egress.Address{{IP: a, ID: egress.ID(i), Pool: "pool"}}}
		a = a.Next()
	}
	return s
}

var eth0 = Link{
	Name: "eth0", MTU: 1500, MAC: [6]byte{2, 0, 10, 10, 0, 101}, Up: true, IPv6: true, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.10.0.101/24")},
}

func facts(node string) Facts {
	return Facts{Node: node, Underlay: ip("10.10.0.101"), Uplink: eth0, AnswersARP: true}
}

func claimed(s *egress.Snapshot, f Facts) map[string]int {
	out := map[string]int{}
	for _, c := range New(s).Claims(f) {
		out[c.IP.String()] = c.Rank
	}
	return out
}

// own gives every IP to its first in rank.
func own(s *egress.Snapshot) {
	for a, nodes := range New(s).rank() {
		s.Owners[a] = egress.Owner{IP: a, Node: nodes[0]}
	}
}

func TestEveryCandidateHasARankOfItsOwn(t *testing.T) {
	s := cluster(3, 1)
	var ranks []int
	for node := range s.Nodes {
		ranks = append(ranks, claimed(s, facts(node))["10.10.0.11"])
	}
	slices.Sort(ranks)
	if diff := cmp.Diff([]int{0, 1, 2}, ranks); diff != "" {
		t.Errorf("ranks (-want +got):\n%s", diff)
	}
}

func TestClaimsLeaveOutWhoMayNotOwn(t *testing.T) {
	tests := map[string]func(*egress.Snapshot, *Facts){
		"another host uses it":           func(_ *egress.Snapshot, f *Facts) { f.Taken = map[netip.Addr]bool{ip("10.10.0.11"): true} },
		"its agent is down":              func(s *egress.Snapshot, _ *Facts) { delete(s.Agents, "node-1") },
		"the pool does not select it":    func(s *egress.Snapshot, _ *Facts) { setSelector(s, map[string]string{"role": "gateway"}) },
		"the pool is not there":          func(s *egress.Snapshot, _ *Facts) { delete(s.Pools, "pool") },
		"it is cordoned in Kubernetes":   func(s *egress.Snapshot, _ *Facts) { change(s, func(n *egress.Node) { n.Cordoned = true }) },
		"it is cordoned by the operator": func(s *egress.Snapshot, _ *Facts) { s.Cordons["node-1"] = egress.Cordon{Node: "node-1"} },
		"its record is gone":             func(s *egress.Snapshot, _ *Facts) { delete(s.Nodes, "node-1") },
		"its agent restarts": func(s *egress.Snapshot, _ *Facts) {
			s.Agents["node-1"] = egress.Agent{Node: "node-1", Restarting: true}
		},
		"its uplink is down": func(_ *egress.Snapshot, f *Facts) { f.Uplink.Up = false },
		"somebody holds the IP": func(s *egress.Snapshot, _ *Facts) {
			s.Owners[ip("10.10.0.11")] = egress.Owner{IP: ip("10.10.0.11"), Node: "node-2"}
		},
		"it is full": func(s *egress.Snapshot, _ *Facts) {
			change(s, func(n *egress.Node) { n.Capacity = 1 })
			s.Egresses["older"] = egress.Policy{Name: "older", Addresses: []egress.Address{{IP: ip("10.10.1.1"), ID: 99, Pool: "pool"}}}
			s.Owners[ip("10.10.1.1")] = egress.Owner{IP: ip("10.10.1.1"), Node: "node-1"}
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			s, f := cluster(3, 1), facts("node-1")
			if got := claimed(s, f); len(got) != 1 {
				t.Fatalf("before: claims %v, want one", got)
			}
			prepare(s, &f)
			if got := claimed(s, f); len(got) != 0 {
				t.Errorf("claims %v, want none", got)
			}
		})
	}
}

func change(s *egress.Snapshot, f func(*egress.Node)) {
	n := s.Nodes["node-1"]
	f(&n)
	s.Nodes["node-1"] = n
}

func setSelector(s *egress.Snapshot, labels map[string]string) {
	p := s.Pools["pool"]
	p.NodeSelector.MatchLabels = labels
	s.Pools["pool"] = p
}

func TestThePreferredNodeIsFirstInRank(t *testing.T) {
	for i := 1; i <= 5; i++ {
		node := fmt.Sprintf("node-%d", i)
		s := cluster(5, 1)
		s.Pins[ip("10.10.0.11")] = egress.Pin{IP: ip("10.10.0.11"), Node: node}
		if got := claimed(s, facts(node)); got["10.10.0.11"] != 0 {
			t.Errorf("pinned to %s: rank %d there, want 0", node, got["10.10.0.11"])
		}
		delete(s.Pins, ip("10.10.0.11"))
		s.Moves[ip("10.10.0.11")] = egress.Move{IP: ip("10.10.0.11"), To: node}
		if got := claimed(s, facts(node)); got["10.10.0.11"] != 0 {
			t.Errorf("on the move to %s: rank %d there, want 0", node, got["10.10.0.11"])
		}
	}
}

func TestStaticIPIsClaimedWhereItIsOnALink(t *testing.T) {
	s := cluster(2, 0)
	s.Egresses["static"] = egress.Policy{Name: "static", Addresses: []egress.Address{{IP: ip("10.10.0.102"), ID: 7}}}
	f := facts("node-2")
	if got := New(s).Claims(f); len(got) != 0 {
		t.Errorf("not on a link: claims %v, want none", got)
	}
	f.Local = map[netip.Addr]bool{ip("10.10.0.102"): true}
	want := []Claim{{IP: ip("10.10.0.102"), Why: egress.ReasonStatic}}
	if diff := cmp.Diff(want, New(s).Claims(f), compare); diff != "" {
		t.Errorf("on a link: claims (-want +got):\n%s", diff)
	}
	s.Owners[ip("10.10.0.102")] = egress.Owner{IP: ip("10.10.0.102"), Node: "node-2"}
	if got := New(s).Releases(f); len(got) != 0 {
		t.Errorf("on a link: releases %v, want none", got)
	}
	f.Local = nil
	if got := New(s).Releases(f); len(got) != 1 {
		t.Errorf("gone from its link: releases %v, want it", got)
	}
}

func TestLoadIsSpreadWithinATenthOfTheMean(t *testing.T) {
	s := cluster(10, 1000)
	own(s)
	check := func(when string, nodes int) {
		t.Helper()
		load := map[string]int{}
		for _, o := range s.Owners {
			load[o.Node]++
		}
		mean := 1000 / float64(nodes)
		for node, n := range load {
			if off := math.Abs(float64(n)-mean) / mean; off > 0.1 {
				t.Errorf("%s: %s holds %d IPs, %.1f %% off the mean %.1f", when, node, n, 100*off, mean)
			}
		}
		t.Logf("%s: %v", when, slices.Sorted(maps.Values(load)))
	}
	check("at first", 10)
	before := maps.Clone(s.Owners)
	delete(s.Agents, "node-3")
	maps.DeleteFunc(s.Owners, func(_ netip.Addr, o egress.Owner) bool { return o.Node == "node-3" })
	own(s)
	check("after node-3 died", 9)
	for a, o := range before {
		if o.Node != "node-3" && s.Owners[a].Node != o.Node {
			t.Errorf("%s moved from %s to %s although its node is well", a, o.Node, s.Owners[a].Node)
		}
	}
}

// TestInvariant6EqualSnapshotsGiveEqualClaimsOnEveryNode builds the same snapshot in other orders, as other nodes'
// watches would, and asks on every node: exactly one is first in rank for each IP, and everybody agrees who is second.
func TestInvariant6EqualSnapshotsGiveEqualClaimsOnEveryNode(t *testing.T) {
	const nodes, ips = 7, 40
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ranks := map[netip.Addr]map[int]string{} // IP -> rank -> node
	for i := 1; i <= nodes; i++ {
		node := fmt.Sprintf("node-%d", i)
		s := shuffled(cluster(nodes, ips), r)
		for _, c := range New(s).Claims(facts(node)) {
			if ranks[c.IP] == nil {
				ranks[c.IP] = map[int]string{}
			}
			if other, taken := ranks[c.IP][c.Rank]; taken {
				t.Errorf("%s: both %s and %s have rank %d", c.IP, other, node, c.Rank)
			}
			ranks[c.IP][c.Rank] = node
		}
		if diff := cmp.Diff(New(s).Claims(facts(node)), New(shuffled(s, r)).Claims(facts(node)), compare); diff != "" {
			t.Errorf("%s: the claims depend on the order of maps:\n%s", node, diff)
		}
	}
	for a, by := range ranks {
		if len(by) != nodes {
			t.Errorf("%s: %d of %d ranks are taken: %v", a, len(by), nodes, by)
		}
	}
	if len(ranks) != ips {
		t.Errorf("%d of %d IPs are claimed", len(ranks), ips)
	}
}

// shuffled returns an equal snapshot whose maps were filled in another order.
func shuffled(s *egress.Snapshot, r *rand.Rand) *egress.Snapshot {
	out := *s
	out.Egresses, out.Nodes, out.Agents = refill(s.Egresses, r), refill(s.Nodes, r), refill(s.Agents, r)
	return &out
}

func refill[V any](m map[string]V, r *rand.Rand) map[string]V {
	keys := slices.Sorted(maps.Keys(m))
	r.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	out := map[string]V{}
	for _, k := range keys {
		out[k] = m[k]
	}
	return out
}

func TestReleases(t *testing.T) {
	a := ip("10.10.0.11")
	held := func() *egress.Snapshot {
		s := cluster(2, 1)
		s.Owners[a] = egress.Owner{IP: a, Node: "node-1", Revision: 5}
		return s
	}
	tests := map[string]struct {
		prepare func(*egress.Snapshot)
		want    int
	}{
		"a healthy owner keeps its IP":                       {func(*egress.Snapshot) {}, 0},
		"another node's lock is not ours to release":         {func(s *egress.Snapshot) { s.Owners[a] = egress.Owner{IP: a, Node: "node-2"}; clear(s.Egresses) }, 0},
		"the egress is gone":                                 {func(s *egress.Snapshot) { clear(s.Egresses) }, 1},
		"the pool is gone":                                   {func(s *egress.Snapshot) { clear(s.Pools) }, 1},
		"the pool selects other nodes":                       {func(s *egress.Snapshot) { setSelector(s, map[string]string{"a": "b"}) }, 1},
		"a cordoned node serves until its IP has moved":      {func(s *egress.Snapshot) { s.Cordons["node-1"] = egress.Cordon{} }, 0},
		"the uplink has no carrier":                          {func(*egress.Snapshot) {}, 1},
		"an egress that cannot be read is not one that went": {func(s *egress.Snapshot) { clear(s.Egresses); s.Faults = []egress.Fault{{Key: "egresses/x"}} }, 0},
		"a pool that cannot be read is not one that went":    {func(s *egress.Snapshot) { clear(s.Pools); s.Faults = []egress.Fault{{Key: "pools/pool"}} }, 0},
		"a node that cannot be read is not one that changed": {func(s *egress.Snapshot) { clear(s.Nodes); s.Faults = []egress.Fault{{Key: "nodes/node-1"}} }, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := held()
			tt.prepare(s)
			f := facts("node-1")
			f.Uplink.Up = name != "the uplink has no carrier"
			if got := New(s).Releases(f); len(got) != tt.want {
				t.Errorf("releases %v, want %d", got, tt.want)
			}
		})
	}
}

func TestNodeWithoutIPv6HasNothingToDoWithIPv6EgressIPs(t *testing.T) {
	a, v6 := ip("10.10.0.11"), ip("fd10::8")
	s := cluster(2, 1)
	p := s.Egresses["egress-0001"]
	p.Addresses = append(p.Addresses, egress.Address{IP: v6, ID: 2, Pool: "pool"})
	s.Egresses[p.Name] = p
	f := facts("node-1")
	f.Uplink.IPv6 = false
	if got := claimed(s, f); !maps.Equal(got, map[string]int{a.String(): claimed(s, facts("node-1"))[a.String()]}) {
		t.Errorf("claims %v, want only %s", got, a)
	}
	if got := claimed(s, facts("node-1")); len(got) != 2 {
		t.Errorf("with IPv6: claims %v, want both", got)
	}
	for _, held := range []netip.Addr{a, v6} {
		s.Owners[held] = egress.Owner{IP: held, Node: "node-1"}
	}
	if got := New(s).Releases(f); len(got) != 1 || got[0].IP != v6 {
		t.Errorf("releases %v, want only %s", got, v6)
	}
	for _, held := range []netip.Addr{a, v6} {
		s.Owners[held], s.Moves[held] = egress.Owner{IP: held, Node: "node-2"}, egress.Move{IP: held, To: "node-1"}
	}
	if got := New(s).Arrivals(f); len(got) != 1 || got[0].IP != a {
		t.Errorf("arrivals %v, want only %s", got, a)
	}
}

func TestMoves(t *testing.T) {
	a := ip("10.10.0.11")
	s := cluster(3, 1)
	s.Owners[a] = egress.Owner{IP: a, Node: "node-1", Revision: 5}
	s.Moves[a] = egress.Move{IP: a, To: "node-2", Revision: 6}
	if got := New(s).Arrivals(facts("node-2")); len(got) != 1 {
		t.Errorf("target: arrivals %v, want one", got)
	}
	if got := append(New(s).Arrivals(facts("node-1")), New(s).Arrivals(facts("node-3"))...); len(got) != 0 {
		t.Errorf("elsewhere: arrivals %v, want none", got)
	}
	if got := New(s).Departures(facts("node-1")); len(got) != 0 {
		t.Errorf("target not ready: departures %v, want none", got)
	}
	s.Moves[a] = egress.Move{IP: a, To: "node-2", Revision: 7, Ready: true}
	want := []Departure{{Owner: s.Owners[a], Move: s.Moves[a], To: s.Agents["node-2"]}}
	if diff := cmp.Diff(want, New(s).Departures(facts("node-1")), compare); diff != "" {
		t.Errorf("target ready: departures (-want +got):\n%s", diff)
	}
	s.Cordons["node-2"] = egress.Cordon{Node: "node-2"}
	if got := New(s).Arrivals(facts("node-2")); len(got) != 0 {
		t.Errorf("cordoned target: arrivals %v, want none", got)
	}
	if got := New(s).Departures(facts("node-1")); len(got) != 0 {
		t.Errorf("cordoned target: departures %v, want none", got)
	}
	delete(s.Cordons, "node-2")
	delete(s.Agents, "node-2")
	if got := New(s).Departures(facts("node-1")); len(got) != 0 {
		t.Errorf("dead target: departures %v, want none", got)
	}
}

// TestAStaticIPOnTwoNodesIsOwnedByOne follows a static IP that an administrator moves by hand, the new node first.
func TestAStaticIPOnTwoNodesIsOwnedByOne(t *testing.T) {
	a := ip("10.10.0.102")
	s := cluster(2, 0)
	s.Egresses["static"] = egress.Policy{Name: "static", Addresses: []egress.Address{{IP: a, ID: 7}}}
	on := func(node string, local bool) Facts {
		f := facts(node)
		f.Local = map[netip.Addr]bool{a: local}
		return f
	}
	for _, node := range []string{"node-1", "node-2"} { // the lock goes to the first that asks
		if got := New(s).Claims(on(node, true)); len(got) != 1 {
			t.Errorf("%s, free: claims %v, want one", node, got)
		}
	}
	s.Owners[a] = egress.Owner{IP: a, Node: "node-1"}
	if got := New(s).Claims(on("node-2", true)); len(got) != 0 {
		t.Errorf("held elsewhere: claims %v, want none", got)
	}
	if got := New(s).Releases(on("node-1", true)); len(got) != 0 {
		t.Errorf("on both: releases %v, want none", got)
	}
	if got := New(s).Releases(on("node-1", false)); len(got) != 1 {
		t.Errorf("gone from its holder: releases %v, want it", got)
	}
	delete(s.Owners, a)
	if got := append(New(s).Claims(on("node-1", false)), New(s).Claims(on("node-2", true))...); len(got) != 1 {
		t.Errorf("on the other node alone: claims %v, want one", got)
	}
}
