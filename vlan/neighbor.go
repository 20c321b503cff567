package vlan

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/mdlayher/ndp"
	rtnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The kernel answers neighbor solicitations only on the link that has the address. For an address of another link it
// does so where it is told to, by a proxy entry, and where it hears who asks, as a member of the address's
// solicited-node group. Both are the kernel's, and stay while no agent runs; the group stays because it is an address
// of the link with the flag autojoin.

// answered is what the kernel answers for on one link.
type answered struct {
	ips    []netip.Addr
	groups []netip.Prefix // those of solicited nodes, joined by an address with autojoin
	// ready: it does answer, and at once. Only read where there are ips.
	ready bool
}

// The settings of a link by which the kernel answers, and when. By default it waits for up to 0.8 s, to let others go
// first (RFC 4861, section 7.2.8); there are none.
func (l *Links) proxyNDP(link string) string { return l.sysctl + "/ipv6/conf/" + link + "/proxy_ndp" }
func (l *Links) proxyDelay(link string) string {
	return l.sysctl + "/ipv6/neigh/" + link + "/proxy_delay"
}

// The delay also says, in the kernel itself, what proxy_ndp was before: off with none, on with one of up to 20 ms. (Of
// 10 ms, HZ=250 makes none.)
const wasOff, wasOn = "0", "2"

func setting(path string) string {
	b, _ := os.ReadFile(path) // what cannot be read is not as it should be
	return strings.TrimSpace(string(b))
}

// turnOn makes a link answer.
func (l *Links) turnOn(link string) error {
	delay := wasOff
	switch have := setting(l.proxyDelay(link)); {
	case have == wasOff || have == wasOn:
		delay = have // so it was before us
	case setting(l.proxyNDP(link)) == "1":
		delay = wasOn
	}
	// In this order: a delay of ours alone does nothing.
	if err := os.WriteFile(l.proxyDelay(link), []byte(delay), 0); err != nil {
		return err
	}
	return os.WriteFile(l.proxyNDP(link), []byte("1"), 0)
}

// turnOff leaves the link's settings as they were before turnOn.
func (l *Links) turnOff(link string) error {
	switch setting(l.proxyDelay(link)) {
	case wasOff:
		if err := os.WriteFile(l.proxyNDP(link), []byte("0"), 0); err != nil {
			return err
		}
	case wasOn:
	default:
		return nil
	}
	delay := cmp.Or(setting(l.proxyDelay("default")), "80") // only the first network namespace has a default to be read
	return os.WriteFile(l.proxyDelay(link), []byte(delay), 0)
}

// kept is the error of an entry that stays where turnOff failed: without one, nobody would look at the link's settings
// again.
func (l *Links) kept(link string) error {
	if have := setting(l.proxyDelay(link)); have == wasOff || have == wasOn {
		return fmt.Errorf("it stays until the settings of %s are as they were", link)
	}
	return nil
}

func group(ip netip.Addr) netip.Prefix {
	g, _ := ndp.SolicitedNodeMulticast(ip) // fails for none that is of IPv6
	return netip.PrefixFrom(g, g.BitLen())
}

var solicitedNodes = netip.MustParsePrefix("ff02::1:ff00:0/104")

// struct ndmsg and its attributes (linux/neighbour.h).
const (
	sizeofNdMsg   = 12
	ndaProtocol   = 12
	autojoin      = unix.IFA_F_MCAUTOJOIN
	flagNodeProxy = unix.NTF_PROXY
)

func ndMessage(ifindex int) []byte {
	b := make([]byte, sizeofNdMsg)
	b[0], b[10] = unix.AF_INET6, flagNodeProxy
	binary.NativeEndian.PutUint32(b[4:], uint32(ifindex))
	return b
}

// answers returns what the kernel answers for by our proxy entries, and the groups that are joined for it, by the name
// of the link.
func (l *Links) answers(joined map[int][]netip.Prefix) (map[string]answered, error) {
	entries, err := whole("neighbour proxies", func() ([]rtnetlink.Message, error) {
		all, err := l.rt.Execute(rtnetlink.Message{
			Header: rtnetlink.Header{Type: unix.RTM_GETNEIGH, Flags: rtnetlink.Request | rtnetlink.Dump}, Data: ndMessage(0)})
		if slices.ContainsFunc(all, func(m rtnetlink.Message) bool { return m.Header.Flags&rtnetlink.DumpInterrupted != 0 }) {
			return nil, netlink.ErrDumpInterrupted
		}
		return all, err
	})
	if err != nil {
		return nil, err
	}
	byIndex := map[int]answered{}
	for i, groups := range joined {
		byIndex[i] = answered{groups: groups}
	}
	for _, m := range entries {
		ifindex, ip, ours, err := proxyEntry(m.Data)
		if err != nil {
			return nil, fmt.Errorf("listing neighbour proxies: %w", err)
		}
		if ours {
			a := byIndex[ifindex]
			a.ips = append(a.ips, ip)
			byIndex[ifindex] = a
		}
	}
	out := map[string]answered{}
	for i, a := range byIndex {
		dev, err := l.handle.LinkByIndex(i)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			continue // and with it all of this
		}
		if err != nil {
			return nil, fmt.Errorf("reading link %d: %w", i, err)
		}
		name := dev.Attrs().Name
		if len(a.ips) > 0 {
			delay := setting(l.proxyDelay(name))
			a.ready = setting(l.proxyNDP(name)) == "1" && (delay == wasOff || delay == wasOn)
		}
		out[name] = a
	}
	return out, nil
}

// Unchanged reports whether o, read before, is so still in what no event of package routing tells: which addresses the
// kernel answers for, and whether it does. It reads no more than that.
func (l *Links) Unchanged(o Observed) (bool, error) {
	now, err := l.answers(nil)
	if err != nil {
		return false, err
	}
	of := func(all map[string]answered) map[string]answered {
		out := map[string]answered{}
		for link, a := range all {
			if len(a.ips) > 0 {
				out[link] = answered{ips: slices.SortedFunc(slices.Values(a.ips), netip.Addr.Compare), ready: a.ready}
			}
		}
		return out
	}
	return reflect.DeepEqual(of(now), of(o.answers)), nil
}

func proxyEntry(b []byte) (ifindex int, ip netip.Addr, ours bool, err error) {
	if len(b) < sizeofNdMsg || b[0] != unix.AF_INET6 || b[10]&flagNodeProxy == 0 {
		return 0, ip, false, nil
	}
	d, err := rtnetlink.NewAttributeDecoder(b[sizeofNdMsg:])
	if err != nil {
		return 0, ip, false, err
	}
	for d.Next() {
		switch d.Type() {
		case unix.NDA_DST:
			ip, _ = netip.AddrFromSlice(d.Bytes())
		case ndaProtocol:
			ours = len(d.Bytes()) == 1 && d.Bytes()[0] == egress.RouteProtocol
		}
	}
	return int(binary.NativeEndian.Uint32(b[4:])), ip, ours && ip.IsValid(), d.Err()
}

// diffAnswers adds what makes the kernel answer for what is wanted.
func (c *Changes) diffAnswers(have map[string]answered, want map[string][]netip.Addr, keep bool) {
	for _, link := range slices.Sorted(maps.Keys(want)) {
		var ips []netip.Addr
		for _, ip := range want[link] {
			if ip.Is6() {
				ips = append(ips, ip)
			}
		}
		slices.SortFunc(ips, netip.Addr.Compare)
		if ips = slices.Compact(ips); len(ips) == 0 {
			continue
		}
		add := func(line string, run func(*Links) error) { c.adds = append(c.adds, op{line: line, run: run}) }
		groups := map[netip.Prefix]bool{}
		for _, ip := range ips {
			if g := group(ip); !groups[g] && !slices.Contains(have[link].groups, g) {
				groups[g] = true
				add(fmt.Sprintf("ip addr add %s dev %s autojoin nodad noprefixroute", g, link), func(l *Links) error { return present(l.join(link, g, l.handle.AddrAdd)) })
			}
			if !slices.Contains(have[link].ips, ip) {
				add(fmt.Sprintf("ip neigh add proxy %s dev %s protocol %d", ip, link, egress.RouteProtocol), func(l *Links) error {
					return l.proxy(unix.RTM_NEWNEIGH, rtnetlink.Create|rtnetlink.Replace, link, ip)
				})
			}
		}
		if !have[link].ready { // last: without entries of ours, nobody would look at it again
			add(fmt.Sprintf("sysctl -w net/ipv6/neigh/%s/proxy_delay=0 net/ipv6/conf/%[1]s/proxy_ndp=1", link), func(l *Links) error { return l.turnOn(link) })
		}
	}
	if keep {
		return
	}
	remove := func(line string, run func(*Links) error) { c.removes = append(c.removes, op{line: line, run: run}) }
	for _, link := range slices.Sorted(maps.Keys(have)) {
		groups := map[netip.Prefix]bool{}
		for _, ip := range want[link] {
			if ip.Is6() {
				groups[group(ip)] = true
			}
		}
		if len(groups) == 0 { // first, for the same reason
			remove(fmt.Sprintf("sysctl -w net/ipv6/conf/%s/proxy_ndp=0 net/ipv6/neigh/%[1]s/proxy_delay=80", link),
				func(l *Links) error { return l.turnOff(link) })
		}
		for _, ip := range slices.SortedFunc(slices.Values(have[link].ips), netip.Addr.Compare) {
			if !slices.Contains(want[link], ip) {
				remove(fmt.Sprintf("ip neigh del proxy %s dev %s", ip, link), func(l *Links) error {
					if err := l.kept(link); err != nil && len(groups) == 0 {
						return err
					}
					return absent(l.proxy(unix.RTM_DELNEIGH, 0, link, ip))
				})
			}
		}
		for _, g := range sorted(have[link].groups) {
			if !groups[g] {
				remove(fmt.Sprintf("ip addr del %s dev %s", g, link), func(l *Links) error {
					return absent(l.join(link, g, l.handle.AddrDel))
				})
			}
		}
	}
}

func (l *Links) index(link string) (int, error) {
	dev, err := l.handle.LinkByName(link)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return 0, fmt.Errorf("%w %s", errNoLink, link)
	}
	if err != nil {
		return 0, err
	}
	return dev.Attrs().Index, nil
}

func (l *Links) proxy(typ rtnetlink.HeaderType, flags rtnetlink.HeaderFlags, link string, ip netip.Addr) error {
	i, err := l.index(link)
	if err != nil {
		return err
	}
	attrs, err := rtnetlink.MarshalAttributes([]rtnetlink.Attribute{
		{Type: unix.NDA_DST, Data: ip.AsSlice()}, {Type: ndaProtocol, Data: []byte{egress.RouteProtocol}}})
	if err != nil {
		return err
	}
	_, err = l.rt.Execute(rtnetlink.Message{
		Header: rtnetlink.Header{Type: typ, Flags: rtnetlink.Request | rtnetlink.Acknowledge | flags}, Data: append(ndMessage(i), attrs...)})
	if errors.Is(err, unix.ENOENT) && typ == unix.RTM_DELNEIGH {
		return nil
	}
	return err
}

// join makes the kernel itself a member of a group on a link, or ends that.
func (l *Links) join(link string, g netip.Prefix, do func(netlink.Link, *netlink.Addr) error) error {
	dev, err := l.handle.LinkByName(link)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("%w %s", errNoLink, link)
	}
	if err != nil {
		return err
	}
	return do(dev, &netlink.Addr{IPNet: &net.IPNet{IP: g.Addr().AsSlice(), Mask: net.CIDRMask(g.Bits(), g.Addr().BitLen())},
		Flags: autojoin | unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE})
}
