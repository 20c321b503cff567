package plan

import (
	"maps"
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
			out[n] = egress.Agent{Node: n, Lease: "lease-" + n, Revocable: true}
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
		{"whoever sees most dead is cut off itself", agents("a", "b", "c"), "a", "b", []string{"a", "c"}, nil, nil},
		{"of two halves that with the first name", agents("a", "b"), "b", "a", []string{"b"}, []string{"b"}, nil},
		{"and not the other", agents("a", "b"), "a", "b", []string{"a"}, nil, nil},
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
			s := known(&egress.Snapshot{Agents: tt.agents, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: tt.owner}}}, tt.gone...)
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

func TestDeathsSeenWhileCutOffSayNothing(t *testing.T) {
	s := known(&egress.Snapshot{Agents: map[string]egress.Agent{"a": {Node: "a"}, "b": {Node: "b"}, "c": {Node: "c"}}})
	var missed map[string]bool
	steps := []struct{ dead, want []string }{
		{[]string{"b"}, nil}, // the node sees two of three
		{[]string{"b", "c"}, []string{"b", "c"}},
		{[]string{"c"}, []string{"c"}}, // the gossip is coming back
		{nil, nil},
		{[]string{"c"}, nil},
	}
	for i, step := range steps {
		dead := func(n string) bool { return slices.Contains(step.dead, n) }
		missed = Missed(s, "a", Living(s, "a", dead) == nil, dead, missed)
		if got := slices.Sorted(maps.Keys(missed)); !slices.Equal(got, step.want) {
			t.Errorf("step %d: missed %v, want %v", i, got, step.want)
		}
	}
}

func TestEachRevokerHasARankOfItsOwn(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	s := &egress.Snapshot{Agents: map[string]egress.Agent{}, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "a"}}}
	for _, n := range []string{"a", "b", "c", "d"} {
		s.Agents[n] = egress.Agent{Node: n, Revocable: true}
	}
	known(s)
	var ranks []int
	for _, n := range []string{"b", "c", "d"} {
		dead := func(n string) bool { return n == "a" }
		for _, r := range Revocations(s, n, Living(s, n, dead), dead) {
			ranks = append(ranks, r.Rank)
		}
	}
	if slices.Sort(ranks); !slices.Equal(ranks, []int{0, 1, 2}) {
		t.Errorf("ranks %v", ranks)
	}
}
