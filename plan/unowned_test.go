package plan

import (
	"net/netip"
	"testing"

	"github.com/egret-project/egret/egress"
)

func TestUnownedNamesEachNodesReasonOnce(t *testing.T) {
	a := egress.Address{IP: netip.MustParseAddr("10.0.0.1"), Pool: "p"}
	s := &egress.Snapshot{
		Pools:   map[string]egress.Pool{"p": {Name: "p"}},
		Nodes:   map[string]egress.Node{"n1": {}, "n2": {}, "n3": {}, "n4": {Capacity: 3}, "n5": {Capacity: 3}},
		Agents:  map[string]egress.Agent{"n1": {Refused: map[string]string{"p": "link x has VLAN 7"}}, "n3": {}, "n4": {Restarting: true}, "n5": {}},
		Cordons: map[string]egress.Cordon{"n3": {}},
	}
	held := func(node string) int { return map[string]int{"n4": 2, "n5": 3}[node] }
	const want = "no node holds 10.0.0.1: pool p selects 5 nodes; refused by n1: link x has VLAN 7; without a live agent: n2; cordoned: n3; " +
		"with an agent that restarts: n4; without room, see egret get nodes: n5"
	if got := Unowned(s, a, held); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	s.Agents["n4"] = egress.Agent{}
	if got, want := Unowned(s, a, held), "no node holds 10.0.0.1 yet: 1 node could"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, node := range []string{"n4", "n3"} {
		s.Agents[node] = egress.Agent{Conflicts: map[netip.Addr]string{a.IP: "02:00:00:00:00:09 on link eth0", a.IP.Next(): "another"}}
	}
	if got, want := Unowned(s, a, held), "no node holds 10.0.0.1: another host uses it, 02:00:00:00:00:09 on link eth0 of node n3"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
