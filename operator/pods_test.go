package operator

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
)

func TestTheCheckReportsHowPodsAreKnownFromTheOutside(t *testing.T) {
	cidr := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	one := []netip.Prefix{netip.MustParsePrefix("100.64.0.1/32")}
	nodes := func(second ...netip.Prefix) map[string]egress.Node {
		return map[string]egress.Node{"node-1": {Name: "node-1", PodCIDRs: cidr}, "node-2": {Name: "node-2", PodCIDRs: second}}
	}
	for name, tt := range map[string]struct {
		s     egress.Snapshot
		level check.Level
		found string
	}{
		"by podCIDRs":     {egress.Snapshot{Nodes: nodes(cidr...)}, check.OK, "podCIDRs of 2 nodes"},
		"by nothing":      {egress.Snapshot{Nodes: nodes()}, check.Warning, "node-2: no spec.podCIDRs, and no record of crdsync"},
		"by the pods":     {egress.Snapshot{Nodes: nodes(), Pods: map[string]egress.PodRanges{"node-2": {CIDRs: one}}}, check.Warning, "1 of 2 nodes without spec.podCIDRs; crdsync has written down 1 ranges"},
		"beside podCIDRs": {egress.Snapshot{Nodes: nodes(cidr...), Pods: map[string]egress.PodRanges{"node-1": {CIDRs: one}}}, check.Warning, "0 of 2 nodes without"},
		"by name":         {egress.Snapshot{Nodes: nodes(), Pods: map[string]egress.PodRanges{"-": {CIDRs: cidr}}}, check.OK, "10.244.1.0/24] by --cluster-cidrs"},
	} {
		f := podRanges(check.Finding{Level: check.OK}, tt.s)
		if f.Level != tt.level || !strings.Contains(f.Found, tt.found) || (f.Consequence == "") != (tt.level == check.OK) {
			t.Errorf("%s: %+v, want %s, %q", name, f, tt.level, tt.found)
		}
	}
}
