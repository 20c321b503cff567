package plan

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// withoutPodCIDRs returns guide's cluster, in which a node has no pod CIDRs, and what is known of its pods.
func withoutPodCIDRs(ranges map[string]egress.PodRanges) *egress.Snapshot {
	s := guide("node-2")
	n := s.Nodes["node-3"]
	n.PodCIDRs = nil
	s.Nodes["node-3"], s.Pods = n, ranges
	return s
}

func TestWithoutAWordOfANodesPodsNoFurtherPodIsProgrammed(t *testing.T) {
	cidr := []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10")}
	one := []netip.Prefix{netip.MustParsePrefix("100.64.0.7/32")}
	for name, tt := range map[string]struct {
		ranges  map[string]egress.PodRanges
		cluster []netip.Prefix
		except  []netip.Prefix // besides
		unknown []string
	}{
		"nothing is known":                        {nil, nil, nil, []string{"node-3"}},
		"of another node":                         {map[string]egress.PodRanges{"node-1": {Node: "node-1", CIDRs: one}}, nil, one, []string{"node-3"}},
		"crdsync has seen its pods":               {map[string]egress.PodRanges{"node-3": {Node: "node-3", CIDRs: one}}, nil, one, nil},
		"crdsync has seen that it has none":       {map[string]egress.PodRanges{"node-3": {Node: "node-3"}}, nil, nil, nil},
		"crdsync was told the cluster's ranges":   {map[string]egress.PodRanges{"-": {Node: "-", CIDRs: cidr}}, nil, cidr, nil},
		"the agent was told the cluster's ranges": {nil, cidr, cidr, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := facts("node-1")
			f.Cluster = tt.cluster
			d := Build(New(withoutPodCIDRs(tt.ranges)), f, nil)
			if pods := d.Keeping(nil).NFT.Pods; !slices.Equal(d.Unknown, tt.unknown) || d.NFT.Keep || (len(pods) == 0) != (tt.unknown != nil) {
				t.Errorf("unknown %v, keep %t, pods of an empty kernel %v; want unknown %v", d.Unknown, d.NFT.Keep, pods, tt.unknown)
			}
			for _, p := range tt.except {
				if !slices.Contains(d.NFT.Except, p) {
					t.Errorf("%v is not excepted: %v", p, d.NFT.Except)
				}
			}
		})
	}
	s := withoutPodCIDRs(nil)
	delete(s.ByNode, "egress-0001")
	if d := Build(New(s), facts("node-1"), nil); d.Unknown != nil || d.NFT.Keep {
		t.Errorf("a node without selected pods: unknown %v, keep %t", d.Unknown, d.NFT.Keep)
	}
}

// A pod that has ended, or that no egress selects any more, has no egress IP to leave to the next one of its address.
func TestWithoutAWordOfANodesPodsAPodThatIsNotSelectedIsTakenOut(t *testing.T) {
	s := withoutPodCIDRs(nil)
	stays, other, gone := ip("10.244.1.2"), ip("10.244.1.4"), ip("10.244.1.3")
	s.ByNode["egress-0001"] = egress.Members{Egress: "egress-0001", Node: "node-1", Pods: []egress.Member{{Pod: "prod/a", IPs: []netip.Addr{stays, other}}}}
	d := Build(New(s), facts("node-1"), nil)
	want := map[netip.Addr]egress.ID{stays: 1}
	if diff := cmp.Diff(want, d.Keeping(map[netip.Addr]egress.ID{stays: 1, gone: 1}).NFT.Pods, compare); diff != "" {
		t.Errorf("pods (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, d.Keeping(map[netip.Addr]egress.ID{stays: 7}).NFT.Pods, compare); diff != "" {
		t.Errorf("one that another egress had selected (-want +got):\n%s", diff)
	}
}

func TestNewPodsInNamedRangesAreDelayed(t *testing.T) {
	cidr, own := netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("100.80.0.0/16")
	f := facts("node-3")
	f.Cluster = []netip.Prefix{own}
	d := Build(New(withoutPodCIDRs(map[string]egress.PodRanges{"-": {Node: "-", CIDRs: []netip.Prefix{cidr}}})), f, nil)
	if want := []netip.Prefix{cidr, own}; !slices.Equal(d.NFT.PodCIDRs, want) {
		t.Errorf("held are sources of %v, want %v", d.NFT.PodCIDRs, want)
	}
}
