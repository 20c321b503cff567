package vlan

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// placeholder is an address of every VLAN link: a link without any IPv4 address drops every IPv4 packet as soon as
// rp_filter is not 0, and a node that relays for an IP has none of its addresses. It is the dummy address of nodes that
// have no other (RFC 7600, section 4.8).
var placeholder = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 0, 8}), 32)

// observedVLAN is a link that has the name of one of ours.
type observedVLAN struct {
	foreign   string // why it is none of ours; "" when it is
	parent    string // "" when it is not in this namespace
	mac       string
	mtu       int
	up        bool
	addresses []netip.Prefix // link-local ones left out: they are the kernel's
	altered   []netip.Prefix // as in Observed
}

// vlans returns the links that have the name of one of ours, by VLAN id.
func (l *Links) vlans(addresses, altered map[int][]netip.Prefix) (map[int]observedVLAN, error) {
	all, err := whole("links", l.handle.LinkList)
	if err != nil {
		return nil, err
	}
	names := map[int]string{}
	for _, dev := range all {
		names[dev.Attrs().Index] = dev.Attrs().Name
	}
	out := map[int]observedVLAN{}
	for _, dev := range all {
		a := dev.Attrs()
		suffix, ok := strings.CutPrefix(a.Name, egress.VLANLinkPrefix)
		id, err := strconv.Atoi(suffix)
		if !ok || err != nil || egress.VLANLink(id) != a.Name {
			continue
		}
		v, ok := dev.(*netlink.Vlan)
		o := observedVLAN{mac: a.HardwareAddr.String(), mtu: a.MTU, up: a.RawFlags&unix.IFF_UP != 0, altered: altered[a.Index]}
		switch {
		case !ok:
			o.foreign = "a link of type " + dev.Type()
		case v.VlanId != id:
			o.foreign = fmt.Sprintf("the link of VLAN %d", v.VlanId)
		default:
			o.parent = names[a.ParentIndex]
		}
		for _, p := range addresses[a.Index] {
			if !p.Addr().IsLinkLocalUnicast() {
				o.addresses = append(o.addresses, p)
			}
		}
		out[id] = o
	}
	return out, nil
}

// diffVLANs adds what makes the links of VLANs those of want.
func (c *Changes) diffVLANs(have map[int]observedVLAN, want State) {
	for _, id := range slices.Sorted(maps.Keys(want.VLANs)) {
		c.diffVLAN(id, have[id], want.VLANs[id], want.Keep)
	}
	for _, id := range slices.Sorted(maps.Keys(have)) {
		if _, wanted := want.VLANs[id]; !wanted && have[id].foreign == "" && !want.Keep {
			c.removes = append(c.removes, deleteLink(id))
		}
	}
}

func (c *Changes) diffVLAN(id int, have observedVLAN, want VLAN, keep bool) {
	name := egress.VLANLink(id)
	link := func(line string, run func(*Links) error) { c.links = append(c.links, op{line, run, id}) }
	set := func(words string, run func(*Links, netlink.Link) error) {
		link("ip link set "+name+" "+words, func(l *Links) error {
			dev, err := l.handle.LinkByName(name)
			if err != nil {
				return err
			}
			return run(l, dev)
		})
	}
	if have.foreign != "" {
		link(addLine(id, want), func(*Links) error { return fmt.Errorf("%s is %s, %w", name, have.foreign, errForeign) })
		return
	}
	if have.mac != "" && have.parent != want.Parent { // cannot be changed
		c.links = append(c.links, deleteLink(id))
		have = observedVLAN{}
	}
	if have.mac == "" {
		link(addLine(id, want), func(l *Links) error { return l.makeVLAN(id, want) })
		have.mac, have.mtu = want.MAC, want.MTU
	}
	if have.mac != want.MAC {
		set("address "+want.MAC, func(l *Links, dev netlink.Link) error {
			mac, err := net.ParseMAC(want.MAC)
			return cmp.Or(err, l.handle.LinkSetHardwareAddr(dev, mac))
		})
	}
	if have.mtu != want.MTU && want.MTU != 0 {
		set(fmt.Sprintf("mtu %d", want.MTU), func(l *Links, dev netlink.Link) error { return l.handle.LinkSetMTU(dev, want.MTU) })
	}
	if !have.up {
		set("up", func(l *Links, dev netlink.Link) error {
			// The routers of the VLAN are not the node's. Where /proc is read-only, the node's own setting holds.
			_ = os.WriteFile(l.sysctl+"/ipv6/conf/"+name+"/accept_ra", []byte("0"), 0)
			return l.handle.LinkSetUp(dev)
		})
	}
	wanted := append([]netip.Prefix{placeholder}, want.Addresses...)
	for _, p := range sorted(wanted) {
		o := op{"ip addr add " + words(p, name), func(l *Links) error { return present(l.address(name, p, l.handle.AddrAdd)) }, id}
		if slices.Contains(have.altered, p) {
			o = op{"ip addr change " + words(p, name), func(l *Links) error { return l.address(name, p, l.handle.AddrReplace) }, id}
		} else if slices.Contains(have.addresses, p) {
			continue
		}
		if p == placeholder {
			o.line += " scope link"
			c.links = append(c.links, o)
		} else {
			c.adds = append(c.adds, o)
		}
	}
	for _, p := range sorted(have.addresses) {
		if !slices.Contains(wanted, p) && !keep {
			c.removes = append(c.removes, op{fmt.Sprintf("ip addr del %s dev %s", p, name),
				func(l *Links) error { return absent(l.address(name, p, l.handle.AddrDel)) }, id})
		}
	}
}

func addLine(id int, v VLAN) string {
	line := fmt.Sprintf("ip link add link %s name %s address %s", v.Parent, egress.VLANLink(id), v.MAC)
	if v.MTU != 0 {
		line += fmt.Sprintf(" mtu %d", v.MTU)
	}
	return fmt.Sprintf("%s type vlan id %d", line, id)
}

func (l *Links) makeVLAN(id int, v VLAN) error {
	parent, err := l.handle.LinkByName(v.Parent)
	if err != nil {
		return fmt.Errorf("finding link %s: %w", v.Parent, err)
	}
	mac, err := net.ParseMAC(v.MAC)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.HardwareAddr, attrs.MTU = egress.VLANLink(id), parent.Attrs().Index, mac, v.MTU
	err = l.handle.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: id, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("kernel without VLAN links (CONFIG_VLAN_8021Q): %w", err)
	case errors.Is(err, unix.EEXIST):
		if _, missing := l.handle.LinkByName(attrs.Name); missing != nil {
			return fmt.Errorf("another link on %s has VLAN %d: remove it, or give the pool another vlan: %w", v.Parent, id, err)
		}
		return nil
	}
	return err
}

func deleteLink(id int) op {
	name := egress.VLANLink(id)
	return op{"ip link del " + name, func(l *Links) error {
		dev, err := l.handle.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		if err == nil {
			err = absent(l.handle.LinkDel(dev))
		}
		return err
	}, id}
}
