package plan

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
)

var egressIP = ip("10.10.0.11")

// guide returns three nodes, and one egress with id 1 that selects a pod on each of node-1 and node-2, held by owner
// ("": nobody).
func guide(owner string) *egress.Snapshot {
	s := cluster(3, 1)
	pod := func(node, name, a string) egress.Members {
		return egress.Members{Egress: "egress-0001", Node: node, Pods: []egress.Member{{Pod: name, IPs: []netip.Addr{ip(a), ip("fd44::1")}}}}
	}
	one, two := pod("node-1", "prod/a", "10.244.1.2"), pod("node-2", "prod/b", "10.244.2.2")
	s.ByNode["egress-0001"] = one
	s.ByNode[egress.Unselected] = egress.Members{Node: "node-1", Pods: []egress.Member{{Pod: "prod/db", IPs: []netip.Addr{ip("10.244.1.3")}}}}
	s.ByEgress["egress-0001"] = map[string]egress.Members{"node-1": one, "node-2": two}
	if owner != "" {
		s.Owners[egressIP] = egress.Owner{IP: egressIP, Node: owner, Revision: 9}
	}
	return s
}

func TestBandwidthOfAnEgressIPIsInBytesAndTheLowestOfItsEgresses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits []*egress.Bandwidth
		want   nft.Limit
	}{
		{"no limit", []*egress.Bandwidth{nil, nil}, nft.Limit{}},
		{"one limit", []*egress.Bandwidth{nil, {Rate: 800e6, Burst: 2e9}}, nft.Limit{Rate: 100e6, Burst: 250e6}},
		{"two limits", []*egress.Bandwidth{{Rate: 8e6, Burst: 8e9}, {Rate: 800e6, Burst: 2e9}}, nft.Limit{Rate: 1e6, Burst: 1e9}},
		{"less than a byte per second", []*egress.Bandwidth{{Rate: 7, Burst: 7}}, nft.Limit{Rate: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := guide("node-1")
			for i, b := range tt.limits {
				p := s.Egresses["egress-0001"]
				p.Name, p.Bandwidth = fmt.Sprint("egress-", i), b
				s.Egresses[p.Name] = p
			}
			delete(s.Egresses, "egress-0001")
			for role, want := range map[Role]nft.Limit{Own: tt.want, Relay: tt.want, Pending: {}} {
				if got := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: role}).NFT.Hosted[1].Limit; got != want {
					t.Errorf("role %d: %+v, want %+v", role, got, want)
				}
			}
		})
	}
}

func TestBuildSteersSelectedPods(t *testing.T) {
	type want struct {
		pods     map[netip.Addr]egress.ID
		next     map[egress.ID]egress.Mark
		gateways map[egress.ID]int
		sources  map[egress.ID]netip.Addr
		hosts    map[egress.ID]nft.Hosted
	}
	// the egress still waits for its IPv6 address
	known := map[netip.Addr]egress.ID{ip("10.244.1.2"): 1, ip("fd44::1"): 0}
	here := map[egress.ID]nft.Hosted{1: {IP: egressIP, Mark: egress.LocalMark}}
	local, away := map[egress.ID]egress.Mark{1: egress.LocalMark}, map[egress.ID]egress.Mark{1: egress.ToGatewayMark}
	two, source := map[egress.ID]int{1: 2}, map[egress.ID]netip.Addr{1: egress.OverlaySource(1, 1, egressIP)}
	tests := map[string]struct {
		s    *egress.Snapshot
		role Role
		want want
	}{
		"to the gateway, over the overlay":                    {guide("node-2"), None, want{known, away, two, source, nil}},
		"out, when this node holds the IP":                    {guide("node-1"), Own, want{known, local, nil, nil, here}},
		"nowhere, when nobody holds the IP":                   {guide(""), None, want{known, nil, nil, nil, nil}},
		"no further, while it waits for an earlier permit":    {guide("node-1"), None, want{known, local, nil, nil, nil}},
		"to the owner still, while this node prepares a move": {guide("node-2"), Arrive, want{known, away, two, source, here}},
		"out still, while it hands over":                      {guide("node-1"), Relay, want{known, local, nil, nil, here}},
		"to the new owner, after it has handed over":          {guide("node-2"), Relay, want{known, away, two, source, here}},
		"nowhere, while this node is not numbered": {func() *egress.Snapshot { // nobody could answer
			s := guide("node-2")
			n := s.Nodes["node-1"]
			n.Index = 0
			s.Nodes["node-1"] = n
			return s
		}(), None, want{known, away, two, nil, nil}},
		"nowhere, while the egress has no address": {func() *egress.Snapshot {
			s := guide("")
			s.Egresses["egress-0001"] = egress.Policy{Name: "egress-0001"}
			return s
		}(), None, want{map[netip.Addr]egress.ID{ip("10.244.1.2"): 0, ip("fd44::1"): 0}, nil, nil, nil, nil}},
		"nowhere, when the egress's record is not there": {func() *egress.Snapshot {
			s := guide("")
			delete(s.Egresses, "egress-0001")
			return s
		}(), None, want{map[netip.Addr]egress.ID{ip("10.244.1.2"): 0, ip("fd44::1"): 0}, nil, nil, nil, nil}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := Build(New(tt.s), facts("node-1"), map[netip.Addr]Role{egressIP: tt.role})
			got := want{d.NFT.Pods, d.NFT.NextHops, d.NFT.Gateways, d.NFT.OverlaySources, d.NFT.Hosted}
			if diff := cmp.Diff(tt.want, got, compare, cmp.AllowUnexported(want{})); diff != "" {
				t.Errorf("desired (-want +got):\n%s", diff)
			}
		})
	}
}

// Where the nodes have no pod CIDRs, each selected pod stands for itself.
func TestBuildSendsNoPodOfTheNodeToAGateway(t *testing.T) {
	s := guide("node-2")
	want := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd44::1/128")}
	if d := cmp.Diff(want, Build(New(s), facts("node-1"), nil).Routing.Pods, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	n := s.Nodes["node-1"]
	n.PodCIDRs = nil
	s.Nodes["node-1"] = n
	want[0] = netip.MustParsePrefix("10.244.1.2/32")
	if d := cmp.Diff(want, Build(New(s), facts("node-1"), nil).Routing.Pods, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Errorf("without pod CIDRs (-want +got):\n%s", d)
	}
}

func TestBuildAnswersOnlyForWhatItOwns(t *testing.T) {
	for role, want := range map[Role]struct{ guarded, answers bool }{None: {}, Relay: {}, Arrive: {guarded: true}, Own: {true, true}} {
		d := Build(New(guide("node-1")), facts("node-1"), map[netip.Addr]Role{egressIP: role})
		carried := d.NFT.Carriers["eth0"].IPs
		if got := len(d.NFT.AddressGuard); (got == 1) != want.guarded {
			t.Errorf("role %d: %d with the address guard", role, got)
		}
		for what, got := range map[string]int{"addresses": len(d.VLAN.Addresses), "announced": len(d.Announce), "carried": len(carried)} {
			if (got == 1) != want.answers {
				t.Errorf("role %d: %d %s", role, got, what)
			}
		}
		wantPermits := []nft.Permit{{IP: egressIP, Answer: want.answers}}
		if role == None {
			wantPermits = nil
		}
		if diff := cmp.Diff(wantPermits, d.Permits, compare); diff != "" {
			t.Errorf("role %d: permits (-want +got):\n%s", role, diff)
		}
		// Only a gateway needs to know which other nodes may send, and so where replies go. Its own pods are looked up
		// where they begin.
		wantSenders := []nft.Sender{{Node: ip("10.10.0.102"), Source: egress.OverlaySource(2, 1, egressIP), ID: 1}}
		if role == None {
			wantSenders = nil
		}
		if diff := cmp.Diff(wantSenders, d.NFT.Senders, compare); diff != "" {
			t.Errorf("role %d: senders (-want +got):\n%s", role, diff)
		}
		// Nobody sends with an egress IP but by the egress, wherever it is.
		if diff := cmp.Diff([][]netip.Addr{{egressIP}, {egressIP}}, [][]netip.Addr{d.NFT.Sources, d.NFT.Pooled}, compare); diff != "" {
			t.Errorf("role %d: sources (-want +got):\n%s", role, diff)
		}
	}
}

func TestBuildLeavesARPToTheKernelWhereTheTablesOrTheLinkAreNotUpToIt(t *testing.T) {
	for name, change := range map[string]func(*Facts){
		"the tables cannot answer": func(f *Facts) { f.AnswersARP = false },
		"a link without MAC":       func(f *Facts) { f.Uplink.MAC = [6]byte{} },
	} {
		f := facts("node-1")
		if change(&f); Build(New(guide("node-1")), f, map[netip.Addr]Role{egressIP: Own}).NFT.Carriers != nil {
			t.Errorf("%s: the uplink is a carrier all the same", name)
		}
	}
	want := map[string]nft.Carrier{"eth0": {MAC: facts("node-1").Uplink.MAC}}
	if diff := cmp.Diff(want, Build(New(guide("")), facts("node-1"), nil).NFT.Carriers); diff != "" {
		t.Errorf("a node that holds nothing: carriers (-want +got):\n%s", diff)
	}
}

func TestBuildNeverAnswersForAStaticIP(t *testing.T) {
	s := guide("node-1")
	p := s.Egresses["egress-0001"]
	p.Addresses = []egress.Address{{IP: egressIP, ID: 1}}
	s.Egresses["egress-0001"] = p
	d := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: Own})
	if len(d.VLAN.Addresses)+len(d.NFT.AddressGuard)+len(d.Announce) > 0 {
		t.Errorf("addresses %v, address guard %v, announced %v: a static IP is its link's", d.VLAN.Addresses, d.NFT.AddressGuard, d.Announce)
	}
	if len(d.NFT.Sources) != 1 || len(d.NFT.Pooled) > 0 {
		t.Errorf("sources %v, of pools %v: the node itself sends with a static IP", d.NFT.Sources, d.NFT.Pooled)
	}
	if diff := cmp.Diff([]nft.Permit{{IP: egressIP}}, d.Permits, compare); diff != "" {
		t.Errorf("permits (-want +got):\n%s", diff)
	}
}

func TestBuildOverlay(t *testing.T) {
	f := facts("node-1")
	f.Except = []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}
	s := guide("")
	s.Services = map[string]egress.ServiceCIDR{"kubernetes": {Name: "kubernetes", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")}}}
	d := Build(New(s), f, nil)
	if diff := cmp.Diff(routing.Overlay{Local: ip("10.10.0.101"), MTU: 1450}, d.Routing.Overlay, compare); diff != "" {
		t.Errorf("overlay (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]routing.Peer{{Node: "node-2", Underlay: ip("10.10.0.102")}, {Node: "node-3", Underlay: ip("10.10.0.103")}}, d.Routing.Peers, compare); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[int]netip.Addr{2: ip("10.10.0.102"), 3: ip("10.10.0.103")}, d.NFT.Peers, compare); diff != "" {
		t.Errorf("peers by their index (-want +got):\n%s", diff)
	}
	var except []string
	for _, p := range d.NFT.Except {
		except = append(except, p.String())
	}
	want := []string{"192.168.0.0/16", "10.96.0.0/16", "fd96::/112", "10.244.1.0/24", "10.10.0.101/32", "10.244.2.0/24", "10.10.0.102/32", "10.244.3.0/24", "10.10.0.103/32"}
	if diff := cmp.Diff(want, except); diff != "" {
		t.Errorf("exceptions (-want +got):\n%s", diff)
	}
}

func TestBuildKeepsWhatMayBeOfARecordThatCouldNeverBeRead(t *testing.T) {
	s := guide("node-1")
	delete(s.Egresses, "egress-0001")
	s.Faults = []egress.Fault{{Key: "egresses/egress-0001"}}
	hold := map[netip.Addr]Role{egressIP: Own}
	d := Build(New(s), facts("node-1"), hold)
	if d.NFT.Keep || d.Routing.Keep || d.VLAN.Keep || len(d.Permits) > 0 {
		t.Errorf("it could be read before, or is new: keep %t %t %t, permits %v", d.NFT.Keep, d.Routing.Keep, d.VLAN.Keep, d.Permits)
	}
	s.Faults[0].Blind = true
	d = Build(New(s), facts("node-1"), hold)
	if !d.NFT.Keep || !d.Routing.Keep || !d.VLAN.Keep {
		t.Errorf("keep %t %t %t", d.NFT.Keep, d.Routing.Keep, d.VLAN.Keep)
	}
	if diff := cmp.Diff([]nft.Permit{{IP: egressIP, Answer: true}}, d.Permits, compare); diff != "" {
		t.Errorf("permits (-want +got):\n%s", diff)
	}
	if len(d.NFT.Pods) > 0 {
		t.Errorf("its pods are set to %v, not left as they are", d.NFT.Pods)
	}
	if len(Build(New(s), facts("node-1"), nil).Permits) > 0 {
		t.Error("what is not held is permitted")
	}
}
