package plan

import (
	"net/netip"
	"testing"

	"github.com/egret-project/egret/egress"
)

func TestABystanderHoldsNothingAndCanGetNothing(t *testing.T) {
	pooled, static := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.9")
	for _, tt := range []struct {
		name   string
		change func(*egress.Snapshot, *Facts)
		want   bool
	}{
		{"no pool selects it", func(*egress.Snapshot, *Facts) {}, true},
		{"a pool selects it", func(s *egress.Snapshot, _ *Facts) {
			s.Nodes["a"] = egress.Node{Name: "a", Labels: map[string]string{"gateway": ""}}
		}, false},
		{"a pool selects all", func(s *egress.Snapshot, _ *Facts) { s.Pools["all"] = egress.Pool{Name: "all"} }, false},
		{"it has no record", func(s *egress.Snapshot, _ *Facts) { delete(s.Nodes, "a") }, false},
		{"a static IP is on a link of it", func(_ *egress.Snapshot, f *Facts) { f.Local = map[netip.Addr]bool{static: true} }, false},
		{"another address is", func(_ *egress.Snapshot, f *Facts) {
			f.Local = map[netip.Addr]bool{netip.MustParseAddr("10.0.0.7"): true}
		}, true},
		{"it holds an IP", func(s *egress.Snapshot, _ *Facts) { s.Owners[pooled] = egress.Owner{IP: pooled, Node: "a"} }, false},
		{"it holds an IP under a former lease", func(s *egress.Snapshot, _ *Facts) { s.Owners[pooled] = egress.Owner{IP: pooled, Node: "a", Lease: 7} }, false},
		{"another holds it", func(s *egress.Snapshot, _ *Facts) { s.Owners[pooled] = egress.Owner{IP: pooled, Node: "b"} }, true},
		{"an IP is to come", func(s *egress.Snapshot, _ *Facts) { s.Moves[pooled] = egress.Move{IP: pooled, To: "a"} }, false},
		{"an IP is to go elsewhere", func(s *egress.Snapshot, _ *Facts) { s.Moves[pooled] = egress.Move{IP: pooled, To: "b"} }, true},
		{"a pool cannot be read", func(s *egress.Snapshot, _ *Facts) { s.Faults = []egress.Fault{{Key: "pools/p"}} }, false},
		{"an owner cannot be read", func(s *egress.Snapshot, _ *Facts) { s.Faults = []egress.Fault{{Key: "owners/10.0.0.1"}} }, false},
	} {
		s := &egress.Snapshot{
			Pools: map[string]egress.Pool{"p": {Name: "p", NodeSelector: egress.Selector{MatchExpressions: []egress.Requirement{{Key: "gateway", Operator: "Exists"}}}}},
			Egresses: map[string]egress.Policy{
				"pooled": {Name: "pooled", Addresses: []egress.Address{{IP: pooled, ID: 1, Pool: "p"}}},
				"static": {Name: "static", Addresses: []egress.Address{{IP: static, ID: 2}}},
			},
			Nodes:  map[string]egress.Node{"a": {Name: "a"}, "b": {Name: "b"}},
			Owners: map[netip.Addr]egress.Owner{}, Moves: map[netip.Addr]egress.Move{},
		}
		f := Facts{Node: "a"}
		tt.change(s, &f)
		if got := New(s).Bystander(f); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}
