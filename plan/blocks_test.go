package plan

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
)

// The pod's node translates to its own block, whoever the gateway is; the gateway lets the blocks of others pass.
func TestBlocksAreUsedWhereBothEndsKnowThem(t *testing.T) {
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
		Agents:   map[string]egress.Agent{},
	}
	facts := Facts{Node: "n1", Underlay: under["n1"], Uplink: Link{Name: "eth0", MTU: 1500, Up: true}, Blocks: true}
	for name, tt := range map[string]struct {
		owner    string
		role     Role
		features []string
		noBlocks bool
		hop      egress.Mark
		gateway  int
		used     bool
		ports    []nft.Port
	}{
		"another node is the gateway":                 {owner: "n2", features: []string{egress.BlocksFeature}, hop: egress.ToGatewayMark, gateway: 2, used: true},
		"the gateway's agent is away":                 {owner: "n2", hop: egress.ToGatewayMark, gateway: 2, used: true},
		"the gateway is of a former version":          {owner: "n2", features: []string{"vlan"}, hop: egress.NodeMark(2)},
		"this kernel has no chains on the way out":    {owner: "n2", noBlocks: true, features: []string{egress.BlocksFeature}, hop: egress.NodeMark(2)},
		"the pod's own node is the gateway":           {owner: "n1", role: Hold, hop: egress.LocalMark, used: true, ports: []nft.Port{{Block: other, Index: 2, Node: under["n2"]}}},
		"the pod's own node is about to hand it over": {owner: "n1", role: Relay, hop: egress.LocalMark, used: true, ports: []nft.Port{{Block: other, Index: 2, Node: under["n2"]}}},
		"nobody holds the IP":                         {used: true},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := base, facts
			f.Blocks = !tt.noBlocks
			s.Owners = map[netip.Addr]egress.Owner{}
			if tt.owner != "" {
				s.Owners[ip] = egress.Owner{IP: ip, Node: tt.owner}
			}
			if tt.features != nil {
				s.Agents = map[string]egress.Agent{tt.owner: {Node: tt.owner, Features: tt.features}}
			}
			d := Build(&s, f, map[netip.Addr]Role{ip: tt.role})
			if got := d.NFT.NextHops[5]; got != tt.hop {
				t.Errorf("next hop %s, want %s", got, tt.hop)
			}
			if got := d.NFT.Gateways[5]; got != tt.gateway {
				t.Errorf("gateway %d, want %d", got, tt.gateway)
			}
			if got, ok := d.NFT.Blocks[5]; ok != tt.used || ok && got != large {
				t.Errorf("block %v, %t; want the largest that is not retired: %t", got, ok, tt.used)
			}
			if diff := cmp.Diff(tt.ports, d.NFT.Ports, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("ports of others (-want +got):\n%s", diff)
			}
			if forwarded := slices.Contains(d.Routing.Forwarded, ip); forwarded != (tt.role != None) {
				t.Errorf("forwarded: %t", forwarded)
			}
			if link, local := d.Routing.Addresses[ip]; local != (tt.role == Hold) || local && link != egress.AddressLink {
				t.Errorf("local on %q, %t", link, local)
			}
			if _, ok := d.Routing.Returns[a("10.244.1.2")]; ok {
				t.Error("the node's own pod has a way back through the loop")
			}
		})
	}
}
