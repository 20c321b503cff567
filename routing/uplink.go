package routing

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Links are the links of a network namespace at one time, by index.
type Links []Link

// Link is a link of the node.
type Link struct {
	Name  string
	Index int
	MTU   int
	MAC   net.HardwareAddr // nil for a link that has none
	Up    bool             // up, and with a carrier
	Addrs []netip.Prefix   // in the kernel's order
	// VLAN is the VLAN id of a link that has one, and Parent the link that it is on.
	VLAN   int
	Parent string
	off6   bool // new links are without IPv6
}

// HasIPv6 reports whether the link has IPv6, which shows in an address, and whether a new link would: the overlay needs
// both.
func (l Link) HasIPv6() bool {
	return !l.off6 && slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// Unchanged reports whether the links, read before, are so still in what no event of a Watcher tells: whether new ones
// would have IPv6.
func (links Links) Unchanged() bool {
	_, on := familyOf(netip.IPv6Unspecified()).support()
	return !slices.ContainsFunc(links, func(l Link) bool { return l.off6 == on })
}

// ErrNoLink says that an address is on none of the node's links.
var ErrNoLink = errors.New("no link carries the address")

// Uplink returns the link that carries ip. Where several do, one that is up is preferred, and then the one that came
// first. An error names ip when none does. Our own links are left out: the overlay link carries the node's address,
// too.
func (links Links) Uplink(ip netip.Addr) (Link, error) {
	var best Link
	for _, l := range links {
		for _, p := range l.Addrs {
			if p.Addr() == ip && !ours(l.Name) && (best.Index == 0 || l.Up && !best.Up) {
				best = l
			}
		}
	}
	if best.Index == 0 {
		return Link{}, fmt.Errorf("%w %s", ErrNoLink, ip)
	}
	return best, nil
}

// Others returns the links that are not ours.
func (links Links) Others() []Link {
	return slices.DeleteFunc(slices.Clone(links), func(l Link) bool { return ours(l.Name) })
}

// Addresses returns the unicast addresses of the links, with the name of the link that carries each. Loopback and
// link-local addresses, those that are not (or not yet) known to be unique, and the dummy address of our links are left
// out. An address that is on one of our links and on another one is said to be on the other. kube-ipvs0, which carries
// the Service IPs of kube-proxy on every node, is left out: an address there says nothing about where it lives.
func (links Links) Addresses() map[netip.Addr]string {
	all := map[netip.Addr]string{}
	for _, l := range links {
		if l.Name == "kube-ipvs0" {
			continue
		}
		for _, p := range l.Addrs {
			ip := p.Addr()
			if name, ok := all[ip]; (!ok || ours(name)) && ip.IsGlobalUnicast() && ip != noIPv4 {
				all[ip] = l.Name
			}
		}
	}
	return all
}

// ours reports whether a link of this name is Egret's.
func ours(name string) bool { return name == egress.AddressLink || strings.HasPrefix(name, "egret.") }

// errRenumbered says that an address is on a link that was not there when links were listed.
var errRenumbered = errors.New("links changed while they were read")

// ReadLinks returns the links of the network namespace of the calling thread, with their addresses.
func ReadLinks() (Links, error) {
	for n := 1; ; n++ {
		all, err := readLinks()
		if !errors.Is(err, errRenumbered) || n == dumps {
			return all, err
		}
	}
}

func readLinks() (Links, error) {
	list, err := whole("links", netlink.LinkList)
	if err != nil {
		return nil, err
	}
	all := make(Links, len(list))
	at := map[int]int{}
	_, on := familyOf(netip.IPv6Unspecified()).support()
	for i, l := range list {
		a := l.Attrs()
		const up = unix.IFF_UP | unix.IFF_RUNNING
		all[i] = Link{Name: a.Name, Index: a.Index, MTU: a.MTU, MAC: a.HardwareAddr, Up: a.RawFlags&up == up, off6: !on}
		at[a.Index] = i
	}
	for i, l := range list {
		if v, ok := l.(*netlink.Vlan); ok && v.VlanProtocol != netlink.VLAN_PROTOCOL_8021AD {
			if parent, ok := at[v.ParentIndex]; ok { // else it is in another namespace
				all[i].VLAN, all[i].Parent = v.VlanId, all[parent].Name
			}
		}
	}
	addrs, err := whole("addresses", func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		i, ok := at[a.LinkIndex]
		if !ok {
			return nil, errRenumbered
		}
		if a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 && !a.IP.IsMulticast() {
			all[i].Addrs = append(all[i].Addrs, prefixOf(a.IPNet))
		}
	}
	return all, nil
}
