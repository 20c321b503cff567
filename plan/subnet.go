package plan

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// Link is a link of the node, not one of Egret's.
type Link struct {
	Name     string
	MTU      int     // bytes
	MAC      [6]byte // zero: it has none
	Up       bool    // and has a carrier
	IPv6     bool    // it has IPv6, and so would a new link: it can serve IPv6 egress IPs
	Prefixes []netip.Prefix
	// VLAN is the VLAN id of a link that has one, Parent the link that it is on.
	VLAN   int
	Parent string
}

// carrier returns the link by which an IP of the pool leaves the node, or that its VLAN is on: what the operator says,
// else the one whose subnet holds the IP, else the uplink. refused says why the node cannot hold IPs of the pool;
// empty: it can.
func (f Facts) carrier(p egress.Pool, ip netip.Addr) (l Link, refused string) {
	l = f.Uplink
	tagged := p.Subnet != nil && p.Subnet.VLAN != 0
	i := slices.IndexFunc(f.Links, func(l Link) bool {
		if f.PoolUplink != "" {
			return l.Name == f.PoolUplink
		}
		return !tagged && slices.ContainsFunc(l.Prefixes, func(p netip.Prefix) bool { return p.Bits() > 0 && p.Contains(ip) })
	})
	switch {
	case i >= 0:
		l = f.Links[i]
	case f.PoolUplink != "":
		return l, fmt.Sprintf("no link %s, which --uplink names", f.PoolUplink)
	}
	if !tagged {
		return l, ""
	}
	if f.NoVLAN {
		return l, "the kernel has no VLAN links (CONFIG_VLAN_8021Q)"
	}
	id := p.Subnet.VLAN
	for _, o := range f.Links {
		if o.VLAN == id && o.Parent == l.Name {
			return l, fmt.Sprintf("link %s has VLAN %d of %s: remove it, or give the pool another vlan", o.Name, id, l.Name)
		}
		if o.Name == egress.VLANLink(id) {
			return l, fmt.Sprintf("link %s is another program's: remove or rename it", o.Name)
		}
	}
	return l, ""
}

// serves reports whether the node's links are fit for an IP of a pool.
func (f Facts) serves(p egress.Pool, ip netip.Addr) bool {
	l, refused := f.carrier(p, ip)
	return f.Uplink.Up && l.Up && (l.IPv6 || !ip.Is6()) && refused == ""
}

// link returns the link on which an IP of a pool is asked for. That of a VLAN may not be there yet.
func (f Facts) link(p egress.Pool, ip netip.Addr) string {
	if p.Subnet != nil && p.Subnet.VLAN != 0 {
		return egress.VLANLink(p.Subnet.VLAN)
	}
	l, _ := f.carrier(p, ip)
	return l.Name
}

// Refused returns the pools that select the node and whose IPs it cannot own, and why.
func Refused(s *egress.Snapshot, f Facts) map[string]string {
	var out map[string]string
	for name, p := range s.Pools {
		if p.Subnet == nil || !selects(s, p, f.Node) {
			continue
		}
		if _, why := f.carrier(p, p.Subnet.Gateway); why != "" {
			if out == nil {
				out = map[string]string{}
			}
			out[name] = why
		}
	}
	return out
}

// subnetMarks numbers the subnets of all pools. The number follows from the subnet, so that a restart, and another
// pool, leave it: but for two that fall on one number, of which the later takes the next.
func subnetMarks(s *egress.Snapshot) map[egress.Subnet]egress.Mark {
	all := map[egress.Subnet]bool{}
	for _, p := range s.Pools {
		if p.Subnet != nil {
			all[*p.Subnet] = true
		}
	}
	out, taken := map[egress.Subnet]egress.Mark{}, map[egress.Mark]bool{}
	order := slices.SortedFunc(maps.Keys(all), func(a, b egress.Subnet) int {
		return cmp.Or(a.Gateway.Compare(b.Gateway), cmp.Compare(a.PrefixLength, b.PrefixLength), cmp.Compare(a.VLAN, b.VLAN))
	})
	for _, subnet := range order {
		n := int(weights(fmt.Sprint(subnet))("") % uint64(egress.SubnetMarks))
		for range egress.SubnetMarks {
			m := egress.SubnetMark(n)
			if n = (n + 1) % egress.SubnetMarks; !taken[m] {
				out[subnet], taken[m] = m, true
				break
			}
		}
	}
	return out
}

// exits says how packets with egress IPs leave the node: by which link and mark.
type exits struct {
	snapshot *egress.Snapshot
	facts    Facts
	marks    map[egress.Subnet]egress.Mark
}

// vlan reports whether the IPs of a pool are on a VLAN.
func (e exits) vlan(pool string) bool {
	p := e.snapshot.Pools[pool]
	return p.Subnet != nil && p.Subnet.VLAN != 0
}

// mark returns the routing mark of packets that leave this node with an IP of a pool.
func (e exits) mark(pool string) egress.Mark {
	if p := e.snapshot.Pools[pool]; p.Subnet != nil {
		return e.marks[*p.Subnet]
	}
	return egress.LocalMark
}

// prepare adds the link and the routes that packets with the IP need to leave.
func (e exits) prepare(d *Desired, a egress.Address) {
	p := e.snapshot.Pools[a.Pool]
	if p.Subnet == nil {
		return
	}
	parent, _ := e.facts.carrier(p, a.IP)
	link := parent.Name
	if id := p.Subnet.VLAN; id != 0 {
		link = egress.VLANLink(id)
		if _, there := d.VLAN.VLANs[id]; !there {
			if d.VLAN.VLANs == nil {
				d.VLAN.VLANs = map[int]vlan.VLAN{}
			}
			d.VLAN.VLANs[id] = vlan.VLAN{Parent: parent.Name, MTU: parent.MTU, MAC: egress.VLANMAC(e.facts.Underlay, id).String()}
		}
	}
	s := routing.Subnet{Mark: e.mark(a.Pool), Link: link, Prefix: p.Subnet.Prefix(), Gateway: p.Subnet.Gateway}
	if s.Prefix.IsValid() && !slices.Contains(d.Routing.Subnets, s) {
		d.Routing.Subnets = append(d.Routing.Subnets, s)
	}
}

// answer adds the addresses and the ARP and NDP answers by which neighbours find the IP on this node.
func (e exits) answer(d *Desired, a egress.Address) {
	p := e.snapshot.Pools[a.Pool]
	parent, _ := e.facts.carrier(p, a.IP)
	if e.vlan(a.Pool) { // the address is where it is asked for, so the kernel answers
		v := d.VLAN.VLANs[p.Subnet.VLAN]
		v.Addresses = append(v.Addresses, netip.PrefixFrom(a.IP, p.Subnet.PrefixLength))
		d.VLAN.VLANs[p.Subnet.VLAN] = v
		d.Announce[a.IP] = egress.VLANLink(p.Subnet.VLAN)
		d.Routing.Addresses[a.IP] = egress.VLANLink(p.Subnet.VLAN)
		return
	}
	d.VLAN.Addresses = append(d.VLAN.Addresses, a.IP)
	d.Routing.Addresses[a.IP] = egress.AddressLink
	d.Announce[a.IP] = parent.Name
	if a.IP.Is6() {
		if d.VLAN.Answers == nil {
			d.VLAN.Answers = map[string][]netip.Addr{}
		}
		d.VLAN.Answers[parent.Name] = append(d.VLAN.Answers[parent.Name], a.IP)
	}
	if e.facts.AnswersARP && parent.MAC != [6]byte{} {
		c := d.NFT.Carriers[parent.Name]
		c.MAC = parent.MAC
		c.IPs = append(c.IPs, a.IP)
		if d.NFT.Carriers == nil {
			d.NFT.Carriers = map[string]nft.Carrier{}
		}
		d.NFT.Carriers[parent.Name] = c
	}
}
