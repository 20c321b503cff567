package announce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/net/ipv6"
	"golang.org/x/sync/errgroup"
)

// Conflict is another host that uses an address.
type Conflict struct {
	Link string
	MAC  string // its MAC address
}

// String prints who it is, and where.
func (c Conflict) String() string { return c.MAC + " on link " + c.Link }

const (
	// probes is how often an address is asked for (PROBE_NUM of RFC 5227, section 1.1): frames get lost.
	probes = 3
	// ProbeGap is the time after each of them. RFC 5227 takes a second or two and RFC 4862 one, for hosts and switch
	// ports that come up just now; those of a node have been up for a while, and whoever has an address says so within
	// a millisecond.
	ProbeGap = 150 * time.Millisecond
)

// Probe asks on its link for each address that nobody here has, in nobody's name (RFC 5227, section 2.1.1; a
// solicitation of RFC 4861 does for IPv6 what that of RFC 4862 does), and returns who answered. It takes three times
// gap, unless all are answered before. After an error nothing is known of the addresses that are not in the answer.
func Probe(ctx context.Context, want map[netip.Addr]string, gap time.Duration) (map[netip.Addr]Conflict, error) {
	parts := map[part][]netip.Addr{}
	for _, ip := range slices.SortedFunc(maps.Keys(want), netip.Addr.Compare) {
		k := part{link: want[ip], is4: ip.Is4(), sender: netip.IPv4Unspecified()}
		parts[k] = append(parts[k], ip)
	}
	found, err := ask(ctx, parts, gap)
	out := map[netip.Addr]Conflict{}
	for at, mac := range found {
		out[at.IP] = Conflict{at.Link, mac}
	}
	return out, err
}

// Place is an address on a link: two links may have different hosts of one link-local address.
type Place struct {
	IP   netip.Addr
	Link string
}

// Neighbour is a host on a link of this node.
type Neighbour struct {
	IP   netip.Addr
	Link string
	// Sender is in whose name an IPv4 address is asked for: an address of this node on Link, as its kernel asks. The
	// zero Addr: in nobody's, which routers may leave unanswered.
	Sender netip.Addr
}

// Answers asks for neighbours as a kernel does that has a packet for them, by a broadcast ARP request or a multicast
// neighbor solicitation, three times at most, and returns those that answered. It takes three times ProbeGap where one
// does not. After an error nothing is known of those that are not in the answer.
func Answers(ctx context.Context, list []Neighbour) (map[Place]bool, error) {
	parts := map[part][]netip.Addr{}
	for _, n := range list {
		k := part{link: n.Link, is4: n.IP.Is4(), sender: netip.IPv4Unspecified()}
		if n.Sender.Is4() {
			k.sender = n.Sender
		}
		if !slices.Contains(parts[k], n.IP) {
			parts[k] = append(parts[k], n.IP)
		}
	}
	found, err := ask(ctx, parts, ProbeGap)
	out := map[Place]bool{}
	for at := range found {
		out[at] = true
	}
	return out, err
}

// part is what one socket asks for.
type part struct {
	link   string
	is4    bool
	sender netip.Addr // of IPv4
}

// ask asks for all addresses at once, and returns the MAC addresses of who answered.
func ask(ctx context.Context, parts map[part][]netip.Addr, gap time.Duration) (map[Place]string, error) {
	// All sockets first, by this goroutine: they are of its network namespace.
	var askers []*asker
	var errs []error
	for k, ips := range parts {
		open := openNDP
		if k.is4 {
			open = func(link string) (*asker, error) { return openARP(link, k.sender) }
		}
		a, err := open(k.link)
		if err != nil {
			errs = append(errs, fmt.Errorf("opening a socket on %s: %w", k.link, err))
			continue
		}
		defer a.close()
		a.ips, askers = ips, append(askers, a)
	}
	var g errgroup.Group
	for _, a := range askers {
		g.Go(func() error { return a.run(ctx, gap) })
	}
	errs = append(errs, g.Wait())
	all := map[Place]string{}
	for _, a := range askers {
		for ip, mac := range a.found {
			all[Place{ip, a.link.Name}] = mac
		}
	}
	return all, errors.Join(errs...)
}

// asker asks for addresses of one family on one link.
type asker struct {
	link  *net.Interface
	ips   []netip.Addr
	found map[netip.Addr]string // MAC addresses

	ask func(netip.Addr) error
	// listen returns who has which address, by the next message: the zero Addr, where it says nothing of that.
	listen   func() (netip.Addr, net.HardwareAddr, error)
	deadline func(time.Time) error // of listen
	close    func() error
}

// run asks for each of the addresses that has no answer yet, listens for gap, and does so again, until all have one.
func (a *asker) run(ctx context.Context, gap time.Duration) error {
	a.found = map[netip.Addr]string{}
	for range probes {
		for _, ip := range a.ips {
			if _, ok := a.found[ip]; ok {
				continue
			}
			if err := errors.Join(ctx.Err(), a.ask(ip)); err != nil {
				return fmt.Errorf("asking for %s on %s: %w", ip, a.link.Name, err)
			}
		}
		if err := a.deadline(time.Now().Add(gap)); err != nil {
			return err
		}
		for len(a.found) < len(a.ips) {
			ip, mac, err := a.listen()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("listening on %s: %w", a.link.Name, err)
			}
			if slices.Contains(a.ips, ip) && mac.String() != a.link.HardwareAddr.String() {
				a.found[ip] = mac.String()
			}
		}
	}
	return nil
}

func openARP(name string, sender netip.Addr) (*asker, error) {
	link, err := linkByName(name)
	if err != nil {
		return nil, err
	}
	c, err := packet.Listen(link, packet.Datagram, int(ethernet.EtherTypeARP), nil)
	if err != nil {
		return nil, err
	}
	ask := func(ip netip.Addr) error {
		p, err := arp.NewPacket(arp.OperationRequest, link.HardwareAddr, sender, make(net.HardwareAddr, len(link.HardwareAddr)), ip)
		if err != nil {
			return err
		}
		b, err := p.MarshalBinary()
		if err == nil {
			_, err = c.WriteTo(b, &packet.Addr{HardwareAddr: ethernet.Broadcast})
		}
		return err
	}
	listen := func() (netip.Addr, net.HardwareAddr, error) { return readARP(c) }
	return &asker{link: link, ask: ask, listen: listen, deadline: c.SetReadDeadline, close: c.Close}, nil
}

// readARP returns who says that an IPv4 address is at which MAC address, by a request or a reply.
func readARP(c *packet.Conn) (netip.Addr, net.HardwareAddr, error) {
	b := make([]byte, 64) // of an ARP packet, the rest is padding
	n, _, err := c.ReadFrom(b)
	if err != nil {
		return netip.Addr{}, nil, err
	}
	ip, mac := parseARP(b[:n])
	return ip, mac, nil
}

// parseARP returns what an ARP packet says of its sender; the zero Addr: it is not for IPv4 over Ethernet, or cut off.
func parseARP(b []byte) (netip.Addr, net.HardwareAddr) {
	var p arp.Packet
	// The lengths of the addresses are the sender's own words.
	if p.UnmarshalBinary(b) != nil || !p.SenderIP.Is4() || len(p.SenderHardwareAddr) != 6 {
		return netip.Addr{}, nil
	}
	return p.SenderIP, p.SenderHardwareAddr
}

func openNDP(name string) (*asker, error) {
	link, err := linkByName(name)
	if err != nil {
		return nil, err
	}
	c, err := listenNDP(ipv6.ICMPTypeNeighborAdvertisement)
	if err != nil {
		return nil, err
	}
	ask := func(ip netip.Addr) error {
		to, err := ndp.SolicitedNodeMulticast(ip)
		if err != nil {
			return err
		}
		b, err := ndp.MarshalMessage(&ndp.NeighborSolicitation{
			TargetAddress: ip, Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: link.HardwareAddr}},
		})
		if err == nil {
			_, err = c.WriteTo(b, &ipv6.ControlMessage{HopLimit: ndp.HopLimit, IfIndex: link.Index}, &net.IPAddr{IP: to.AsSlice()})
		}
		return err
	}
	b := make([]byte, 1500)
	listen := func() (netip.Addr, net.HardwareAddr, error) {
		n, cm, _, err := c.ReadFrom(b)
		if err != nil || cm == nil || cm.IfIndex != link.Index || cm.HopLimit != ndp.HopLimit {
			return netip.Addr{}, nil, err
		}
		ip, mac := advertised(b[:n])
		return ip, mac, nil
	}
	return &asker{link: link, ask: ask, listen: listen, deadline: c.SetReadDeadline, close: c.Close}, nil
}

// advertised returns what a neighbor advertisement says; the zero Addr for other messages, for one that names no MAC
// address, and for what is no message.
func advertised(b []byte) (netip.Addr, net.HardwareAddr) {
	m, err := ndp.ParseMessage(b)
	na, ok := m.(*ndp.NeighborAdvertisement)
	if err != nil || !ok {
		return netip.Addr{}, nil
	}
	for _, o := range na.Options {
		if l, ok := o.(*ndp.LinkLayerAddress); ok && l.Direction == ndp.Target && len(l.Addr) == 6 {
			return na.TargetAddress, l.Addr
		}
	}
	return netip.Addr{}, nil
}
