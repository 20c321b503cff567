// Package inject sends a packet in the name of a pod, so that its node takes it for one that the pod has sent.
//
// Nothing enters the pod. A packet socket sends a frame out by the link that leads to the pod, and a filter of tc at the
// egress of that link turns it around: mirred hands it to the ingress of the same link. From there on it meets what the
// pod's own packets meet: programs at the link, rp_filter, nftables, the policy rules, conntrack. What is behind the
// link it does not meet: the pod's own rules, and where pods are ports of a bridge, those of the bridge.
//
// The filter takes packets alone that go out to the pod and have the pod's own address as their source, and the
// destination of the question: such a packet is nobody's but this one, as long as the destination is not behind the same
// link, which is refused. It is there for some milliseconds; one that a killed process left changes nothing, and goes
// with Delete, or with the next packet at that link, of whichever family. The qdisc clsact that filters need stays,
// empty: to delete it could take along what another program has just put there.
package inject

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Packet is what a pod is to have sent: of TCP a SYN, of UDP a datagram without data, of ICMP and ICMPv6 an echo request.
type Packet struct {
	From, To netip.Addr // both of one family; From is the pod's
	Protocol byte       // by IP's number
	// FromPort and Port are those of From and To, of TCP and UDP. Of an echo request FromPort is the identifier.
	FromPort, Port uint16
}

// priority is that of the filter among those of the link, where no other program is likely to have one.
const priority = 0xe9e7

// neighborTime is for how long the kernel is waited for that asks for the pod's MAC address.
const neighborTime = time.Second

// Send sends a packet in the name of a pod of this node. It works in the network namespace of the calling thread. An
// error says why the node cannot: there are networks of pods whose links have no MAC addresses, or to which the kernel
// has no route.
func Send(ctx context.Context, p Packet) (err error) {
	link, err := linkTo(p.From)
	if err != nil {
		return err
	}
	switch routes, err := netlink.RouteGet(p.To.AsSlice()); {
	case err != nil || len(routes) == 0: // what the pod sends may have a route of its own
	case routes[0].Type != unix.RTN_UNICAST:
		return fmt.Errorf("%s is no host outside: it is an address of the node, or one of many hosts", p.To)
	// It would go around until its TTL is over, and with it what the pod itself sends there.
	case routes[0].LinkIndex == link.Attrs().Index:
		return fmt.Errorf("%s is behind link %s, as the pod is", p.To, link.Attrs().Name)
	}
	mac, err := macOf(ctx, link, p.From)
	if err != nil {
		return err
	}
	frame, err := p.frame(link.Attrs().HardwareAddr, mac)
	if err != nil {
		return err
	}
	if err := turnAround(link, p); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove(link.Attrs().Index, link.Attrs().Name)) }()
	c, err := packet.Listen(&net.Interface{Index: link.Attrs().Index, Name: link.Attrs().Name, MTU: link.Attrs().MTU}, packet.Raw, 0, nil)
	if err != nil {
		return fmt.Errorf("opening a packet socket on %s: %w", link.Attrs().Name, err)
	}
	defer c.Close()
	if _, err := c.WriteTo(frame, &packet.Addr{HardwareAddr: link.Attrs().HardwareAddr}); err != nil {
		return fmt.Errorf("sending on %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// linkTo returns the link that leads to a pod of this node.
func linkTo(pod netip.Addr) (netlink.Link, error) {
	routes, err := netlink.RouteGet(pod.AsSlice())
	if err != nil {
		return nil, fmt.Errorf("looking for the route to the pod's address %s: %w", pod, err)
	}
	if len(routes) != 1 || routes[0].LinkIndex == 0 || routes[0].Type != unix.RTN_UNICAST {
		return nil, fmt.Errorf("no link leads to the pod's address %s", pod)
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return nil, fmt.Errorf("the link that leads to %s: %w", pod, err)
	}
	switch at := link.Attrs(); {
	case routes[0].Gw != nil:
		return nil, fmt.Errorf("the pod's address %s is routed by %s: it is not on this node, or not on a link of its own", pod, routes[0].Gw)
	case len(at.HardwareAddr) != 6 || link.Type() == "vxlan":
		return nil, fmt.Errorf("link %s, which leads to the pod's address %s, is no Ethernet link of pods", at.Name, pod)
	}
	return link, nil
}

// macOf returns the MAC address of a pod, which the kernel asks the pod for where it does not have it.
func macOf(ctx context.Context, link netlink.Link, pod netip.Addr) (net.HardwareAddr, error) {
	family := netlink.FAMILY_V4
	if pod.Is6() {
		family = netlink.FAMILY_V6
	}
	asked := false
	for end := time.Now().Add(neighborTime); ; {
		neighbors, err := netlink.NeighList(link.Attrs().Index, family)
		if err != nil {
			return nil, fmt.Errorf("reading the neighbours of link %s: %w", link.Attrs().Name, err)
		}
		for _, n := range neighbors {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == pod && len(n.HardwareAddr) == 6 && n.State&netlink.NUD_FAILED == 0 {
				return n.HardwareAddr, nil
			}
		}
		if !asked {
			use := &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, IP: pod.AsSlice(), Flags: netlink.NTF_USE}
			if err := netlink.NeighSet(use); err != nil {
				return nil, fmt.Errorf("asking for the MAC address of %s: %w", pod, err)
			}
			asked = true
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return nil, fmt.Errorf("the pod's address %s does not answer on link %s", pod, link.Attrs().Name)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Delete deletes from all links the filters that a process left which was killed while it sent. That there is none is
// no error. It works in the network namespace of the calling thread.
func Delete() error {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("listing links: %w", err)
	}
	var errs []error
	for _, link := range links {
		errs = append(errs, remove(link.Index, link.Name))
	}
	return errors.Join(errs...)
}

// remove deletes from a link what turnAround added. Of both families: the kernel takes a filter of one protocol alone at
// a priority, so one that was left of IPv4 would keep out one of IPv6.
func remove(index int, name string) error {
	var errs []error
	for _, protocol := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
		err := netlink.FilterDel(&netlink.U32{FilterAttrs: attrs(index, protocol)})
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL): // it has none, one of the other family, or no qdisc
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP): // the link has gone, or the kernel has no filters
		case err != nil:
			errs = append(errs, fmt.Errorf("deleting a filter of link %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// attrs returns where the filter for a protocol is.
func attrs(link int, protocol uint16) netlink.FilterAttrs {
	return netlink.FilterAttrs{LinkIndex: link, Parent: netlink.HANDLE_MIN_EGRESS, Priority: priority, Protocol: protocol}
}

// turnAround has the link hand what it is given to send of a packet to its ingress, until remove is called.
func turnAround(link netlink.Link, p Packet) error {
	index, name := link.Attrs().Index, link.Attrs().Name
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	switch err := netlink.QdiscAdd(qdisc); {
	case errors.Is(err, unix.EEXIST):
		// A qdisc ingress takes a filter for the egress, too, and has it at the ingress: there it would meet what the pod
		// sends.
		qdiscs, err := netlink.QdiscList(link)
		if err != nil {
			return fmt.Errorf("reading the qdiscs of link %s: %w", name, err)
		}
		if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool {
			return q.Type() == qdisc.Type() && q.Attrs().Parent == netlink.HANDLE_CLSACT
		}) {
			return fmt.Errorf("link %s has a qdisc of another program, ingress, where qdisc clsact would be", name)
		}
	case err != nil:
		return fmt.Errorf("adding qdisc clsact to link %s: %w (the kernel needs CONFIG_NET_SCH_INGRESS)", name, err)
	}
	if err := remove(index, name); err != nil { // what was left
		return err
	}
	if err := netlink.FilterAdd(p.filter(index)); err != nil {
		return errors.Join(fmt.Errorf("adding a filter to link %s: %w (the kernel needs CONFIG_NET_CLS_U32 and CONFIG_NET_ACT_MIRRED)", name, err),
			remove(index, name))
	}
	return nil
}

// filter takes the packet at the egress of a link and hands it to the link's ingress.
func (p Packet) filter(link int) netlink.Filter {
	protocol, begin := uint16(unix.ETH_P_IP), int32(12) // of the addresses
	if p.From.Is6() {
		protocol, begin = unix.ETH_P_IPV6, 8
	}
	both := append(p.From.AsSlice(), p.To.AsSlice()...)
	keys := make([]nl.TcU32Key, 0, len(both)/4)
	for i := 0; i < len(both); i += 4 {
		keys = append(keys, nl.TcU32Key{Mask: ^uint32(0), Val: binary.BigEndian.Uint32(both[i:]), Off: begin + int32(i)})
	}
	back := netlink.NewMirredAction(link)
	back.MirredAction = netlink.TCA_INGRESS_REDIR
	return &netlink.U32{
		FilterAttrs: attrs(link, protocol),
		Sel:         &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL, Keys: keys},
		Actions:     []netlink.Action{back},
	}
}
