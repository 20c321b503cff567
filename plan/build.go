package plan

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// Role is what a node does for an egress IP.
type Role int

const (
	// None: nothing.
	None Role = iota
	// Ask probes whether another host has the IP, before it is used for the first time. The kernel needs the link of
	// its VLAN for that.
	Ask
	// Pending does nothing yet, but reads the members of the IP's egresses, on all nodes.
	Pending
	// Relay sends packets with the IP but does not answer for it: the owner that is about to hand it over, and for a
	// while after that.
	Relay
	// Arrive is the role of a planned move's target before the hand-over: as Relay, but what comes for the IP too early
	// is dropped on this node. Forwarded, it would be a connection to the IP.
	Arrive
	// Own is the owner's role: it answers for the IP and sends with it.
	Own
)

// Desired is what the kernel of a node has to hold.
type Desired struct {
	NFT     nft.State
	Routing routing.State
	VLAN    vlan.State
	// Permits are the egress IPs that the node may use for as long as its lease is confirmed. By IP.
	Permits []nft.Permit
	// Announce maps an egress IP to the link on which it is announced.
	Announce map[netip.Addr]string
	// Blocks are all that the node has, those included that retire, by the id of their IP.
	Blocks map[egress.ID][]egress.Block
	// Unknown are nodes whose pods' addresses are not known, sorted, if an egress selects pods of this node: their
	// connections to such nodes would be taken for some to the outside. While there are any, the kernel gets no pods
	// that it does not have.
	Unknown []string
	// Unread says which pods of the kernel may be selected although NFT.Pods does not have them; nil: none.
	Unread *Unread
	// Follow are the egresses whose members on all nodes the node has to know, sorted.
	Follow []string
	// Owners are the egress IPs of the node's pods, whose owners it has to know.
	Owners []netip.Addr
}

// Build returns what the kernel of the node has to hold when it has the given roles. An IP that is not in roles has the
// role None.
func Build(c *Cluster, f Facts, roles map[netip.Addr]Role) Desired {
	s := c.Snapshot
	d := Desired{
		NFT: nft.State{
			Pods:     map[netip.Addr]egress.ID{},
			NextHops: map[egress.ID]egress.Mark{},
			Blocks:   map[egress.ID]egress.Block{},
			Gateways: map[egress.ID]int{},
			Hosted:   map[egress.ID]nft.Hosted{},

			OverlaySources: map[egress.ID]netip.Addr{},
		},
		Announce: map[netip.Addr]string{},
		Blocks:   map[egress.ID][]egress.Block{},
	}
	keep := slices.ContainsFunc(s.Faults, func(f egress.Fault) bool { return f.Blind })
	d.NFT.Keep, d.Routing.Keep, d.VLAN.Keep = keep, keep, keep
	buildOverlay(&d, c, f)
	exits := exits{s, f, subnetMarks(s)}
	buildPods(&d, s, f, roles, exits)
	buildHosted(&d, c, f, roles, exits)
	return d
}

// buildOverlay adds what depends on the nodes alone: the overlay, its peers, and the destinations that are never
// SNATed.
func buildOverlay(d *Desired, c *Cluster, f Facts) {
	overhead := egress.OverlayOverhead(f.Underlay)
	d.Routing.Overlay = routing.Overlay{Local: f.Underlay, MTU: f.Uplink.MTU - overhead}
	d.NFT.Self, d.NFT.OverlayMTU, d.NFT.RandomPorts = f.Underlay, f.Uplink.MTU-overhead, f.RandomPorts
	if f.AnswersARP && f.Uplink.MAC != [6]byte{} { // with or without IPs, so that the rules stay when these come and go
		d.NFT.Carriers = map[string]nft.Carrier{f.Uplink.Name: {MAC: f.Uplink.MAC}}
	}
	for _, p := range f.Uplink.Prefixes {
		other := func(a netip.Addr) bool { return a.Is4() == p.Addr().Is4() }
		if p.Addr().IsGlobalUnicast() && !slices.ContainsFunc(d.Routing.Sources, other) {
			d.Routing.Sources = append(d.Routing.Sources, p.Addr())
		}
	}
	if c.around == nil || !c.around.of(f) {
		c.around = newAround(c.Snapshot, f)
	}
	d.NFT.Except, d.NFT.Nodes, d.NFT.Peers, d.Routing.Peers = c.around.except, c.around.nodes, c.around.indexes, c.around.peers
}

// around is what the kernel of a node has of the other nodes, and of the ranges of pods and Services. It is not
// changed: all plans share it until one of these changes, and what is compared with what was there before is then the
// same slice, or map.
type around struct {
	facts   Facts // what is used of them
	except  []netip.Prefix
	nodes   []netip.Addr
	indexes map[int]netip.Addr
	peers   []routing.Peer
}

// of reports whether it is that of a node with these facts.
func (a *around) of(f Facts) bool {
	return a.facts.Node == f.Node && a.facts.Underlay == f.Underlay && slices.Equal(a.facts.Except, f.Except) && slices.Equal(a.facts.Cluster, f.Cluster)
}

func newAround(s *egress.Snapshot, f Facts) *around {
	a := &around{facts: Facts{Node: f.Node, Underlay: f.Underlay, Except: slices.Clone(f.Except), Cluster: slices.Clone(f.Cluster)}, indexes: map[int]netip.Addr{}}
	a.except = slices.Concat(f.Except, f.Cluster)
	for _, name := range slices.Sorted(maps.Keys(s.Pods)) {
		a.except = append(a.except, s.Pods[name].CIDRs...)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Services)) {
		a.except = append(a.except, s.Services[name].CIDRs...)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[name]
		a.except = append(a.except, n.PodCIDRs...)
		for _, addr := range n.Addresses {
			a.except = append(a.except, netip.PrefixFrom(addr, addr.BitLen()))
		}
		if addr, ok := n.Primary(f.Underlay); ok && name != f.Node {
			a.nodes = append(a.nodes, addr)
			a.peers = append(a.peers, routing.Peer{Node: name, Underlay: addr})
			if n.Index > 0 {
				a.indexes[n.Index] = addr
			}
		}
	}
	a.except, a.nodes, a.peers = slices.Clip(a.except), slices.Clip(a.nodes), slices.Clip(a.peers)
	return a
}

// Unknown returns the nodes of which neither pod CIDRs nor the addresses of their pods are known, sorted. They are as
// soon as a range of the whole cluster is named, to the agent or to crdsync, or crdsync has looked: its record may be
// empty.
func Unknown(s *egress.Snapshot, cluster []netip.Prefix) (nodes []string) {
	if _, named := s.Pods[egress.AllNodes]; named || len(cluster) > 0 {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if _, seen := s.Pods[name]; !seen && len(s.Nodes[name].PodCIDRs) == 0 {
			nodes = append(nodes, name)
		}
	}
	return nodes
}

// buildPods adds what this node's selected pods need: their addresses with the id of their egress IP, and the way to
// its owner.
func buildPods(d *Desired, s *egress.Snapshot, f Facts, roles map[netip.Addr]Role, exits exits) {
	own := s.Nodes[f.Node].PodCIDRs
	d.NFT.FirstPacketDelay, d.NFT.PodCIDRs = f.FirstPacketDelay, slices.Concat(own, s.Pods[egress.AllNodes].CIDRs, f.Cluster)
	for _, pod := range s.ByNode[egress.Unselected].Pods {
		d.NFT.Unselected = append(d.NFT.Unselected, pod.IPs...)
	}
	d.Routing.Pods = slices.Clone(own)
	if slices.ContainsFunc(slices.Collect(maps.Keys(s.ByNode)), func(name string) bool { return name != egress.Unselected }) {
		d.Unknown = Unknown(s, f.Cluster)
	}
	d.Unread = unread(s, f.Node)
	// in order: should two list one pod, all passes agree on which
	for _, name := range slices.Sorted(maps.Keys(s.ByNode)) {
		members := s.ByNode[name]
		policy, ok := s.Egresses[name]
		if name == egress.Unselected || !ok && blind(s, "egresses/"+name) {
			continue // of the latter, the kernel keeps what it has: see Unread
		}
		for _, a := range policy.Addresses {
			d.Owners = append(d.Owners, a.IP)
			for _, b := range members.Blocks {
				if a.IP == b.IP && b.Fault() == nil {
					d.Blocks[a.ID] = append(d.Blocks[a.ID], b)
				}
			}
		}
		for _, pod := range members.Pods {
			for _, ip := range pod.IPs {
				a := addressFor(policy, ip)
				d.NFT.Pods[ip] = a.ID
				if !slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Contains(ip) }) {
					d.Routing.Pods = append(d.Routing.Pods, netip.PrefixFrom(ip, ip.BitLen()))
				}
				if a.ID == 0 {
					continue
				}
				owner := s.Owners[a.IP].Node
				if roles[a.IP] == Own {
					owner = f.Node
				}
				if block, ok := egress.Current(members.Blocks, a.IP); ok {
					d.NFT.Blocks[a.ID] = block
				}
				self, gateway := s.Nodes[f.Node].Index, s.Nodes[owner].Index
				switch {
				case gateway == 0:
				case owner == f.Node:
					d.NFT.NextHops[a.ID] = exits.mark(a.Pool)
				default:
					d.NFT.NextHops[a.ID], d.NFT.Gateways[a.ID] = egress.ToGatewayMark, gateway
					if self > 0 {
						d.NFT.OverlaySources[a.ID] = egress.OverlaySource(self, a.ID, a.IP)
					}
				}
			}
		}
	}
}

// addressFor returns the address of the egress for a pod's IP. Without one of the IP's family it is the zero address:
// the members list only IPs that the egress applies to, so this one's traffic waits.
func addressFor(p egress.Policy, pod netip.Addr) egress.Address {
	for _, a := range p.Addresses {
		if a.IP.Is4() == pod.Is4() {
			return a
		}
	}
	return egress.Address{}
}

// buildHosted adds what the egress IPs need that the node owns or relays.
func buildHosted(d *Desired, c *Cluster, f Facts, roles map[netip.Addr]Role, exits exits) {
	d.Routing.Addresses = map[netip.Addr]string{}
	s := c.Snapshot
	d.NFT.Sources, d.NFT.Pooled = c.allSources()
	for _, t := range c.targets {
		role := roles[t.IP]
		switch {
		case role == Ask && exits.vlan(t.Pool):
			exits.prepare(d, t.Address)
			continue
		case role == None || role == Ask:
			continue
		}
		for _, name := range t.egresses {
			d.Follow = append(d.Follow, name)
			d.NFT.KeepSenders = d.NFT.KeepSenders || !s.Followed[name]
		}
		if role == Pending {
			continue
		}
		exits.prepare(d, t.Address)
		hosted := nft.Hosted{IP: t.IP, Mark: exits.mark(t.Pool), Limit: limit(t.bandwidth)}
		if exits.vlan(t.Pool) {
			hosted.Link = exits.facts.link(s.Pools[t.Pool], t.IP)
		}
		own := t.Pool != "" // a static IP is its link's: the kernel answers for it with or without Egret
		d.Permits = append(d.Permits, nft.Permit{IP: t.IP, Answer: own && role == Own})
		if own {
			d.Routing.Forwarded = append(d.Routing.Forwarded, t.IP)
		}
		if own && role != Relay {
			d.NFT.AddressGuard = append(d.NFT.AddressGuard, t.IP)
		}
		if own && role == Own {
			exits.answer(d, t.Address)
		}
		for _, name := range t.egresses {
			for node, members := range s.ByEgress[name] {
				via, ok := s.Nodes[node].Primary(f.Underlay)
				other := ok && node != f.Node && s.Nodes[node].Index > 0
				for _, b := range members.Blocks {
					if b.IP != t.IP || b.Fault() != nil {
						continue
					}
					if hosted.Shared = true; other {
						d.NFT.Ports = append(d.NFT.Ports, nft.Port{Block: b, Index: s.Nodes[node].Index, Node: via})
					}
				}
				if other {
					source := egress.OverlaySource(s.Nodes[node].Index, t.ID, t.IP)
					d.NFT.Senders = append(d.NFT.Senders, nft.Sender{Node: via, Source: source, ID: t.ID})
				}
			}
		}
		d.NFT.Hosted[t.ID] = hosted
	}
	buildUnread(d, c, f, roles)
	slices.Sort(d.Follow)
	d.Follow = slices.Compact(d.Follow)
	slices.SortFunc(d.NFT.AddressGuard, netip.Addr.Compare)
	slices.SortFunc(d.VLAN.Addresses, netip.Addr.Compare)
	slices.SortFunc(d.Permits, func(a, b nft.Permit) int { return a.IP.Compare(b.IP) })
}

// limit returns bits as bytes.
func limit(b *egress.Bandwidth) nft.Limit {
	if b == nil {
		return nft.Limit{}
	}
	return nft.Limit{Rate: max(uint64(b.Rate)/8, 1), Burst: uint64(b.Burst) / 8} // a rate of 0 might pass for no limit
}

// buildUnread keeps the IPs that the node owns in service although the record of their egress cannot be read: the
// kernel keeps what it has of them, and they are permitted.
func buildUnread(d *Desired, c *Cluster, f Facts, roles map[netip.Addr]Role) {
	if !d.NFT.Keep {
		return
	}
	for ip, role := range roles {
		if _, known := c.target(ip); role == Own && !known && !f.Local[ip] {
			d.Permits = append(d.Permits, nft.Permit{IP: ip, Answer: true})
			d.NFT.AddressGuard = append(d.NFT.AddressGuard, ip)
			d.VLAN.Addresses = append(d.VLAN.Addresses, ip)
		}
	}
}

// blind reports whether the record of a key could not be read since the agent began.
func blind(s *egress.Snapshot, key string) bool {
	return slices.ContainsFunc(s.Faults, func(f egress.Fault) bool { return f.Blind && f.Key == key })
}

// faulty reports whether a record under prefix cannot be read: what is missing from the snapshot may then be missing
// for that reason.
func faulty(s *egress.Snapshot, prefix string) bool {
	return slices.ContainsFunc(s.Faults, func(f egress.Fault) bool { return strings.HasPrefix(f.Key, prefix) })
}
