package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// leaving returns the IP that a node gives away next, and to whom; "" : none.
func leaving(s *egress.Snapshot, node string) (ip string, to []string) {
	o, to := New(s).Leaving(facts(node))
	if len(to) == 0 {
		return "", nil
	}
	return o.IP.String(), to
}

func capacity(s *egress.Snapshot, node string, limit int) {
	n := s.Nodes[node]
	n.Capacity = limit
	s.Nodes[node] = n
}

// holds gives IPs to a node, counted from the oldest egress.
func hold(s *egress.Snapshot, node string, numbers ...int) {
	for _, i := range numbers {
		a := s.Egresses[fmt.Sprintf("egress-%04d", i)].Addresses[0].IP
		s.Owners[a] = egress.Owner{IP: a, Node: node, Revision: int64(i)}
	}
}

func TestACordonedNodeGivesItsIPsAwayOneAtATime(t *testing.T) {
	s := cluster(3, 3)
	hold(s, "node-1", 1, 2, 3)
	if ip, to := leaving(s, "node-1"); ip != "" {
		t.Errorf("not cordoned: %s leaves to %v", ip, to)
	}
	s.Cordons["node-1"] = egress.Cordon{Node: "node-1"}
	got, to := leaving(s, "node-1")
	slices.Sort(to)
	if diff := cmp.Diff([]string{"node-2", "node-3"}, to); got != "10.10.0.11" || diff != "" {
		t.Errorf("%s leaves first, want that of the oldest egress; to (-want +got):\n%s", got, diff)
	}
	if got, _ := leaving(s, "node-2"); got != "" {
		t.Errorf("%s leaves another node", got)
	}
	s.Moves[ip("10.10.0.11")] = egress.Move{IP: ip("10.10.0.11"), To: "node-2"}
	if got, _ := leaving(s, "node-1"); got != "" {
		t.Errorf("%s leaves while another is on its way", got)
	}
	delete(s.Moves, ip("10.10.0.11"))
	change(s, func(n *egress.Node) { n.Cordoned = true })
	delete(s.Cordons, "node-1")
	if got, _ := leaving(s, "node-1"); got != "10.10.0.11" {
		t.Errorf("cordoned in Kubernetes: %q leaves, want the first", got)
	}
}

func TestADrainFillsNobodyBeyondItsCapacityAndStaysWithinTheShare(t *testing.T) {
	s := cluster(4, 120)
	own(s)
	capacity(s, "node-2", 30)
	capacity(s, "node-3", 35)
	s.Cordons["node-1"] = egress.Cordon{Node: "node-1"}
	others := map[netip.Addr]string{}
	for a, o := range s.Owners {
		if o.Node != "node-1" {
			others[a] = o.Node
		}
	}
	for range 120 {
		o, to := New(s).Leaving(facts("node-1"))
		if len(to) == 0 {
			break
		}
		s.Owners[o.IP] = egress.Owner{IP: o.IP, Node: to[0]}
	}
	for a, node := range others {
		if s.Owners[a].Node != node {
			t.Errorf("%s moved from %s, which is well", a, node)
		}
	}
	if n := New(s).Owned("node-1"); n != 0 {
		t.Errorf("%d IPs are left", n)
	}
	if n2, n3 := New(s).Owned("node-2"), New(s).Owned("node-3"); n2 > 30 && n2 > countOf(others, "node-2") || n3 > 35 && n3 > countOf(others, "node-3") {
		t.Errorf("node-2 holds %d of 30, node-3 %d of 35", n2, n3)
	}
}

func countOf(m map[netip.Addr]string, node string) int {
	n := 0
	for v := range maps.Values(m) {
		if v == node {
			n++
		}
	}
	return n
}

func TestWhatNobodyCanTakeStaysInServiceUntilThereIsCapacity(t *testing.T) {
	s := cluster(2, 2)
	hold(s, "node-1", 1)
	hold(s, "node-2", 2)
	capacity(s, "node-2", 1)
	s.Cordons["node-1"] = egress.Cordon{Node: "node-1"}
	if got, to := leaving(s, "node-1"); got != "" {
		t.Errorf("%s leaves to %v, which is full", got, to)
	}
	if got := New(s).Releases(facts("node-1")); len(got) != 0 {
		t.Errorf("releases %v, want none", got)
	}
	delete(s.Owners, ip("10.10.0.12"))
	delete(s.Egresses, "egress-0002")
	if got, _ := leaving(s, "node-1"); got != "10.10.0.11" {
		t.Errorf("with room: %q leaves, want the IP", got)
	}
}

func TestATargetTakesNoMoreThanItsCapacityWhoeverAsks(t *testing.T) {
	s := cluster(3, 4)
	hold(s, "node-1", 1, 2)
	hold(s, "node-2", 3)
	hold(s, "node-3", 4)
	capacity(s, "node-3", 2)
	now := time.Unix(1000, 0)
	for i, a := range []string{"10.10.0.11", "10.10.0.13"} {
		s.Moves[ip(a)] = egress.Move{IP: ip(a), To: "node-3", Since: now.Add(-time.Duration(i) * time.Second)}
	}
	arrivals := func() (out []string) {
		for _, m := range New(s).Arrivals(facts("node-3")) {
			out = append(out, m.IP.String())
		}
		return out
	}
	if diff := cmp.Diff([]string{"10.10.0.13"}, arrivals()); diff != "" {
		t.Errorf("the earlier request first (-want +got):\n%s", diff)
	}
	ready := s.Moves[ip("10.10.0.11")]
	ready.Ready = true
	s.Moves[ip("10.10.0.11")] = ready
	if diff := cmp.Diff([]string{"10.10.0.11"}, arrivals()); diff != "" {
		t.Errorf("what it was ready for first (-want +got):\n%s", diff)
	}
	forced := s.Moves[ip("10.10.0.13")]
	forced.Force = true
	s.Moves[ip("10.10.0.13")] = forced
	if diff := cmp.Diff([]string{"10.10.0.11", "10.10.0.13"}, arrivals()); diff != "" {
		t.Errorf("what the operator forces on it too (-want +got):\n%s", diff)
	}
}

func TestWhenCapacityIsShortOlderEgressesGoFirstAndTheOthersWait(t *testing.T) {
	s := cluster(2, 5)
	capacity(s, "node-1", 2)
	capacity(s, "node-2", 1)
	taken := map[string]string{}
	settle := func() {
		for _, node := range []string{"node-1", "node-2"} {
			for _, c := range New(s).Claims(facts(node)) {
				if c.Rank == 0 {
					taken[c.IP.String()] = node
				}
			}
		}
		for a, node := range taken {
			s.Owners[ip(a)] = egress.Owner{IP: ip(a), Node: node}
		}
	}
	settle()
	if diff := cmp.Diff([]string{"10.10.0.11", "10.10.0.12", "10.10.0.13"}, slices.Sorted(maps.Keys(taken))); diff != "" {
		t.Errorf("held (-want +got):\n%s", diff)
	}
	capacity(s, "node-2", 2) // as the watch tells: the very next pass claims
	settle()
	if taken["10.10.0.14"] != "node-2" || taken["10.10.0.15"] != "" {
		t.Errorf("with room for one more: %v, want 10.10.0.14 on node-2", taken)
	}
}

func TestANodeThatStepsInForAnotherClaimsNoMoreThanItsCapacity(t *testing.T) {
	s := cluster(2, 6)
	for a := range New(s).rank() {
		s.Pins[a] = egress.Pin{IP: a, Node: "node-2"} // node-2 is first for all, lives, and does not claim
	}
	capacity(s, "node-1", 2)
	want := []Claim{{IP: ip("10.10.0.11"), Why: egress.ReasonClaim, Rank: 1, Link: "eth0"}, {IP: ip("10.10.0.12"), Why: egress.ReasonClaim, Rank: 1, Link: "eth0"}}
	if diff := cmp.Diff(want, New(s).Claims(facts("node-1")), compare); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
}

func TestRebalancingBringsIPsBackOneAtATime(t *testing.T) {
	s := cluster(4, 40)
	own(s)
	at := maps.Clone(s.Owners)
	if got := New(s).Misplacements(); len(got) != 0 {
		t.Fatalf("at first: misplaced %v, want none", got)
	}
	agent := s.Agents["node-4"]
	delete(s.Agents, "node-4")
	maps.DeleteFunc(s.Owners, func(_ netip.Addr, o egress.Owner) bool { return o.Node == "node-4" })
	own(s)
	s.Agents["node-4"] = agent
	misplaced := New(s).Misplacements()
	if len(misplaced) == 0 {
		t.Fatal("after node-4 was away: nothing is misplaced")
	}
	m, ok := New(s).Rebalance(misplaced)
	if !ok {
		t.Fatal("nothing to move")
	}
	s.Moves[m.Owner.IP] = egress.Move{IP: m.Owner.IP, To: m.To}
	if m, ok := New(s).Rebalance(misplaced); ok {
		t.Errorf("a second one moves at the same time: %v", m)
	}
	clear(s.Moves)
	lost := s.Owners[m.Owner.IP]
	delete(s.Owners, m.Owner.IP)
	if m, ok := New(s).Rebalance(misplaced); ok {
		t.Errorf("one moves while another has no owner: %v", m)
	}
	s.Owners[m.Owner.IP] = lost
	moved := 0
	for ; ; moved++ {
		m, ok := New(s).Rebalance(New(s).Misplacements())
		if !ok || moved > 40 {
			break
		}
		s.Owners[m.Owner.IP] = egress.Owner{IP: m.Owner.IP, Node: m.To}
	}
	if diff := cmp.Diff(at, s.Owners, compare); diff != "" {
		t.Errorf("after %d moves (-at first +now):\n%s", moved, diff)
	}
}

func TestOneMoreEgressMovesNoOther(t *testing.T) {
	for _, n := range []int{9, 19, 99, 109, 199, 200, 999} {
		s := cluster(10, n)
		own(s)
		s.Egresses = cluster(10, n+1).Egresses
		own(s)
		if got := New(s).Misplacements(); len(got) != 0 {
			t.Errorf("%d IPs on 10 nodes, and one more: %d are misplaced, want none", n, len(got))
		}
	}
}

func TestRebalancingRespectsPinsCordonsAndCapacity(t *testing.T) {
	s := cluster(2, 1)
	hold(s, "node-1", 1)
	a := ip("10.10.0.11")
	s.Pins[a] = egress.Pin{IP: a, Node: "node-2"}
	want := []Misplaced{{Owner: s.Owners[a], To: "node-2"}}
	if diff := cmp.Diff(want, New(s).Misplacements(), compare); diff != "" {
		t.Errorf("pinned elsewhere (-want +got):\n%s", diff)
	}
	s.Cordons["node-2"] = egress.Cordon{Node: "node-2"}
	if got := New(s).Misplacements(); len(got) != 0 {
		t.Errorf("pinned to a cordoned node: %v, want none", got)
	}
	s = cluster(2, 2)
	hold(s, "node-1", 1)
	hold(s, "node-2", 2)
	s.Pins[a] = egress.Pin{IP: a, Node: "node-2"}
	capacity(s, "node-2", 1)
	if m, ok := New(s).Rebalance(New(s).Misplacements()); ok {
		t.Errorf("to a full node: %v", m)
	}
}
