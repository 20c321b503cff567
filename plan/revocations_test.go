package plan

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// known gives each agent's node a record, but for those that are gone.
func known(s *egress.Snapshot, gone ...string) *egress.Snapshot {
	s.Nodes = map[string]egress.Node{}
	for n := range s.Agents {
		if !slices.Contains(gone, n) {
			s.Nodes[n] = egress.Node{Name: n}
		}
	}
	return s
}

func TestRevocations(t *testing.T) {
	agents := func(names ...string) map[string]egress.Agent {
		out := map[string]egress.Agent{}
		for _, n := range names {
			out[n] = egress.Agent{Node: n, Lease: "lease-" + n, Revocable: true, Suspectable: true}
		}
		return out
	}
	with := func(m map[string]egress.Agent, a egress.Agent) map[string]egress.Agent {
		m[a.Node] = a
		return m
	}
	tests := []struct {
		name   string
		agents map[string]egress.Agent
		owner  string
		node   string
		dead   []string
		want   []string
		gone   []string // nodes without a record
	}{
		{"a dead owner", agents("a", "b", "c"), "a", "b", []string{"a"}, []string{"a"}, nil},
		{"a dead node without an IP is let be", agents("a", "b", "c"), "b", "b", []string{"a"}, nil, nil},
		{"also by a node that may be cut off itself", agents("a", "b", "c"), "a", "b", []string{"a", "c"}, []string{"a"}, nil},
		{"of two, by the first", agents("a", "b"), "b", "a", []string{"b"}, []string{"b"}, nil},
		{"and by the other", agents("a", "b"), "a", "b", []string{"a"}, []string{"a"}, nil},
		{"one that does not end suspicions", with(agents("b", "c"), egress.Agent{Node: "a", Revocable: true}), "a", "b", []string{"a"}, nil, nil},
		{"whose node is gone", with(agents("b", "c"), egress.Agent{Node: "a", Revocable: true}), "a", "b", []string{"a"}, []string{"a"}, []string{"a"}},
		{"one whose permits have no bound", with(agents("b", "c"), egress.Agent{Node: "a"}), "a", "b", []string{"a"}, nil, nil},
		{"one that is told to stop", with(agents("b", "c"), egress.Agent{Node: "a", Revocable: true, Restarting: true}), "a", "b", []string{"a"}, nil, nil},
		{"not by an agent without a record", agents("a", "b", "c"), "a", "d", []string{"a"}, nil, nil},
		{"never oneself", agents("a", "b", "c"), "b", "b", []string{"b"}, nil, nil},
		{"one whose node is gone, alive or not", agents("a", "b", "c"), "a", "b", nil, []string{"a"}, []string{"a"}},
		{"whose permits have no bound", with(agents("b", "c"), egress.Agent{Node: "a"}), "a", "b", nil, nil, []string{"a"}},
		{"whose kernel serves on without it", with(agents("b", "c"), egress.Agent{Node: "a", Revocable: true, Restarting: true}), "a", "b", nil, nil, []string{"a"}},
		{"not by an agent whose own node is gone", agents("a", "b", "c"), "a", "b", []string{"a"}, nil, []string{"b"}},
		{"nodes that are gone count as neither", agents("a", "b", "c", "d", "e"), "a", "b", []string{"a", "d", "e"}, []string{"a"}, []string{"a", "d", "e"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ip := netip.MustParseAddr("10.0.0.1")
			s := known(&egress.Snapshot{Pools: map[string]egress.Pool{"p": {Name: "p"}}, Agents: tt.agents, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: tt.owner}}}, tt.gone...)
			var got []string
			dead := func(n string) bool { return slices.Contains(tt.dead, n) }
			for _, r := range Revocations(s, tt.node, Living(s, tt.node, dead), dead) {
				got = append(got, r.Agent.Node)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestEachRevokerHasARankOfItsOwn(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	s := &egress.Snapshot{Pools: map[string]egress.Pool{"p": {Name: "p"}}, Agents: map[string]egress.Agent{}, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "a"}}}
	for _, n := range []string{"a", "b", "c", "d"} {
		s.Agents[n] = egress.Agent{Node: n, Revocable: true, Suspectable: true}
	}
	known(s)
	for _, tt := range []struct {
		name string
		dead func(node, peer string) bool
	}{
		{"it is dead", func(_, peer string) bool { return peer == "a" }},
		{"nobody hears anybody", func(node, peer string) bool { return node != peer }},
	} {
		var ranks []int
		for _, n := range []string{"b", "c", "d"} {
			dead := func(peer string) bool { return tt.dead(n, peer) }
			for _, r := range Revocations(s, n, Living(s, n, dead), dead) {
				ranks = append(ranks, r.Rank)
			}
		}
		if slices.Sort(ranks); !slices.Equal(ranks, []int{0, 1, 2}) {
			t.Errorf("%s: ranks %v", tt.name, ranks)
		}
	}
}
