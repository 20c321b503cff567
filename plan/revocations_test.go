package plan

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

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
	}{
		{"a dead owner", agents("a", "b", "c"), "a", "b", []string{"a"}, []string{"a"}},
		{"a dead node without an IP is let be", agents("a", "b", "c"), "b", "b", []string{"a"}, nil},
		{"whoever sees most dead is cut off itself", agents("a", "b", "c"), "a", "b", []string{"a", "c"}, nil},
		{"of two halves that with the first name", agents("a", "b"), "b", "a", []string{"b"}, []string{"b"}},
		{"and not the other", agents("a", "b"), "a", "b", []string{"a"}, nil},
		{"one whose permits have no bound", with(agents("b", "c"), egress.Agent{Node: "a"}), "a", "b", []string{"a"}, nil},
		{"one that is told to stop", with(agents("b", "c"), egress.Agent{Node: "a", Revocable: true, Restarting: true}), "a", "b", []string{"a"}, nil},
		{"not by an agent without a record", agents("a", "b", "c"), "a", "d", []string{"a"}, nil},
		{"never oneself", agents("a", "b", "c"), "b", "b", []string{"b"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ip := netip.MustParseAddr("10.0.0.1")
			s := &egress.Snapshot{Agents: tt.agents, Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: tt.owner}}}
			var got []string
			for _, r := range Revocations(s, tt.node, func(n string) bool { return slices.Contains(tt.dead, n) }) {
				got = append(got, r.Agent.Node)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestDeathsSeenWhileCutOffSayNothing(t *testing.T) {
	s := &egress.Snapshot{Agents: map[string]egress.Agent{"a": {Node: "a"}, "b": {Node: "b"}, "c": {Node: "c"}}}
	var missed map[string]bool
	steps := []struct{ dead, want []string }{
		{[]string{"b"}, nil}, // the node sees two of three
		{[]string{"b", "c"}, []string{"b", "c"}},
		{[]string{"c"}, []string{"c"}}, // the gossip is coming back
		{nil, nil},
		{[]string{"c"}, nil},
	}
	for i, step := range steps {
		missed = Missed(s, "a", func(n string) bool { return slices.Contains(step.dead, n) }, missed)
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
	var ranks []int
	for _, n := range []string{"b", "c", "d"} {
		for _, r := range Revocations(s, n, func(n string) bool { return n == "a" }) {
			ranks = append(ranks, r.Rank)
		}
	}
	if slices.Sort(ranks); !slices.Equal(ranks, []int{0, 1, 2}) {
		t.Errorf("ranks %v", ranks)
	}
}
