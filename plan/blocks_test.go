package plan

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
)

// The pod's node translates to its own block, whoever the gateway is; the gateway lets the blocks of others pass. What
// has no port of a block gets one of the gateway's: there the pod's node stands for it.
func TestTheBlockOfThePodsNodeIsUsedWhoeverIsTheGateway(t *testing.T) {
	a := netip.MustParseAddr
	ip, under := a("10.10.0.50"), map[string]netip.Addr{"n1": a("10.10.0.101"), "n2": a("10.10.0.102")}
	block := func(node string, first uint16, size int) egress.Block {
		return egress.Block{IP: ip, First: first, Size: size, Node: node}
	}
	members := func(node string, blocks ...egress.Block) egress.Members {
		return egress.Members{Egress: "e", Node: node, Pods: []egress.Member{{Pod: "default/p", IPs: []netip.Addr{a("10.244." + node[1:] + ".2")}}}, Blocks: blocks}
	}
	small, large, retired := block("n1", 2048, 64), block("n1", 4096, 1024), block("n1", 8192, 8192)
	retired.Retired = true
	other := block("n2", 2112, 64)
	of1 := members("n1", small, large, retired, egress.Block{IP: ip, First: 3, Size: 7})
	base := egress.Snapshot{
		Pools:    map[string]egress.Pool{"lan": {Name: "lan", Ranges: []egress.Range{{Start: ip, End: ip}}}},
		Egresses: map[string]egress.Policy{"e": {Name: "e", Addresses: []egress.Address{{IP: ip, ID: 5, Pool: "lan"}}}},
		Nodes: map[string]egress.Node{
			"n1": {Name: "n1", Index: 1, Addresses: []netip.Addr{under["n1"]}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
			"n2": {Name: "n2", Index: 2, Addresses: []netip.Addr{under["n2"]}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}},
		},
		ByNode:   map[string]egress.Members{"e": of1},
		ByEgress: map[string]map[string]egress.Members{"e": {"n1": of1, "n2": members("n2", other)}},
		Followed: map[string]bool{"e": true},
	}
	facts := Facts{Node: "n1", Underlay: under["n1"], Uplink: Link{Name: "eth0", MTU: 1500, Up: true}}
	ports := []nft.Port{{Block: other, Index: 2, Node: under["n2"]}}
	senders := []nft.Sender{{Node: under["n2"], Source: egress.OverlaySource(2, 5, ip), ID: 5}}
	for name, tt := range map[string]struct {
		owner   string
		role    Role
		without bool // blocks of this node
		hop     egress.Mark
		gateway int
		source  netip.Addr
		ports   []nft.Port
		senders []nft.Sender
	}{
		"another node is the gateway": {owner: "n2", hop: egress.ToGatewayMark, gateway: 2, source: egress.OverlaySource(1, 5, ip)},
		"another node is the gateway, and this one has no block": {
			owner: "n2", without: true, hop: egress.ToGatewayMark, gateway: 2, source: egress.OverlaySource(1, 5, ip),
		},
		"another node is about to hand it over to this one": {
			owner: "n2", role: Arrive, hop: egress.ToGatewayMark, gateway: 2, source: egress.OverlaySource(1, 5, ip), ports: ports, senders: senders,
		},
		"the pod's own node is the gateway":                       {owner: "n1", role: Own, hop: egress.LocalMark, ports: ports, senders: senders},
		"the pod's own node is the gateway, without block":        {owner: "n1", role: Own, without: true, hop: egress.LocalMark, ports: ports, senders: senders},
		"the pod's own node is about to hand it over":             {owner: "n1", role: Relay, hop: egress.LocalMark, ports: ports, senders: senders},
		"the pod's own node holds it, and the record says nobody": {role: Own, hop: egress.LocalMark, ports: ports, senders: senders},
		"nobody holds the IP":                                     {},
		"the gateway is no node any more":                         {owner: "n3"},
	} {
		t.Run(name, func(t *testing.T) {
			s := base
			s.Owners = map[netip.Addr]egress.Owner{}
			if tt.owner != "" {
				s.Owners[ip] = egress.Owner{IP: ip, Node: tt.owner}
			}
			if tt.without {
				none := members("n1")
				s.ByNode = map[string]egress.Members{"e": none}
				s.ByEgress = map[string]map[string]egress.Members{"e": {"n1": none, "n2": base.ByEgress["e"]["n2"]}}
			}
			d := Build(New(&s), facts, map[netip.Addr]Role{ip: tt.role})
			if got := d.NFT.NextHops[5]; got != tt.hop {
				t.Errorf("next hop %s, want %s", got, tt.hop)
			}
			if got := d.NFT.Gateways[5]; got != tt.gateway {
				t.Errorf("gateway %d, want %d", got, tt.gateway)
			}
			if got := d.NFT.OverlaySources[5]; got != tt.source {
				t.Errorf("source in the overlay %s, want %s", got, tt.source)
			}
			if got, ok := d.NFT.Blocks[5]; ok == tt.without || ok && got != large {
				t.Errorf("block %v, %t; want the largest that is not retired: %t", got, ok, !tt.without)
			}
			if diff := cmp.Diff(tt.ports, d.NFT.Ports, compare); diff != "" {
				t.Errorf("ports of others (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.senders, d.NFT.Senders, compare); diff != "" {
				t.Errorf("senders (-want +got):\n%s", diff)
			}
			if h, hosted := d.NFT.Hosted[5]; hosted != (tt.role != None) || h.Shared != hosted {
				t.Errorf("hosted %+v, want it shared with the block of the other node", h)
			}
			if forwarded := slices.Contains(d.Routing.Forwarded, ip); forwarded != (tt.role != None) {
				t.Errorf("forwarded: %t", forwarded)
			}
			if link, local := d.Routing.Addresses[ip]; local != (tt.role == Own) || local && link != egress.AddressLink {
				t.Errorf("local on %q, %t", link, local)
			}
		})
	}
}

// By the index of the node the gateway finds the way back: it is told that of each, once for every egress IP.
func TestEachNodeWithPodsIsASenderOfEachEgressIPOfItsFamily(t *testing.T) {
	s := guide("node-1")
	six := ip("fd10::11")
	p := s.Egresses["egress-0001"]
	p.Addresses = append(p.Addresses, egress.Address{IP: six, ID: 1000, Pool: "pool"})
	s.Egresses["egress-0001"] = p
	s.Owners[six] = egress.Owner{IP: six, Node: "node-1", Revision: 10}
	three := s.ByEgress["egress-0001"]["node-2"]
	three.Node = "node-3"
	gone := three
	gone.Node = "node-4"
	s.ByEgress["egress-0001"]["node-3"], s.ByEgress["egress-0001"]["node-4"] = three, gone
	got := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: Own, six: Own}).NFT.Senders
	slices.SortFunc(got, func(a, b nft.Sender) int { return a.Source.Compare(b.Source) })
	want := []nft.Sender{
		{Node: ip("10.10.0.102"), Source: egress.OverlaySource(2, 1, egressIP), ID: 1},
		{Node: ip("10.10.0.103"), Source: egress.OverlaySource(3, 1, egressIP), ID: 1},
		{Node: ip("10.10.0.102"), Source: egress.OverlaySource(2, 1000, six), ID: 1000},
		{Node: ip("10.10.0.103"), Source: egress.OverlaySource(3, 1000, six), ID: 1000},
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What other nodes send meanwhile would be dropped.
func TestSendersAreKeptUntilThoseOfAllNodesAreKnown(t *testing.T) {
	s := guide("node-1")
	for role, keep := range map[Role]bool{None: false, Pending: true, Arrive: true, Own: true, Relay: true} {
		if d := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: role}); d.NFT.KeepSenders != keep || len(d.Follow) > 0 != keep {
			t.Errorf("role %d, not followed yet: keep %t, follow %v", role, d.NFT.KeepSenders, d.Follow)
		}
	}
	s.Followed = map[string]bool{"egress-0001": true}
	if d := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: Own}); d.NFT.KeepSenders {
		t.Error("all are known, and former ones are kept")
	}
}
