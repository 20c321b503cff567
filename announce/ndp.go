package announce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/mdlayher/ndp"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
)

// allNodes is where an advertisement goes that nobody asked for (RFC 4291, section 2.7.1).
var allNodes = netip.MustParseAddr("ff02::1")

// ndpConn is an ICMPv6 socket in the network namespace of its maker. Unlike those of a packet socket, its packets pass
// the nftables hook for output, which drops an advertisement without permit.
type ndpConn struct{ *ipv6.PacketConn }

// listenNDP opens a socket that receives messages of the given types, of all links, with the link and the hop limit of
// each.
func listenNDP(accept ...ipv6.ICMPType) (ndpConn, error) {
	// Not ndp.Conn, which is of one link.
	c, err := icmp.ListenPacket("ip6:ipv6-icmp", "::")
	if err != nil {
		return ndpConn{}, fmt.Errorf("opening an ICMPv6 socket: %w", err)
	}
	p := c.IPv6PacketConn()
	var f ipv6.ICMPFilter
	f.SetAll(true)
	for _, t := range accept {
		f.Accept(t)
	}
	err = errors.Join(p.SetICMPFilter(&f), p.SetHopLimit(ndp.HopLimit), p.SetMulticastHopLimit(ndp.HopLimit),
		p.SetControlMessage(ipv6.FlagInterface|ipv6.FlagHopLimit, true))
	if err != nil {
		return ndpConn{}, errors.Join(fmt.Errorf("preparing an ICMPv6 socket: %w", err), c.Close())
	}
	return ndpConn{p}, nil
}

// advertise tells all nodes that ip is at the link's MAC address, by a neighbor advertisement (RFC 4861, section 4.4).
func (c ndpConn) advertise(ifi *net.Interface, ip netip.Addr) error {
	b, err := ndp.MarshalMessage(&ndp.NeighborAdvertisement{
		Override: true, TargetAddress: ip,
		Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: ifi.HardwareAddr}},
	})
	if err != nil {
		return fmt.Errorf("making an advertisement for link %s with MAC address %q: %w", ifi.Name, ifi.HardwareAddr, err)
	}
	// By its index, and no zone: package net looks the names of zones up once a minute, and the link may have been made
	// anew.
	cm := &ipv6.ControlMessage{HopLimit: ndp.HopLimit, IfIndex: ifi.Index}
	if _, err := c.WriteTo(b, cm, &net.IPAddr{IP: allNodes.AsSlice()}); err != nil {
		return fmt.Errorf("sending an advertisement on %s: %w", ifi.Name, err)
	}
	return nil
}

// sendNA sends an unsolicited advertisement (RFC 4861, section 7.2.6) on the link of that name as it is now: it may
// have been made anew since the last one. Without a permit it sends nothing, which is no error.
func sendNA(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
	ifi, err := linkByName(link)
	if err != nil {
		return err
	}
	c, err := listenNDP()
	if err != nil {
		return err
	}
	defer c.Close()
	if !permitted(ip) {
		return nil
	}
	return c.advertise(ifi, ip)
}

// ndpListener hears what other hosts say of IPv6 addresses, on the links of those.
type ndpListener struct {
	log    *slog.Logger
	heard  func(link string, ip netip.Addr, mac net.HardwareAddr) // another host says that it has ip
	conn   ndpConn
	done   chan struct{} // closed at the end of the goroutine that listens; nil: there was never anything to hear
	joined map[membership]bool
	err    string // the last one that was logged

	mu    sync.Mutex
	links map[int]*net.Interface // guarded by mu
}

// membership is one of a solicited-node group on a link.
type membership struct {
	ifindex int
	group   netip.Addr
}

// follow makes r listen for the addresses on their links, and for no others. What fails is tried again by the next
// call.
func (r *ndpListener) follow(ctx context.Context, want map[netip.Addr]string) {
	links := map[int]*net.Interface{}
	wanted := map[membership]bool{}
	var errs []error
	find := eachLinkOnce()
	for _, ip := range slices.SortedFunc(maps.Keys(want), netip.Addr.Compare) {
		ifi, err := find(want[ip])
		var group netip.Addr
		if err == nil {
			group, err = ndp.SolicitedNodeMulticast(ip)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		links[ifi.Index], wanted[membership{ifi.Index, group}] = ifi, true
	}
	if r.done == nil && len(wanted) > 0 {
		errs = append(errs, r.start(ctx))
	}
	if r.done != nil {
		errs = append(errs, r.join(wanted, links))
	}
	text := ""
	if err := errors.Join(errs...); err != nil {
		if text = err.Error(); text != r.err {
			r.log.Warn("neighbor discovery not listened to, will retry", "err", err)
		}
	}
	r.err = text
}

func (r *ndpListener) start(ctx context.Context) (err error) {
	if r.conn, err = listenNDP(ipv6.ICMPTypeNeighborSolicitation, ipv6.ICMPTypeNeighborAdvertisement); err != nil {
		return err
	}
	r.done, r.joined = make(chan struct{}), map[membership]bool{}
	go r.listen(ctx)
	return nil
}

// join joins the groups that are wanted and leaves the others.
func (r *ndpListener) join(wanted map[membership]bool, links map[int]*net.Interface) error {
	r.mu.Lock()
	r.links = links
	r.mu.Unlock()
	for m := range r.joined {
		if !wanted[m] {
			delete(r.joined, m)
			// Of a link that is gone the kernel has dropped it; else one group too many does no harm.
			_ = r.conn.LeaveGroup(&net.Interface{Index: m.ifindex}, &net.IPAddr{IP: m.group.AsSlice()})
		}
	}
	var errs []error
	for m := range wanted {
		if r.joined[m] {
			continue
		}
		if err := r.conn.JoinGroup(links[m.ifindex], &net.IPAddr{IP: m.group.AsSlice()}); err != nil {
			errs = append(errs, fmt.Errorf("joining group %s on %s: %w", m.group, links[m.ifindex].Name, err))
			continue
		}
		r.joined[m] = true
	}
	return errors.Join(errs...)
}

// listen listens until the socket is closed.
func (r *ndpListener) listen(ctx context.Context) {
	defer close(r.done)
	b := make([]byte, 1500) // of more, only options would be cut off
	for {
		n, cm, _, err := r.conn.ReadFrom(b)
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		// A message from behind a router has another hop limit (RFC 4861, section 7.1.1).
		if err != nil || cm == nil || cm.HopLimit != ndp.HopLimit {
			continue
		}
		r.mu.Lock()
		ifi := r.links[cm.IfIndex]
		r.mu.Unlock()
		if ifi == nil {
			continue
		}
		if ip, mac := advertised(b[:n]); ip.IsValid() && mac.String() != ifi.HardwareAddr.String() { // ours come back
			r.heard(ifi.Name, ip, mac)
		}
	}
}

// close ends the goroutine that listens.
func (r *ndpListener) close() {
	if r.done != nil {
		r.conn.Close()
		<-r.done
	}
}
