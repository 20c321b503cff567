package crdsync

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

func byName(nodes ...egress.Node) map[string]egress.Node {
	out := map[string]egress.Node{}
	for _, n := range nodes {
		out[n.Name] = n
	}
	return out
}

func TestConditionsNameTheCause(t *testing.T) {
	pool := egress.Address{IP: ip("10.0.0.1"), ID: 1, Pool: "a"}
	gateway := egress.Pool{Name: "a", NodeSelector: egress.Selector{MatchLabels: map[string]string{"gw": "1"}}}
	nodes := []egress.Node{{Name: "n1", Labels: map[string]string{"gw": "1"}}, {Name: "n2"}}
	held := clusterState{Snapshot: egress.Snapshot{
		Owners: map[netip.Addr]egress.Owner{pool.IP: {IP: pool.IP, Node: "n1"}}, Pools: map[string]egress.Pool{"a": gateway}, Nodes: byName(nodes...),
	}}
	free := held
	free.Owners = nil
	alive := free
	alive.Agents = map[string]egress.Agent{"n1": {}, "n2": {}}
	cordoned := alive
	cordoned.Cordons = map[string]egress.Cordon{"n1": {}}
	full := alive
	full.Nodes, full.load = byName(egress.Node{Name: "n1", Labels: map[string]string{"gw": "1"}, Capacity: 3}), map[string]int{"n1": 3}
	nobody := alive
	nobody.Nodes = byName(nodes[1:]...)
	each := clusterState{load: map[string]int{"n6": 3}, Snapshot: egress.Snapshot{
		Pools: map[string]egress.Pool{"a": {Name: "a"}}, Cordons: map[string]egress.Cordon{"n5": {}},
		Agents: map[string]egress.Agent{"n5": {}, "n6": {}, "n7": {Refused: map[string]string{"a": "link x has VLAN 7"}}, "n8": {}, "n9": {Restarting: true}},
		Nodes: byName(egress.Node{Name: "n1"}, egress.Node{Name: "n2"}, egress.Node{Name: "n3"}, egress.Node{Name: "n4"}, egress.Node{Name: "n5"},
			egress.Node{Name: "n6", Capacity: 3}, egress.Node{Name: "n7"}, egress.Node{Name: "n8", Cordoned: true}, egress.Node{Name: "n9"}),
	}}
	const allocated = "True Allocated 10.0.0.1 is of pool a"
	static := egress.Address{IP: ip("10.0.0.9"), ID: 2}
	refused := errors.Join(errors.New("one"), errors.New("two"))
	tests := map[string]struct {
		address egress.Address
		err     error
		cluster clusterState
		want    string // what IPAllocated says | what IPAssigned says
	}{
		"held":             {pool, nil, held, allocated + " | True Assigned 10.0.0.1 is on node n1"},
		"in a moment":      {pool, nil, alive, allocated + " | False AssignmentError no node holds 10.0.0.1 yet: 1 node could"},
		"no node selected": {pool, nil, nobody, allocated + " | False AssignmentError no node holds 10.0.0.1: pool a selects no node"},
		"no agent":         {pool, nil, free, allocated + " | False AssignmentError no node holds 10.0.0.1: pool a selects 1 node; without a live agent: n1"},
		"cordoned":         {pool, nil, cordoned, allocated + " | False AssignmentError no node holds 10.0.0.1: pool a selects 1 node; cordoned: n1"},
		"each for a reason of its own": {pool, nil, each, allocated + " | False AssignmentError no node holds 10.0.0.1: pool a selects 9 nodes; " +
			"refused by n7: link x has VLAN 7; without a live agent: n1, n2, n3, and 1 more; cordoned: n5, n8; with an agent that restarts: n9; without room, see egret get nodes: n6"},
		"no room": {pool, nil, full, allocated + " | False AssignmentError no node holds 10.0.0.1: pool a selects 1 node; without room, see egret get nodes: n1"},
		"refused": {egress.Address{}, refused, held, "False AllocationError one; two | False AssignmentError no egress IP is allocated"},
		"static": {static, nil, held,
			"True Allocated 10.0.0.9 is a static egress IP | False AssignmentError no node with a live agent has 10.0.0.9 on an interface"},
	}
	for name, tt := range tests {
		v := verdict{err: tt.err}
		wantIP, wantNode := "", tt.cluster.Owners[tt.address.IP].Node
		if tt.address.IP.IsValid() {
			v.addresses, wantIP = []egress.Address{tt.address}, tt.address.IP.String()
		}
		got := egressStatus(v1beta1.EgressStatus{}, v, tt.cluster, time.Unix(100, 0))
		if got.EgressIP != wantIP || got.EgressNode != wantNode {
			t.Errorf("%s: IP %q on node %q, want %q on %q", name, got.EgressIP, got.EgressNode, wantIP, wantNode)
		}
		var said []string
		for _, c := range got.Conditions {
			said = append(said, fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message))
		}
		if d := cmp.Diff(tt.want, strings.Join(said, " | ")); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestAnEgressWithTooFewPortsIsDegraded(t *testing.T) {
	faulty := clusterState{
		Snapshot: egress.Snapshot{Agents: map[string]egress.Agent{"n1": {Faults: map[string]string{"routes": "none"}}}},
		faulty:   map[string][]string{"a": {"n1"}},
	}
	for name, tt := range map[string]struct {
		cluster clusterState
		ports   string
		want    string
	}{
		"enough":               {clusterState{}, "", ""},
		"too few":              {clusterState{}, "node n1 has no ports", "PortsExhausted: node n1 has no ports"},
		"and what weighs more": {faulty, "node n1 has no ports", "ProgrammingError: node n1: routes: none; node n1 has no ports"},
	} {
		got := ""
		if c, ok := tt.cluster.degraded(verdict{name: "a", ports: tt.ports}); ok {
			got = c.Reason + ": " + c.Message
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func TestTheMessageNamesAFewOfTheNodesWithTooFewPorts(t *testing.T) {
	b := newBlocks(64)
	for i := range 5 {
		b.short[fmt.Sprintf("n%d", i)] = map[netip.Addr]shortage{ip("10.0.0.1"): {"a", "p", 0, 64}, ip(fmt.Sprintf("10.0.1.%d", i)): {"b", "p", 64, 128}}
	}
	p := b.pressure()
	if got := p.egresses["a"]; strings.Count(got, ";") != 3 || !strings.HasPrefix(got, "node n0 has no ports of 10.0.0.1") || !strings.HasSuffix(got, "; and 2 more") {
		t.Errorf("egress a: %q", got)
	}
	if got := p.egresses["b"]; !strings.HasPrefix(got, "node n0 has 64 ports of 10.0.1.0 and asks for a block of 128") {
		t.Errorf("egress b: %q", got)
	}
	if got := p.pools["p"]; !strings.HasSuffix(got, "at 10.0.0.1, 10.0.1.0, 10.0.1.1, 3 more") {
		t.Errorf("pool: %q", got)
	}
}

func TestTransitionTimesChangeOnlyWithTheStatus(t *testing.T) {
	early, late := time.Unix(100, 5), time.Unix(200, 5)
	v := verdict{addresses: []egress.Address{{IP: ip("10.0.0.1"), ID: 1}}}
	first := egressStatus(v1beta1.EgressStatus{}, v, clusterState{}, early)
	second := egressStatus(first, v, clusterState{}, late)
	if !equalStatus(first, second) {
		t.Errorf("nothing happened (-want +got):\n%s", cmp.Diff(first, second))
	}
	v.generation = 2
	owned := clusterState{Snapshot: egress.Snapshot{Owners: map[netip.Addr]egress.Owner{ip("10.0.0.1"): {Node: "n1"}}}}
	third := egressStatus(second, v, owned, late)
	if equalStatus(second, third) {
		t.Error("the status is the same after the IP got an owner")
	}
	want := []metav1.Time{metav1.Unix(100, 0), metav1.Unix(200, 0)}
	if got := []metav1.Time{third.Conditions[0].LastTransitionTime, third.Conditions[1].LastTransitionTime}; !cmp.Equal(want, got) {
		t.Errorf("times (-want +got):\n%s", cmp.Diff(want, got))
	}
}
